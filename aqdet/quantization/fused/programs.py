"""The Triton programs, and how they are launched.

All arithmetic is float32 and rounds as PyTorch's: divisions to nearest, products and sums apart, halves to even. A
program works on a block of one row in the order of memory. A tensor with one scale is one row; one with a scale for
each index of its first axis has as many.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it to a float32 of magnitude below 2^22 rounds to an integer, half to even."""


@triton.jit
def _load(base, factor, shift, offset, mask, channel_size, num_channels, HAS_FACTOR: tl.constexpr, HAS_SHIFT: tl.constexpr):  # fmt: skip  # noqa: E501
    """Loads the values, or computes them from their recipe."""
    x = tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        channel = (offset // channel_size) % num_channels
        x = x * tl.load(factor + channel, mask=mask, other=0.0)
        x = x + tl.load(shift + channel, mask=mask, other=0.0)
    elif HAS_FACTOR:
        x = x * tl.load(factor)
    return x


@triton.jit
def _clamp(x, low, high):
    """Clamps and, as PyTorch does, passes NaN on."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round(x):
    """Rounds half to even; a zero has any sign."""
    return (x + _ROUND) - _ROUND


@triton.jit
def _forward(base, factor, shift, scale, out, row_size, channel_size, num_channels, LOW: tl.constexpr, HIGH: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SHIFT: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip  # noqa: E501
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = column < row_size
    offset = row * row_size + column
    step = tl.load(scale + row)
    x = _load(base, factor, shift, offset, mask, channel_size, num_channels, HAS_FACTOR, HAS_SHIFT)
    codes = _round(_clamp(tl.div_rn(x, step), LOW, HIGH))
    tl.store(out + offset, codes * step, mask=mask)


@triton.jit
def _backward(grad, base, factor, shift, scale, dx, sums, row_size, channel_size, num_channels, LOW: tl.constexpr, HIGH: tl.constexpr, IS_LSQ: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SHIFT: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip  # noqa: E501
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    column = block * SIZE + tl.arange(0, SIZE)
    mask = column < row_size
    offset = row * row_size + column
    step = tl.load(scale + row)
    x = _load(base, factor, shift, offset, mask, channel_size, num_channels, HAS_FACTOR, HAS_SHIFT)
    g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    ratio = tl.div_rn(x, step)
    is_outside = (ratio <= LOW) | (ratio >= HIGH)
    codes = _round(_clamp(ratio, LOW, HIGH))
    slope = tl.where(is_outside, codes, codes - ratio if IS_LSQ else codes * 0.0)
    tl.store(dx + offset, tl.where(is_outside, 0.0, g), mask=mask)
    total = tl.sum(tl.where(mask, slope * g, 0.0), axis=0)
    tl.store(sums + row * tl.num_programs(0) + block, total)


def _arguments(base: Tensor, factor: Tensor | None, shift: Tensor | None, scale: Tensor) -> tuple[int, int, int, int]:
    """Returns the number of rows, their size, and the size and number of channels in the order of memory."""
    rows = scale.numel()
    if shift is None:
        return rows, base.numel() // rows, 1, 1
    inner = 1 if base.stride(1) == 1 else base.stride(1)
    return rows, base.numel() // rows, inner, base.shape[1]


def quantize(base: Tensor, factor: Tensor | None, shift: Tensor | None, scale: Tensor, low: int, high: int, out: Tensor) -> None:  # fmt: skip  # noqa: E501
    """Writes the fake-quantized values to ``out``, which lies in memory as ``base``."""
    rows, size, inner, channels = _arguments(base, factor, shift, scale)
    if size:
        _forward[(triton.cdiv(size, BLOCK), rows)](
            base, factor, shift, scale, out, size, inner, channels,
            LOW=float(low), HIGH=float(high), HAS_FACTOR=factor is not None, HAS_SHIFT=shift is not None, SIZE=BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip


def gradients(grad: Tensor, base: Tensor, factor: Tensor | None, shift: Tensor | None, scale: Tensor, low: int, high: int, is_lsq: bool, dx: Tensor) -> Tensor:  # fmt: skip  # noqa: E501
    """Writes the input's gradient to ``dx``; returns the scale's, float32 of as many elements as the scale has."""
    rows, size, inner, channels = _arguments(base, factor, shift, scale)
    if not size:
        return scale.new_zeros(rows)
    blocks = triton.cdiv(size, BLOCK)
    sums = scale.new_empty(rows, blocks)
    _backward[(blocks, rows)](
        grad, base, factor, shift, scale, dx, sums, size, inner, channels,
        LOW=float(low), HIGH=float(high), IS_LSQ=is_lsq, HAS_FACTOR=factor is not None, HAS_SHIFT=shift is not None,
        SIZE=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return sums.double().sum(dim=1).float()
