"""From the modules of a trained detector to its integer program."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import QuantAdd, QuantConv2d, StreamQuantizer
from ..modeling import QuantFCOS, QuantFPN, QuantRetinaNet
from ..modeling.backbone import QuantBasicBlock, QuantBottleneckBlock, QuantLastLevelP6P7, QuantStem
from ..quantization import Quantizer
from .containers import INT8_LIMIT, PAIR_LIMIT
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

UNIFORM = ("dorefa", "lsq", "lsqplus", "pact")
"""Methods whose integers an affine conversion reproduces."""
_NOT_UNIFORM = {
    "lqnet": "has levels that are no multiples of one step",
    "n2uq": "compares with learned thresholds, so that its codes are not round(x / scale)",
}
INT32_LIMIT = 2**31 - 1
# A channel whose convolution moves the output by less than this share of a code is its bias.
NEGLIGIBLE = 2.0**-10
_CONSTANT_UNITS = 2**16


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value of the program under construction."""

    name: str
    grid: Grid


def extract(model: nn.Module) -> Program:
    """The integer program of a detector.

    Args:
        model: a calibrated :class:`~aqdet.modeling.QuantRetinaNet` or :class:`~aqdet.modeling.QuantFCOS`; its
            auxiliary path, if any, is not looked at.

    Raises:
        ValueError: in one line that names the layer, if it cannot run on integers: one left in float, not
            calibrated, switched off, of a method that is not uniform, with a norm that does not fold.
    """
    if not isinstance(model, QuantRetinaNet | QuantFCOS):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE must be QuantRetinaNet or QuantFCOS for export, got {type(model).__name__}"
        )
    return _Extractor().detector(model)


def with_rounded_biases(model: nn.Module) -> nn.Module:
    """A copy of a detector whose biases are what int32 makes of them, and which is otherwise the same.

    A bias is moved by at most half a unit of its convolution's sum, through the norm's running mean. Between
    this model and the program only float32's own rounding is left, so that the two can be compared closely.
    """
    model = copy.deepcopy(model)
    _Extractor(round_biases=True).detector(model)
    return model


def grid_of(quantizer: Quantizer | None, path: str) -> Grid:
    """The grid of an activation.

    Raises:
        ValueError: in one line, if there is none that integers can be on.
    """
    if quantizer is None:
        raise ValueError(f"layer {path} is not quantized: the model was built with MODEL.QUANT.ENABLED False")
    _check_quantizer(quantizer, path)
    grid = quantizer.grid()
    if grid is None or grid.scale.numel() != 1:
        raise ValueError(f"layer {path}: {quantizer.spec.quantizer!r} has no single uniform grid, so no integer form")
    scale = float(grid.scale.detach())
    if not np.isfinite(scale) or scale <= 0:
        raise ValueError(f"layer {path}: its scale must be positive and finite, got {scale}")
    return Grid(scale, grid.quant_min, grid.quant_max)


def _check_quantizer(quantizer: Quantizer, path: str) -> None:
    method = quantizer.spec.quantizer
    if method not in UNIFORM:
        reason = _NOT_UNIFORM.get(method, "is not known to be uniform")
        raise ValueError(
            f"layer {path}: quantizer {method!r} {reason}, and has no integer form here: train the layer with "
            f"{', '.join(UNIFORM[:-1])} or {UNIFORM[-1]} to export it (MODEL.QUANT, or a rule of MODEL.QUANT.RULES)"
        )
    if not quantizer.enabled:
        raise ValueError(f"layer {path}: its quantizer is switched off (aqdet.quantization.set_quantization)")
    if not quantizer.is_active:
        raise ValueError(
            f"layer {path}: its quantizer is not calibrated: MODEL.WEIGHTS must be a checkpoint of quantized training"
        )


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().double().numpy()


