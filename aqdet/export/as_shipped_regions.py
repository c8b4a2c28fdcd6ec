"""A trained two-stage detector in the arithmetic that ships, with Detectron2's own code around the networks."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Boxes, ImageList
from torch import Tensor, nn

from ..modeling import QuantGeneralizedRCNN
from .as_shipped import AsShipped, ProgramNetwork, make_batch
from .extract_regions import extract_two_stage


class AsShippedRegions(nn.Module):
    """A trained two-stage detector with its usual inputs and outputs in evaluation, in the arithmetic that ships.

    Args:
        model: A :class:`~aqdet.modeling.QuantGeneralizedRCNN`; its proposals, RoIAlign and decoding are Detectron2's.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        programs = extract_two_stage(model).by_name()
        self.networks = nn.ModuleDict({name: ProgramNetwork(part) for name, part in programs.items()}).to(model.device)
        # It is no submodule, since its weights are not of use here.
        self.__dict__["model"] = model

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See :meth:`aqdet.modeling.meta_arch.rcnn.QuantGeneralizedRCNN.forward`, in evaluation."""
        model: Any = self.__dict__["model"]
        rpn, heads = model.proposal_generator, model.roi_heads
        network: Any = self.networks["features"]
        batch, sizes = make_batch(batched_inputs, network.program, model.device)
        values = network.values(batch)
        grids = network.program.grids()
        levels = [values[name] * float(grids[name].scale) for name in network.program.pyramid]
        logits, deltas = ([values[o.names[kind]] for o in network.program.outputs] for kind in range(2))
        proposals = rpn.predict_proposals(
            rpn.anchor_generator(logits),
            [x.permute(0, 2, 3, 1).flatten(1) for x in logits],
            [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, -2) for x in deltas],
            ImageList(batch, sizes).image_sizes,
        )
        predictions = self._head("box", heads.box_pooler, levels, [x.proposal_boxes for x in proposals])
        results, _ = heads.box_predictor.inference([x.flatten(1) for x in predictions], proposals)
        if "mask" in self.networks:
            (masks,) = self._head("mask", heads.mask_pooler, levels, [x.pred_boxes for x in results])
            mask_rcnn_inference(masks, results)
        found = []
        for result, entry, size in zip(results, batched_inputs, sizes, strict=True):
            height, width = entry.get("height", size[0]), entry.get("width", size[1])
            found.append({"instances": detector_postprocess(result, height, width)})
        return found

    def _head(self, name: str, pooler: ROIPooler, levels: list[Tensor], boxes: list[Boxes]) -> list[Tensor]:
        """Returns the predictions of a head for regions."""
        network: Any = self.networks[name]
        grid = network.program.image
        pooled = pooler(levels, boxes) / float(grid.scale)
        codes = pooled.round().clamp(grid.quant_min, grid.quant_max) + grid.zero_point
        values = network.values(codes)
        return [values[output] for output in network.program.outputs[0].names]


def as_shipped(model: nn.Module) -> nn.Module:
    """Returns a trained detector in the arithmetic that ships.

    Raises:
        ValueError: In one line that names the layer or the config key, if it cannot run on integers.
    """
    return AsShippedRegions(model) if isinstance(model, QuantGeneralizedRCNN) else AsShipped(model)
