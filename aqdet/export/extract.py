"""Extraction of the integer program from the modules of a trained detector."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from numpy.typing import NDArray
from torch import nn

from ..layers import QuantAdd, StreamQuantizer
from ..modeling import QuantFCOS, QuantFPN, QuantRetinaNet
from ..modeling.backbone import QuantLastLevelP6P7
from ..modeling.blocks import QuantBasicBlock, QuantBottleneckBlock, QuantSimpleStem, QuantStem
from ..quantization import Quantizer
from .as_conv import quantized_conv
from .fold import as_array, fold, lower_bias, norm_affine
from .grids import check_multiplier, check_parameters, check_quantizer, check_reach, grid_of
from .program import (
    IMAGE,
    Add,
    Conv,
    Grid,
    MaxPool,
    Operation,
    Output,
    PadImage,
    Program,
    Requantize,
    Upsample,
    largest_code,
)
from .scaled_add import ScaledAdd
from .sums import choose_sum_scales


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the program under construction.

    Attributes:
        name: The value's name.
        grid: The grid of its codes.
    """

    name: str
    grid: Grid


def extract(model: nn.Module) -> Program:
    """Returns the integer program of a detector.

    Args:
        model: A calibrated :class:`~aqdet.modeling.QuantRetinaNet` or :class:`~aqdet.modeling.QuantFCOS`; its
            auxiliary path, if any, is ignored.

    Raises:
        ValueError: In one line that names a layer, if the layer cannot run on integers: it is in float, not
            calibrated, switched off, of a method that is not uniform, or has a norm that does not fold.
    """
    if not isinstance(model, QuantRetinaNet | QuantFCOS):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE must be QuantRetinaNet or QuantFCOS for export, got {type(model).__name__}"
        )
    return Extractor().detector(model)