def _norm_affine(norm: nn.Module | None, level: int, channels: int, path: str) -> tuple[NDArray, NDArray]:
    """Multiplier and offset of a norm at evaluation, ``(O,)`` each, in float64."""
    multiplier, offset = np.ones(channels), np.zeros(channels)
    if norm is None:
        return multiplier, offset
    statistics: Any = norm[level] if isinstance(norm, CycleBatchNormList) else norm
    mean, variance = (getattr(statistics, key, None) for key in ("running_mean", "running_var"))
    known = isinstance(statistics, _BatchNorm | FrozenBatchNorm2d)
    if not (known and isinstance(mean, Tensor) and isinstance(variance, Tensor)):
        raise ValueError(f"layer {path}: norm {type(norm).__name__} does not fold into integers, use BN")
    multiplier = 1 / np.sqrt(_array(variance) + statistics.eps)
    offset = -_array(mean) * multiplier
    for affine in (statistics, norm) if norm is not statistics else (norm,):
        weight, bias = (getattr(affine, key, None) for key in ("weight", "bias"))
        if isinstance(weight, Tensor) and isinstance(bias, Tensor):
            multiplier, offset = multiplier * _array(weight), offset * _array(weight) + _array(bias)
    return multiplier, offset


@torch.no_grad()
def _lower_bias(
    conv: QuantConv2d, norm: Any, level: int, amount: NDArray[np.float64], multiplier: NDArray[np.float64]
) -> None:
    """Lowers the output of a convolution and its norm by ``amount``, ``(O,)``."""
    if norm is not None:
        mean = (norm[level] if isinstance(norm, CycleBatchNormList) else norm).running_mean
        change = np.divide(amount, multiplier, out=np.zeros_like(amount), where=amount != 0)
        mean.copy_(torch.from_numpy(_array(mean) + change))
    elif conv.bias is not None:
        conv.bias.copy_(torch.from_numpy(_array(conv.bias) - amount))


class _Extractor:
    """Walks the modules in the order in which they run."""

    def __init__(self, round_biases: bool = False) -> None:
        self.operations: list[Operation] = []
        self.round_biases = round_biases

    def detector(self, model: Any) -> Program:
        image = self._image_grid(model)
        levels = self._fpn(model.backbone, self._stem_input(model, image))
        towers = {"cls_subnet": {"cls_score": "logits"}, "bbox_subnet": {"bbox_pred": "deltas"}}
        if isinstance(model, QuantFCOS):
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
        if not isinstance(stem, QuantStem):
            raise ValueError(f"layer backbone.bottom_up.stem: export knows QuantStem, not {type(stem).__name__}")
        mean = tuple(model.pixel_mean.flatten().tolist())
        values = tuple(min(max(round(value), 0), 255) for value in mean)
        vertical, horizontal = stem.conv1.padding
        self.operations.append(PadImage("image_padded", IMAGE, (vertical, horizontal), values, mean))
        return self._stem(stem, "backbone.bottom_up.stem", _Value("image_padded", grid), mean)

    def _stem(self, stem: Any, path: str, x: _Value, mean: Sequence[float]) -> _Value:
        target = self._stream(stem.output_stream, f"{path}.output_stream")
        name = f"{path}.conv1.output"
        conv = self._quantized(stem.conv1, f"{path}.conv1")
        if conv.input_quantizer is not None:
            raise ValueError(f"layer {path}.conv1: the stem reads the uint8 image and has no input quantizer")
        # sum((pixel - mean) * weight), with the mean moved into the bias.
        codes, scale = self._weight(conv, f"{path}.conv1")
        shift = -(codes.sum((2, 3)) @ np.array(mean)) * scale * x.grid.scale
        y = self._conv(
            conv, f"{path}.conv1", x, name, target.grid, conv.norm, relu=True, input_offset=shift, padding=(0, 0)
        )
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
        return self._add(branch, x, self._stream(block.output_stream, f"{path}.output_stream"))

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
                merged = self._add(merged, _Value(top_down, previous.grid), stream)
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
        """One subnet and the convolutions that predict from it, name to output, at one level.

        A convolution runs once for each that reads it, whose grids differ: before FCOS's box and centerness twice.
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
        """The input of a convolution."""
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
        self.operations.append(Requantize(target.name, x.name, target.grid))
        return target

    def _add(self, x: _Value, y: _Value, target: _Value) -> _Value:
        self.operations.append(Add(target.name, (x.name, y.name), target.grid))
        return target

    def _weight(self, conv: QuantConv2d, path: str) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Codes ``(O, C / groups, kH, kW)`` and scales ``(O,)`` of a weight."""
        quantizer = conv.weight_quantizer
        _check_quantizer(quantizer, f"{path}.weight_quantizer")
        integers = quantizer.to_integer(conv.weight)
        same = torch.equal(integers.dequantize(), quantizer.fake_quantize(conv.weight).detach().float())
        if integers.zero_point != 0 or not same:
            raise ValueError(f"layer {path}.weight_quantizer: its integers do not give its weights back")
        scale = _array(integers.scale).reshape(-1)
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
        multiplier, offset = _norm_affine(norm, index, conv.out_channels, path)
        bias = np.zeros(conv.out_channels) if conv.bias is None else _array(conv.bias)
        if input_offset is not None:
            bias = bias + input_offset
        bias = bias * multiplier + offset
        folded = _fold(codes, scale * multiplier, bias, x.grid, grid, path)
        if self.round_biases:
            rest = bias - folded["bias"] * folded["scale"].astype(np.float64) * x.grid.scale
            rest[folded["sign"] == 0] = 0
            _lower_bias(conv, norm, index, rest, multiplier)
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


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, tuple) else (value, value)
    return int(first), int(second)


