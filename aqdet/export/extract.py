"""Extraction of the integer program from the modules of a trained detector."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..layers import QuantAdd, QuantConv2d, StreamQuantizer
from ..modeling import QuantFCOS, QuantFPN, QuantRetinaNet
from ..modeling.backbone import QuantLastLevelP6P7
from ..modeling.blocks import QuantBasicBlock, QuantBottleneckBlock, QuantSimpleStem, QuantStem
from ..quantization import Quantizer
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
from .sums import choose_sum_scales


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value of the program under construction."""

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
    return _Extractor().detector(model)


def with_rounded_constants(model: nn.Module) -> nn.Module:
    """Returns a copy of a detector with the constants that ship, otherwise the same.

    Each bias is rounded as in int32, by a change of the norm's running mean: it moves by at most half a unit of its
    convolution's sum. Each sum has the scales of :mod:`~aqdet.export.sums`. This model and the program then differ by
    float32's own rounding alone, so that they can be compared closely.
    """
    model = copy.deepcopy(model)
    _Extractor(round_constants=True).detector(model)
    return model


class ScaledAdd(QuantAdd):
    """A quantized sum whose operands are multiplied by constants near 1 after their quantizers.

    Args:
        add: The sum, whose quantizers are taken over.
        gains: The constants of the two operands.
    """

    def __init__(self, add: nn.Module, gains: Sequence[float]) -> None:
        assert isinstance(add, QuantAdd)
        super().__init__(signed=add.signed)
        self.x_quantizer, self.y_quantizer, self.gains = add.x_quantizer, add.y_quantizer, gains

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the sum of two tensors of one shape."""
        x = x if self.x_quantizer is None else self.x_quantizer(x)
        y = y if self.y_quantizer is None else self.y_quantizer(y)
        return x * self.gains[0] + y * self.gains[1]


class _Extractor:
    """Walks the modules in the order in which they run."""

    def __init__(self, round_constants: bool = False) -> None:
        self.operations: list[Operation] = []
        self.round_constants = round_constants

    def detector(self, model: Any) -> Program:
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

    def _stem_input(self, model: Any, grid: Grid) -> _Value:
        stem = model.backbone.bottom_up.stem
        if not isinstance(stem, QuantStem | QuantSimpleStem):
            raise ValueError(f"layer backbone.bottom_up.stem: export knows no {type(stem).__name__}")
        mean = tuple(model.pixel_mean.flatten().tolist())
        values = tuple(min(max(round(value), 0), 255) for value in mean)
        vertical, horizontal = stem.conv1.padding
        self.operations.append(PadImage("image_padded", IMAGE, (vertical, horizontal), values, mean))
        return self._stem(stem, "backbone.bottom_up.stem", _Value("image_padded", grid), mean)

    def _stem(self, stem: Any, path: str, x: _Value, mean: Sequence[float]) -> _Value:
        target = self._stream(stem.output_stream, f"{path}.output_stream")
        pooled = isinstance(stem, QuantStem)
        name = f"{path}.conv1.output" if pooled else target.name
        conv = self._quantized(stem.conv1, f"{path}.conv1")
        if conv.input_quantizer is not None:
            raise ValueError(f"layer {path}.conv1: the stem reads the uint8 image and has no input quantizer")
        # The sum of (pixel - mean) * weight, with the mean moved into the bias.
        codes, scale = self._weight(conv, f"{path}.conv1")
        shift = -(codes.sum((2, 3)) @ np.array(mean)) * scale * x.grid.scale
        y = self._conv(
            conv, f"{path}.conv1", x, name, target.grid, conv.norm, relu=True, input_offset=shift, padding=(0, 0)
        )
        if pooled:
            self.operations.append(MaxPool(target.name, y.name, kernel=3, stride=2, padding=1))
        return target

    def _resnet(self, resnet: Any, path: str, x: _Value) -> dict[str, _Value]:
        features = {}
        for name in resnet.stage_names:
            for index, block in enumerate(getattr(resnet, name)):
                x = self._block(block, f"{path}.{name}.{index}", x)
            features[name] = x
        return features

    def _block(self, block: Any, path: str, x: _Value) -> _Value:
        if not isinstance(block, QuantBasicBlock | QuantBottleneckBlock):
            raise ValueError(f"layer {path}: export knows no {type(block).__name__}")
        names = ["conv1", "conv2"] + ["conv3"] * isinstance(block, QuantBottleneckBlock)
        add = block.residual_add
        branch = x
        for name, following in zip(names, [*names[1:], ""], strict=True):
            conv = self._quantized(getattr(block, name), f"{path}.{name}")
            if branch is x:
                branch = self._requantize(x, conv.input_quantizer, f"{path}.{name}")
            target = (
                self._site(getattr(block, following), f"{path}.{following}")
                if following
                else self._operand(add, "x_quantizer", f"{path}.residual_add")
            )
            branch = self._conv(
                conv, f"{path}.{name}", branch, target.name, target.grid, conv.norm, relu=bool(following)
            )
        if block.shortcut is not None:
            shortcut = self._quantized(block.shortcut, f"{path}.shortcut")
            operand = self._operand(add, "y_quantizer", f"{path}.residual_add")
            source = self._requantize(x, shortcut.input_quantizer, f"{path}.shortcut")
            x = self._conv(shortcut, f"{path}.shortcut", source, operand.name, operand.grid, shortcut.norm)
        return self._add(branch, x, self._stream(block.output_stream, f"{path}.output_stream"), block, "residual_add")

    # --- pyramid ---

    def _fpn(self, fpn: Any, x: _Value) -> dict[str, _Value]:
        if not isinstance(fpn, QuantFPN):
            raise ValueError(f"layer backbone: export knows QuantFPN, not {type(fpn).__name__}")
        bottom_up = self._resnet(fpn.bottom_up, "backbone.bottom_up", x)
        levels: dict[str, _Value] = {}
        previous: _Value | None = None
        for level, feature in zip(reversed(fpn._levels), reversed(fpn.in_features), strict=True):
            path = f"backbone.fpn_lateral{level}"
            stream = self._stream(getattr(fpn, f"fpn_sum{level}"), f"backbone.fpn_sum{level}")
            lateral = self._quantized(getattr(fpn, f"fpn_lateral{level}"), path)
            source = self._requantize(bottom_up[feature], lateral.input_quantizer, path)
            target = stream
            if previous is not None:
                target = self._operand(getattr(fpn, f"fpn_add{level}"), "x_quantizer", f"backbone.fpn_add{level}")
            merged = self._conv(lateral, path, source, target.name, target.grid, lateral.norm)
            if previous is not None:
                top_down = f"backbone.fpn_top_down{level}"
                self.operations.append(Upsample(top_down, previous.name))
                merged = self._add(merged, _Value(top_down, previous.grid), stream, fpn, f"fpn_add{level}")
            previous = merged
            path = f"backbone.fpn_output{level}"
            output = self._stream(getattr(fpn, f"p{level}_stream"), f"backbone.p{level}_stream")
            levels[f"p{level}"] = self._level(getattr(fpn, f"fpn_output{level}"), path, previous, output)
        if fpn.top_block is not None:
            self._top_block(fpn.top_block, {**bottom_up, **levels}, fpn._levels[-1] + 1, levels)
        return levels

    def _top_block(self, block: Any, sources: dict[str, _Value], first: int, levels: dict[str, _Value]) -> None:
        if not isinstance(block, QuantLastLevelP6P7):
            raise ValueError(f"layer backbone.top_block: export knows no {type(block).__name__}")
        x = sources[block.in_feature]
        for number, name in enumerate(("p6", "p7"), first):
            path = f"backbone.top_block.{name}"
            output = self._stream(getattr(block, f"{name}_stream"), f"backbone.top_block.{name}_stream")
            x = self._level(getattr(block, name), path, x, output)
            levels[f"p{number}"] = x

    def _level(self, module: nn.Module, path: str, x: _Value, output: _Value) -> _Value:
        conv = self._quantized(module, path)
        source = self._requantize(x, conv.input_quantizer, path)
        return self._conv(conv, path, source, output.name, output.grid, conv.norm)

    # --- head ---

    def _tower(self, head: Any, subnet: str, predictions: dict[str, str], x: _Value, index: int, level: str) -> None:
        """Adds one subnet and the convolutions that predict from it, name -> output, at one level.

        A convolution runs once for each reader with another grid: the one before FCOS's box and centerness runs twice.
        """
        steps: list[tuple[str, nn.Module, nn.Module | None]] = []
        for name, module in getattr(head, subnet).named_children():
            path = f"head.{subnet}.{name}"
            if isinstance(module, nn.Conv2d):
                steps.append((path, module, None))
            elif isinstance(module, nn.ReLU):
                continue
            elif steps and steps[-1][2] is None:
                steps[-1] = (*steps[-1][:2], module)
            else:
                raise ValueError(f"layer {path}: export knows no {type(module).__name__} there")
        last = [(f"head.{name}", getattr(head, name)) for name in predictions]
        readers = [*([(path, module)] for path, module, _ in steps), last]
        values = [
            self._requantize(x, self._quantized(module, path).input_quantizer, path, level)
            for path, module in readers[0]
        ]
        for (path, module, norm), following in zip(steps, readers[1:], strict=True):
            conv, source = self._quantized(module, path), values[0]
            sites = [self._site(reader, reader_path, level) for reader_path, reader in following]
            values = [
                self._conv(conv, path, source, site.name, site.grid, norm, relu=True, level=level, index=index)
                for site in sites
            ]
        for (path, module), source, output in zip(last, values, predictions.values(), strict=True):
            self._conv(self._quantized(module, path), path, source, output, None, None, level=level, index=index)

    # --- parts ---

    def _quantized(self, module: nn.Module, path: str) -> QuantConv2d:
        if not isinstance(module, QuantConv2d):
            raise ValueError(
                f"layer {path} is in float ({type(module).__name__}): MODEL.QUANT.ENABLED must be True, and no "
                "MODEL.QUANT.RULES may leave it out, for a detector that runs on integers"
            )
        return module

    def _site(self, module: nn.Module, path: str, level: str = "") -> _Value:
        """Returns the input of a convolution."""
        quantizer = self._quantized(module, path).input_quantizer
        name = f"{path}.input_quantizer"
        return _Value(f"{name}@{level}" if level else name, grid_of(quantizer, name))

    def _operand(self, add: Any, key: str, path: str) -> _Value:
        assert isinstance(add, QuantAdd)
        return _Value(f"{path}.{key}", grid_of(getattr(add, key), f"{path}.{key}"))

    def _stream(self, stream: Any, path: str) -> _Value:
        assert isinstance(stream, StreamQuantizer)
        grid = grid_of(stream.quantizer, f"{path}.quantizer")
        assert not (stream.relu and grid.signed), path
        return _Value(f"{path}.quantizer", grid)

    def _requantize(self, x: _Value, quantizer: Quantizer | None, path: str, level: str = "") -> _Value:
        name = f"{path}.input_quantizer"
        target = _Value(f"{name}@{level}" if level else name, grid_of(quantizer, name))
        check_reach(_largest(x.grid), target.grid, name)
        self.operations.append(Requantize(target.name, x.name, target.grid))
        return target

    def _add(self, x: _Value, y: _Value, target: _Value, parent: nn.Module, name: str) -> _Value:
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

    def _weight(self, conv: QuantConv2d, path: str) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Returns codes ``(O, C / groups, kH, kW)`` and scales ``(O,)`` of a weight."""
        quantizer = conv.weight_quantizer
        check_quantizer(quantizer, f"{path}.weight_quantizer")
        integers = quantizer.to_integer(conv.weight)
        same = torch.equal(integers.dequantize(), quantizer.fake_quantize(conv.weight).detach().float())
        if integers.zero_point != 0 or not same:
            raise ValueError(f"layer {path}.weight_quantizer: its integers do not give its weights back")
        scale = as_array(integers.scale).reshape(-1)
        if not integers.codes.any():
            largest = conv.weight.detach().abs().max().item()
            raise ValueError(
                f"layer {path}.weight_quantizer: its scale is {scale.min():g}, but no weight is larger than "
                f"{largest:.3g}: everything would become zero"
            )
        return integers.codes.cpu().numpy(), np.broadcast_to(scale, conv.out_channels).copy()

    def _conv(
        self,
        conv: QuantConv2d,
        path: str,
        x: _Value,
        output: str,
        grid: Grid | None,
        norm: nn.Module | None,
        *,
        relu: bool = False,
        level: str = "",
        index: int = 0,
        input_offset: NDArray[np.float64] | None = None,
        padding: tuple[int, int] | None = None,
    ) -> _Value:
        """Folds a convolution and its norm, see :class:`~aqdet.export.program.Conv`."""
        if conv.activation not in (None, F.relu, F.relu_, torch.relu):
            raise ValueError(f"layer {path}: activation {conv.activation!r} has no integer form")
        relu = relu or conv.activation is not None
        if relu and grid is not None and grid.signed:
            raise ValueError(f"layer {path}: a ReLU stands before the signed quantizer {output}")
        codes, scale = self._weight(conv, path)
        multiplier, offset = norm_affine(norm, index, conv.out_channels, path)
        bias = np.zeros(conv.out_channels) if conv.bias is None else as_array(conv.bias)
        if input_offset is not None:
            bias = bias + input_offset
        bias = bias * multiplier + offset
        folded = fold(codes, scale * multiplier, bias, x.grid, grid, path)
        check_multiplier(folded["scale"].astype(np.float64) * x.grid.scale, grid, path)
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
                path=path,
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
        return _Value(output, x.grid if grid is None else grid)


def _largest(grid: Grid) -> float:
    """Returns the largest magnitude on a grid."""
    return max(-grid.quant_min, grid.quant_max) * grid.scale


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, tuple) else (value, value)
    return int(first), int(second)
