"""Extraction of the integer programs of a two-stage detector.

There are three: from the image to the region proposal network's predictions and the pyramid's codes; from a pooled
region to its class and box; and from a pooled region to its mask. Between them stands RoIAlign, the one step in float:
it averages the values behind the pyramid's codes, and its results are rounded onto the grid that the heads read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import nn

from ..modeling import QuantGeneralizedRCNN
from ..modeling.roi_heads import QuantFastRCNNConvFCHead, QuantMaskRCNNConvUpsampleHead
from ..modeling.rpn import QuantRPNHead
from .as_conv import BLOCK, deconv_as_conv, linear_as_conv
from .extract import Extractor, Value
from .grids import check_parameters, grid_of
from .program import IMAGE, Conv, DepthToSpace, Output, Program

BOX_OUTPUTS, MASK_OUTPUT = ("class_logits", "box_deltas"), "mask_logits"


@dataclasses.dataclass(frozen=True)
class TwoStagePrograms:
    """The integer programs of a two-stage detector.

    Attributes:
        features: The program from the image to the RPN's predictions, and to the codes that regions are pooled from.
        box: The program from a pooled region to the logits of its classes and the deltas of its box.
        mask: The program from a pooled region to the logits of its masks, one a class; None without masks.
    """

    features: Program
    box: Program
    mask: Program | None

    def by_name(self) -> dict[str, Program]:
        """Returns the programs by name, in the order in which they run."""
        return {"features": self.features, "box": self.box, **({} if self.mask is None else {"mask": self.mask})}


def extract_two_stage(model: Any, *, round_constants: bool = False) -> TwoStagePrograms:
    """Returns the integer programs of a two-stage detector.

    Args:
        model: A calibrated :class:`~aqdet.modeling.QuantGeneralizedRCNN`; its auxiliary path is ignored.
        round_constants: Whether to give the model itself the constants that ship, see
            :func:`~aqdet.export.rounded.with_rounded_constants`.

    Raises:
        ValueError: In one line that names the layer or the config key, if it cannot run on integers.
    """
    assert isinstance(model, QuantGeneralizedRCNN)
    check_parameters(model)
    heads = model.roi_heads
    if heads.keypoint_on:
        raise ValueError("MODEL.KEYPOINT_ON must be False for export: keypoints have no integer form here")
    features = _Regions(round_constants).features(model)
    box = _Regions(round_constants).box(heads)
    mask = _Regions(round_constants).mask(heads) if heads.mask_on else None
    return TwoStagePrograms(features, box, mask)


def check_pooler(pooler: ROIPooler, node: str) -> None:
    """Checks that regions are pooled as the runtime does.

    Raises:
        ValueError: In one line that names the config key.
    """
    kinds = {type(level).__name__ for level in pooler.level_poolers}
    if kinds != {"ROIAlign"} or not all(level.aligned for level in pooler.level_poolers):
        raise ValueError(f"{node}.POOLER_TYPE must be ROIAlignV2 for export")


class _Regions(Extractor):
    """Walks the modules of a two-stage detector in the order in which they run; one program each."""

    def features(self, model: Any) -> Program:
        image = self._image_grid(model)
        levels = self._fpn(model.backbone, self._stem_input(model, image))
        head = model.proposal_generator.rpn_head
        if not isinstance(head, QuantRPNHead):
            raise ValueError(f"layer proposal_generator.rpn_head: export knows no {type(head).__name__}")
        root = "proposal_generator.rpn_head"
        named = [("conv", head.conv)] if not isinstance(head.conv, nn.Sequential) else []
        named += [(f"conv.{name}", conv) for name, conv in head.conv.named_children()] if not named else []
        steps = [(f"{root}.{name}", conv, None) for name, conv in named]
        outputs = []
        shapes = model.backbone.output_shape()
        for name in model.proposal_generator.in_features:
            output = Output(name, f"objectness_{name}", f"deltas_{name}", int(shapes[name].stride))
            last = [
                (f"{root}.objectness_logits", head.objectness_logits, output.logits),
                (f"{root}.anchor_deltas", head.anchor_deltas, output.deltas),
            ]
            self._predict(steps, last, levels[name], name)
            outputs.append(output)
        pyramid = tuple(levels[name].name for name in model.roi_heads.box_in_features)
        divisibility = int(model.backbone.size_divisibility)
        return Program(image, tuple(self.operations), tuple(outputs), divisibility, pyramid=pyramid)

    def box(self, heads: Any) -> Program:
        head, predictor = heads.box_head, heads.box_predictor
        if not isinstance(head, QuantFastRCNNConvFCHead):
            raise ValueError(f"layer roi_heads.box_head: export knows no {type(head).__name__}")
        if type(predictor) is not FastRCNNOutputLayers:
            raise ValueError(f"layer roi_heads.box_predictor: export knows no {type(predictor).__name__}")
        check_pooler(heads.box_pooler, "MODEL.ROI_BOX_HEAD")
        first = next(module for module in head.modules() if isinstance(module, nn.Conv2d | nn.Linear))
        area = heads.box_pooler.output_size[0] * heads.box_pooler.output_size[1]
        channels = width = first.in_channels if isinstance(first, nn.Conv2d) else first.in_features // area
        steps: list[tuple[str, Any, nn.Module | None]] = []
        for part, module in head.named_children():
            name = f"roi_heads.box_head.{part}"
            if isinstance(module, nn.Linear):
                layer: Any = linear_as_conv(module, name, width)
                steps.append((name, layer, None))
            elif isinstance(module, nn.Conv2d):
                layer = self._quantized(module, name)
                steps.append((name, layer, layer.norm))
            elif isinstance(module, nn.ReLU | nn.Flatten):
                continue
            else:
                raise ValueError(f"layer {name}: export knows no {type(module).__name__} there")
            width = layer.out_channels
        last = []
        for part, output in zip(("cls_score", "bbox_pred"), BOX_OUTPUTS, strict=True):
            name = f"roi_heads.box_predictor.{part}"
            last.append((name, linear_as_conv(getattr(predictor, part), name, width), output))
        self._region_steps(steps, last)
        return self._program(steps[0], channels, Output("box", *BOX_OUTPUTS, 0))

    def mask(self, heads: Any) -> Program:
        head = heads.mask_head
        if not isinstance(head, QuantMaskRCNNConvUpsampleHead):
            raise ValueError(f"layer roi_heads.mask_head: export knows no {type(head).__name__}")
        check_pooler(heads.mask_pooler, "MODEL.ROI_MASK_HEAD")
        root = "roi_heads.mask_head"
        convs = [
            (f"{root}.{name}", self._quantized(module, f"{root}.{name}"))
            for name, module in head.named_children()
            if isinstance(module, nn.Conv2d) and module is not head.predictor
        ]
        deconv = deconv_as_conv(head.deconv, f"{root}.deconv")
        readers = [*convs, (f"{root}.deconv", deconv), (f"{root}.predictor", head.predictor)]
        first = (*readers[0], None)
        value = Value(IMAGE, grid_of(readers[0][1].input_quantizer, f"{readers[0][0]}.input_quantizer"))
        for (name, layer), (next_name, following) in zip(readers[:-1], readers[1:], strict=True):
            site = self._site(following, next_name)
            if layer is deconv:
                value = self._deconv(deconv, name, value, site)
            else:
                value = self._conv(layer, name, value, site.name, site.grid, layer.norm, relu=True)
        name, predictor = readers[-1]
        self._conv(self._quantized(predictor, name), name, value, MASK_OUTPUT, None, None)
        return self._program(first, readers[0][1].weight.shape[1], Output("mask", MASK_OUTPUT, "", 0))

    def _region_steps(self, steps: list[Any], last: list[Any]) -> None:
        """Adds layers as :meth:`_predict` does, from codes that are on the first layer's grid already."""
        name, layer, _ = steps[0]
        self._predict(steps, last, Value(IMAGE, grid_of(layer.input_quantizer, f"{name}.input_quantizer")))
        same, *self.operations = self.operations  # a change of grid from one to itself
        first = self.operations[0]
        assert isinstance(first, Conv)
        self.operations = [
            dataclasses.replace(o, input=IMAGE) if isinstance(o, Conv) and o.input == same.output else o
            for o in self.operations
        ]

    def _deconv(self, layer: Any, name: str, x: Value, site: Value) -> Value:
        """Adds a 1x1 convolution to four values for each channel, which are then spread over squares.

        The four have one scale and one bias, as the deconvolution has.
        """
        blocks = f"{site.name}.blocks"
        self._conv(layer, name, x, blocks, site.grid, None, relu=True)
        conv = self.operations.pop()
        assert isinstance(conv, Conv)
        places = BLOCK**2
        weight = np.ascontiguousarray(conv.weight.transpose(0, 2, 3, 1)).reshape(-1, conv.weight.shape[1], 1, 1)
        each: dict[str, Any] = {
            field: np.repeat(getattr(conv, field), places) for field in ("sign", "multiple", "scale", "bias")
        }
        self.operations.append(dataclasses.replace(conv, weight=weight, **each))
        self.operations.append(DepthToSpace(site.name, blocks, BLOCK))
        return site

    def _program(self, first: tuple[str, Any, Any], channels: int, output: Output) -> Program:
        name, layer, _ = first
        grid = grid_of(layer.input_quantizer, f"{name}.input_quantizer")
        return Program(grid, tuple(self.operations), (output,), 1, channels=int(channels))