def _fold(
    codes: NDArray[np.int32],
    weight_scale: NDArray[np.float64],
    bias: NDArray[np.float64],
    source: Grid,
    target: Grid | None,
    path: str,
) -> dict[str, NDArray]:
    """``sign``, ``multiple``, ``scale`` and ``bias`` of a convolution whose output is ``sums * weight_scale + bias``.

    Args:
        codes: ``(O, C / groups, kH, kW)``.
        weight_scale: ``(O,)``, of any sign, norm included.
        bias: ``(O,)``, in real units.
        source, target: grids of input and output.
        path: for messages.

    Raises:
        ValueError: if a bias does not fit in int32.
    """
    if not (np.isfinite(weight_scale).all() and np.isfinite(bias).all()):
        raise ValueError(f"layer {path}: its weights or its norm's parameters are not finite")
    channels = len(codes)
    flat = np.abs(codes.astype(np.int64)).reshape(channels, -1)
    largest, total = flat.max(1), flat.sum(1)
    code = largest_code(source)
    sign = np.sign(weight_scale).astype(np.int8)
    multiple = np.ones(channels, np.int16)
    scale = np.abs(weight_scale).astype(np.float32)
    integer_bias = np.zeros(channels, np.int64)
    for c in range(channels):
        most = min(INT8_LIMIT // max(largest[c], 1), PAIR_LIMIT // (2 * code * max(largest[c], 1)))
        for candidate in (max(int(most), 1), 1):
            multiple[c] = candidate
            scale[c] = np.abs(weight_scale[c]) / candidate
            unit = float(scale[c]) * source.scale
            reach = 2 * float(total[c]) * candidate * code
            if unit > np.finfo(np.float32).tiny and abs(bias[c]) / unit + reach <= INT32_LIMIT:
                integer_bias[c] = round(bias[c] / unit)
                break
        else:
            # Tiny or zero multiplier: the convolution moves nothing, or the bias saturates the output.
            step = 1.0 if target is None else target.scale
            moves = abs(weight_scale[c]) * source.scale * float(total[c]) * code / step
            beyond = target is not None and abs(bias[c]) / step - moves > target.quant_max - target.quant_min + 1
            if target is None or not (moves < NEGLIGIBLE or beyond):
                raise ValueError(
                    f"layer {path}: the bias of channel {c} needs more than 32 bits beside its batch norm's "
                    f"multiplier ({bias[c]:.3g} and {weight_scale[c]:.3g}): train on, or prune the channel"
                )
            sign[c], multiple[c] = 0, 1
            scale[c] = step / source.scale / _CONSTANT_UNITS
            unit = float(scale[c]) * source.scale
            integer_bias[c] = round(min(max(bias[c] / unit, -(2**30)), 2**30))
    return {"sign": sign, "multiple": multiple, "scale": scale, "bias": integer_bias.astype(np.int32)}