class Extractor:
    """Walks the modules in the order in which they run.

    Args:
        round_constants: Whether it gives the modules the constants that ship.
    """

    def __init__(self, round_constants: bool = False) -> None:
        self.operations: list[Operation] = []
        self.round_constants = round_constants

    def detector(self, model: Any) -> Program:
        """Returns the program of a dense detector."""
        check_parameters(model)
        image = self._image_grid(model)
        levels = self._fpn(model.backbone, self._stem_input(model, image))
        towers = {"cls_subnet": {"cls_score": "logits"}, "bbox_subnet": {"bbox_pred": "deltas"}}
        if isinstance(model, QuantFCOS) and model.head.has_centerness:
            towers["bbox_subnet"]["ctrness"] = "centerness"
        outputs = []
        for index, name in enumerate(model.head_in_features):
            kinds: dict[str, str] = {}
            for subnet, predictions in towers.items():
                named = {module: f"{kind}_{name}" for module, kind in predictions.items()}
                self._tower(model.head, subnet, named, levels[name], index, name)
                kinds |= dict(zip(predictions.values(), named.values(), strict=True))
            outputs.append(Output(level=name, stride=int(model.backbone.output_shape()[name].stride), **kinds))
        return Program(image, tuple(self.operations), tuple(outputs), int(model.backbone.size_divisibility))

    # --- image and backbone ---

    def _image_grid(self, model: Any) -> Grid:
        deviations = sorted(set(model.pixel_std.flatten().tolist()))
        if len(deviations) != 1:
            raise ValueError(
                "MODEL.PIXEL_STD must be one value for all channels, since a uint8 image has one scale, got "
                f"{model.pixel_std.flatten().tolist()}: train with one (layer backbone.bottom_up.stem.conv1)"
            )
        return Grid(float(np.float32(1 / deviations[0])), 0, 255)

    def _stem_input(self, model: Any, grid: Grid) -> Value:
        stem = model.backbone.bottom_up.stem
        if not isinstance(stem, QuantStem | QuantSimpleStem):
            raise ValueError(f"layer backbone.bottom_up.stem: export knows no {type(stem).__name__}")
        mean = tuple(model.pixel_mean.flatten().tolist())
        values = tuple(min(max(round(value), 0), 255) for value in mean)
        vertical, horizontal = stem.conv1.padding
        self.operations.append(PadImage("image_padded", IMAGE, (vertical, horizontal), values, mean))
        return self._stem(stem, "backbone.bottom_up.stem", Value("image_padded", grid), mean)

    def _stem(self, stem: Any, name: str, x: Value, mean: Sequence[float]) -> Value:
        target = self._stream(stem.output_stream, f"{name}.output_stream")
        pooled = isinstance(stem, QuantStem)
        output = f"{name}.conv1.output" if pooled else target.name
        conv = self._quantized(stem.conv1, f"{name}.conv1")
        if conv.input_quantizer is not None:
            raise ValueError(f"layer {name}.conv1: the stem reads the uint8 image and has no input quantizer")
        # The sum of (pixel - mean) * weight, with the mean moved into the bias.
        codes, scale = self._weight(conv, f"{name}.conv1")
        shift = -(codes.sum((2, 3)) @ np.array(mean)) * scale * x.grid.scale
        y = self._conv(
            conv, f"{name}.conv1", x, output, target.grid, conv.norm, relu=True, input_offset=shift, padding=(0, 0)
        )
        if pooled:
            self.operations.append(MaxPool(target.name, y.name, kernel=3, stride=2, padding=1))
        return target

    def _resnet(self, resnet: Any, name: str, x: Value) -> dict[str, Value]:
        features = {}
        for stage in resnet.stage_names:
            for index, block in enumerate(getattr(resnet, stage)):
                x = self._block(block, f"{name}.{stage}.{index}", x)
            features[stage] = x
        return features

    def _block(self, block: Any, name: str, x: Value) -> Value:
        if not isinstance(block, QuantBasicBlock | QuantBottleneckBlock):
            raise ValueError(f"layer {name}: export knows no {type(block).__name__}")
        parts = ["conv1", "conv2"] + ["conv3"] * isinstance(block, QuantBottleneckBlock)
        add = block.residual_add
        branch = x
        for part, following in zip(parts, [*parts[1:], ""], strict=True):
            conv = self._quantized(getattr(block, part), f"{name}.{part}")
            if branch is x:
                branch = self._requantize(x, conv.input_quantizer, f"{name}.{part}")
            target = (
                self._site(getattr(block, following), f"{name}.{following}")
                if following
                else self._operand(add, "x_quantizer", f"{name}.residual_add")
            )
            branch = self._conv(
                conv, f"{name}.{part}", branch, target.name, target.grid, conv.norm, relu=bool(following)
            )
        if block.shortcut is not None:
            shortcut = self._quantized(block.shortcut, f"{name}.shortcut")
            operand = self._operand(add, "y_quantizer", f"{name}.residual_add")
            source = self._requantize(x, shortcut.input_quantizer, f"{name}.shortcut")
            x = self._conv(shortcut, f"{name}.shortcut", source, operand.name, operand.grid, shortcut.norm)
        return self._add(branch, x, self._stream(block.output_stream, f"{name}.output_stream"), block, "residual_add")

    # --- pyramid ---

    def _fpn(self, fpn: Any, x: Value) -> dict[str, Value]:
        if not isinstance(fpn, QuantFPN):
            raise ValueError(f"layer backbone: export knows QuantFPN, not {type(fpn).__name__}")
        bottom_up = self._resnet(fpn.bottom_up, "backbone.bottom_up", x)
        levels: dict[str, Value] = {}
        previous: Value | None = None
        for level, feature in zip(reversed(fpn._levels), reversed(fpn.in_features), strict=True):
            name = f"backbone.fpn_lateral{level}"
            stream = self._stream(getattr(fpn, f"fpn_sum{level}"), f"backbone.fpn_sum{level}")
            lateral = self._quantized(getattr(fpn, f"fpn_lateral{level}"), name)
            source = self._requantize(bottom_up[feature], lateral.input_quantizer, name)
            target = stream
            if previous is not None:
                target = self._operand(getattr(fpn, f"fpn_add{level}"), "x_quantizer", f"backbone.fpn_add{level}")
            merged = self._conv(lateral, name, source, target.name, target.grid, lateral.norm)
            if previous is not None:
                top_down = f"backbone.fpn_top_down{level}"
                self.operations.append(Upsample(top_down, previous.name))
                merged = self._add(merged, Value(top_down, previous.grid), stream, fpn, f"fpn_add{level}")
            previous = merged
            name = f"backbone.fpn_output{level}"
            output = self._stream(getattr(fpn, f"p{level}_stream"), f"backbone.p{level}_stream")
            levels[f"p{level}"] = self._level(getattr(fpn, f"fpn_output{level}"), name, previous, output)
        if fpn.top_block is not None:
            self._top_block(fpn.top_block, {**bottom_up, **levels}, fpn._levels[-1] + 1, levels)
        return levels

    def _top_block(self, block: Any, sources: dict[str, Value], first: int, levels: dict[str, Value]) -> None:
        if isinstance(block, LastLevelMaxPool):
            levels[f"p{first}"] = Value("backbone.top_block", sources[block.in_feature].grid)
            source = sources[block.in_feature].name
            self.operations.append(MaxPool("backbone.top_block", source, kernel=1, stride=2, padding=0))
            return
        if not isinstance(block, QuantLastLevelP6P7):
            raise ValueError(f"layer backbone.top_block: export knows no {type(block).__name__}")
        x = sources[block.in_feature]
        for number, part in enumerate(("p6", "p7"), first):
            name = f"backbone.top_block.{part}"
            output = self._stream(getattr(block, f"{part}_stream"), f"{name}_stream")
            x = self._level(getattr(block, part), name, x, output)
            levels[f"p{number}"] = x

    def _level(self, module: nn.Module, name: str, x: Value, output: Value) -> Value:
        conv = self._quantized(module, name)
        source = self._requantize(x, conv.input_quantizer, name)
        return self._conv(conv, name, source, output.name, output.grid, conv.norm)

    # --- head ---

    def _tower(self, head: Any, subnet: str, predictions: dict[str, str], x: Value, index: int, level: str) -> None:
        """Adds one subnet and the convolutions that predict from it, name -> output, at one level."""
        steps: list[tuple[str, nn.Module, nn.Module | None]] = []
        for part, module in getattr(head, subnet).named_children():
            name = f"head.{subnet}.{part}"
            if isinstance(module, nn.Conv2d):
                steps.append((name, module, None))
            elif isinstance(module, nn.ReLU):
                continue
            elif steps and steps[-1][2] is None:
                steps[-1] = (*steps[-1][:2], module)
            else:
                raise ValueError(f"layer {name}: export knows no {type(module).__name__} there")
        last = [(f"head.{part}", getattr(head, part), output) for part, output in predictions.items()]
        self._predict(steps, last, x, level, index)

    def _predict(
        self,
        steps: Sequence[tuple[str, Any, nn.Module | None]],
        last: Sequence[tuple[str, Any, str]],
        x: Value,
        level: str = "",
        index: int = 0,
    ) -> None:
        """Adds layers with their norms and ReLUs, then those that predict from them; ``last`` has each output's name.

        A layer runs once for each reader with another grid: the one before FCOS's box and centerness runs twice.
        """
        readers = [*([(name, module)] for name, module, _ in steps), [(name, module) for name, module, _ in last]]
        values = [
            self._requantize(x, self._quantized(module, name).input_quantizer, name, level)
            for name, module in readers[0]
        ]
        for (name, module, norm), following in zip(steps, readers[1:], strict=True):
            conv, source = self._quantized(module, name), values[0]
            sites = [self._site(reader, reader_name, level) for reader_name, reader in following]
            values = [
                self._conv(conv, name, source, site.name, site.grid, norm, relu=True, level=level, index=index)
                for site in sites
            ]
        for (name, module, output), source in zip(last, values, strict=True):
            self._conv(self._quantized(module, name), name, source, output, None, None, level=level, index=index)

    # --- parts ---

    @staticmethod
    def _quantized(module: Any, name: str) -> Any:
        return quantized_conv(module, name)

    def _site(self, module: Any, name: str, level: str = "") -> Value:
        """Returns the input of a convolution."""
        quantizer = self._quantized(module, name).input_quantizer
        site = f"{name}.input_quantizer"
        return Value(f"{site}@{level}" if level else site, grid_of(quantizer, site))

    def _operand(self, add: Any, key: str, name: str) -> Value:
        assert isinstance(add, QuantAdd)
        return Value(f"{name}.{key}", grid_of(getattr(add, key), f"{name}.{key}"))

    def _stream(self, stream: Any, name: str) -> Value:
        assert isinstance(stream, StreamQuantizer)
        grid = grid_of(stream.quantizer, f"{name}.quantizer")
        assert not (stream.relu and grid.signed), name
        return Value(f"{name}.quantizer", grid)

    def _requantize(self, x: Value, quantizer: Quantizer | None, name: str, level: str = "") -> Value:
        site = f"{name}.input_quantizer"
        target = Value(f"{site}@{level}" if level else site, grid_of(quantizer, site))
        check_reach(_largest(x.grid), target.grid, site)
        self.operations.append(Requantize(target.name, x.name, target.grid))
        return target

    def _add(self, x: Value, y: Value, target: Value, parent: nn.Module, name: str) -> Value:
        """Returns the sum that the module ``name`` of ``parent`` computes."""
        check_reach(_largest(x.grid) + _largest(y.grid), target.grid, target.name)
        multipliers, shift = choose_sum_scales((x.grid, y.grid), target.grid, target.name)
        self.operations.append(Add(target.name, (x.name, y.name), target.grid, multipliers, shift))
        if self.round_constants:
            owns = zip(multipliers, (x.grid, y.grid), strict=True)
            parent.add_module(
                name,
                ScaledAdd(parent.get_submodule(name), [m / 2**shift * target.grid.scale / g.scale for m, g in owns]),
            )
        return target

    def _weight(self, conv: Any, name: str) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Returns codes ``(O, C / groups, kH, kW)`` and scales ``(O,)`` of a weight."""
        quantizer = conv.weight_quantizer
        check_quantizer(quantizer, f"{name}.weight_quantizer")
        integers = quantizer.to_integer(conv.weight)
        same = torch.equal(integers.dequantize(), quantizer.fake_quantize(conv.weight).detach().float())
        if integers.zero_point != 0 or not same:
            raise ValueError(f"layer {name}.weight_quantizer: its integers do not give its weights back")
        scale = as_array(integers.scale).reshape(-1)
        if not integers.codes.any():
            largest = conv.weight.detach().abs().max().item()
            raise ValueError(
                f"layer {name}.weight_quantizer: its scale is {scale.min():g}, but no weight is larger than "
                f"{largest:.3g}: everything would become zero"
            )
        return integers.codes.cpu().numpy(), np.broadcast_to(scale, conv.out_channels).copy()

    def _conv(
        self,
        conv: Any,
        name: str,
        x: Value,
        output: str,
        grid: Grid | None,
        norm: nn.Module | None,
        *,
        relu: bool = False,
        level: str = "",
        index: int = 0,
        input_offset: NDArray[np.float64] | None = None,
        padding: tuple[int, int] | None = None,
    ) -> Value:
        """Folds a convolution and its norm, see :class:`~aqdet.export.program.Conv`."""
        if not (conv.activation in (None, F.relu, F.relu_, torch.relu) or isinstance(conv.activation, nn.ReLU)):
            raise ValueError(f"layer {name}: activation {conv.activation!r} has no integer form")
        relu = relu or conv.activation is not None
        if relu and grid is not None and grid.signed:
            raise ValueError(f"layer {name}: a ReLU stands before the signed quantizer {output}")
        codes, scale = self._weight(conv, name)
        multiplier, offset = norm_affine(norm, index, conv.out_channels, name)
        bias = np.zeros(conv.out_channels) if conv.bias is None else as_array(conv.bias)
        if input_offset is not None:
            bias = bias + input_offset
        bias = bias * multiplier + offset
        folded = fold(codes, scale * multiplier, bias, x.grid, grid, name)
        check_multiplier(folded["scale"].astype(np.float64) * x.grid.scale, grid, name)
        if grid is not None:
            total = np.abs(codes.astype(np.int64)).sum((1, 2, 3)) * np.abs(scale * multiplier) * x.grid.scale
            check_reach(float((total * largest_code(x.grid) + np.abs(bias)).max()), grid, output)
        if self.round_constants:
            rest = bias - folded["bias"] * folded["scale"].astype(np.float64) * x.grid.scale
            rest[folded["sign"] == 0] = 0
            lower_bias(conv, norm, index, rest, multiplier)
        self.operations.append(
            Conv(
                output=output,
                input=x.name,
                name=name,
                level=level,
                weight=codes.astype(np.int16),
                weight_bits=conv.weight_quantizer.spec.num_bits,
                **folded,
                stride=_pair(conv.stride),
                padding=_pair(conv.padding) if padding is None else padding,
                dilation=_pair(conv.dilation),
                groups=conv.groups,
                grid=grid,
            )
        )
        return Value(output, x.grid if grid is None else grid)


def _largest(grid: Grid) -> float:
    """Returns the largest magnitude on a grid."""
    return max(-grid.quant_min, grid.quant_max) * grid.scale


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, tuple) else (value, value)
    return int(first), int(second)
