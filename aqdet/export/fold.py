"""Folding of a convolution and its norm into integers: codes, a multiplier for each channel and an int32 bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import QuantConv2d
from .int8_weights import INT8_LIMIT, PAIR_LIMIT
from .program import Grid, largest_code

INT32_LIMIT = 2**31 - 1
# A channel is replaced by its bias if the convolution moves its output by less than this share of a code.
NEGLIGIBLE = 2.0**-10
_CONSTANT_UNITS = 2**16


def as_array(tensor: Tensor) -> NDArray[np.float64]:
    """Copies a tensor into an array of float64."""
    return tensor.detach().cpu().double().numpy()


def norm_affine(norm: nn.Module | None, level: int, channels: int, name: str) -> tuple[NDArray, NDArray]:
    """Returns the multiplier and the offset of a norm at evaluation, ``(O,)`` each, in float64."""
    multiplier, offset = np.ones(channels), np.zeros(channels)
    if norm is None:
        return multiplier, offset
    statistics: Any = norm[level] if isinstance(norm, CycleBatchNormList) else norm
    mean, variance = (getattr(statistics, key, None) for key in ("running_mean", "running_var"))
    known = isinstance(statistics, _BatchNorm | FrozenBatchNorm2d)
    if not (known and isinstance(mean, Tensor) and isinstance(variance, Tensor)):
        raise ValueError(f"layer {name}: norm {type(norm).__name__} does not fold into integers, use BN")
    multiplier = 1 / np.sqrt(as_array(variance) + statistics.eps)
    offset = -as_array(mean) * multiplier
    for affine in (statistics, norm) if norm is not statistics else (norm,):
        weight, bias = (getattr(affine, key, None) for key in ("weight", "bias"))
        if isinstance(weight, Tensor) and isinstance(bias, Tensor):
            multiplier, offset = multiplier * as_array(weight), offset * as_array(weight) + as_array(bias)
    return multiplier, offset


@torch.no_grad()
def lower_bias(
    conv: QuantConv2d, norm: Any, level: int, amount: NDArray[np.float64], multiplier: NDArray[np.float64]
) -> None:
    """Lowers the output of a convolution and its norm by ``amount``, ``(O,)``."""
    if norm is not None:
        mean = (norm[level] if isinstance(norm, CycleBatchNormList) else norm).running_mean
        change = np.divide(amount, multiplier, out=np.zeros_like(amount), where=amount != 0)
        mean.copy_(torch.from_numpy(as_array(mean) + change))
    elif conv.bias is not None:
        conv.bias.copy_(torch.from_numpy(as_array(conv.bias) - amount))


def fold(
    codes: NDArray[np.int32],
    weight_scale: NDArray[np.float64],
    bias: NDArray[np.float64],
    source: Grid,
    target: Grid | None,
    name: str,
) -> dict[str, NDArray]:
    """Folds a convolution, ``sums * weight_scale + bias``, into ``sign``, ``multiple``, ``scale`` and ``bias``.

    Args:
        codes: ``(O, C / groups, kH, kW)``.
        weight_scale: ``(O,)``, of any sign, with the norm's multiplier.
        bias: ``(O,)``, in real units.
        source, target: Grids of input and output.
        name: The layer's name for messages.

    Raises:
        ValueError: If a bias does not fit in int32.
    """
    if not (np.isfinite(weight_scale).all() and np.isfinite(bias).all()):
        raise ValueError(f"layer {name}: its weights or its norm's parameters are not finite")
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
            # With a tiny or zero multiplier the convolution moves nothing, or the bias saturates the output.
            step = 1.0 if target is None else target.scale
            moves = abs(weight_scale[c]) * source.scale * float(total[c]) * code / step
            beyond = target is not None and abs(bias[c]) / step - moves > target.quant_max - target.quant_min + 1
            if target is None or not (moves < NEGLIGIBLE or beyond):
                raise ValueError(
                    f"layer {name}: the bias of channel {c} needs more than 32 bits beside its batch norm's "
                    f"multiplier ({bias[c]:.3g} and {weight_scale[c]:.3g}): train on, or prune the channel"
                )
            sign[c], multiple[c] = 0, 1
            scale[c] = step / source.scale / _CONSTANT_UNITS
            unit = float(scale[c]) * source.scale
            integer_bias[c] = round(min(max(bias[c] / unit, -(2**30)), 2**30))
    return {"sign": sign, "multiple": multiple, "scale": scale, "bias": integer_bias.astype(np.int32)}
