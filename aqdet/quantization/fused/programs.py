"""The Triton programs of quantization, and how they are launched.

All arithmetic is float32 and rounds as PyTorch's: divisions to nearest, products and sums apart, halves to even. A
program works on a block of one row in the order of memory. A tensor with one scale is one row; one with a scale for
each index of its first axis has as many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
ROUNDINGS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Number by which a program knows the precision of an activation that it computes."""
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it to a float32 of magnitude below 2^22 rounds to an integer, half to even."""


@triton.jit
def rounded(x, ROUNDING: tl.constexpr):
    """Rounds to a precision of :data:`ROUNDINGS`."""
    if ROUNDING == 1:
        x = x.to(tl.float16).to(tl.float32)
    elif ROUNDING == 2:
        # By integers, half to even: Triton's interpreter cuts off.
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def store(place, offset, x, mask):
    """Stores float32 values in the precision of the place."""
    if place.dtype.element_ty == tl.bfloat16:
        x = rounded(x, 2)
    tl.store(place + offset, x, mask=mask)


@triton.jit
def _load(base, factor, shift, offset, mask, channel_size, num_channels, HAS_FACTOR: tl.constexpr, HAS_SHIFT: tl.constexpr, ROUNDING: tl.constexpr):  # fmt: skip  # noqa: E501
    """Loads the values, or computes them from their recipe."""
    x = tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        channel = (offset // channel_size) % num_channels
        x = x * tl.load(factor + channel, mask=mask, other=0.0)
        x = x + tl.load(shift + channel, mask=mask, other=0.0)
    elif HAS_FACTOR:
        x = x * tl.load(factor)
    return rounded(x, ROUNDING)


@triton.jit
def clamp(x, low, high):
    """Clamps and, as PyTorch does, passes NaN on."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def to_integer(x):
    """Rounds half to even; a zero has any sign."""
    return (x + _ROUND) - _ROUND


@triton.jit
def gradient_of(x, g, step, LOW: tl.constexpr, HIGH: tl.constexpr, IS_LSQ: tl.constexpr):
    """Returns the gradient of quantized values, and each one's part of the scale's."""
    ratio = tl.div_rn(x, step)
    is_outside = (ratio <= LOW) | (ratio >= HIGH)
    codes = to_integer(clamp(ratio, LOW, HIGH))
    slope = tl.where(is_outside, codes, codes - ratio if IS_LSQ else codes * 0.0)
    return tl.where(is_outside, 0.0, g), slope * g


@triton.jit
def _forward(base, factor, shift, scale, out, codes_out, region_out, row_size, channel_size, num_channels, LOW: tl.constexpr, HIGH: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SHIFT: tl.constexpr, ROUNDING: tl.constexpr, QUANTIZES: tl.constexpr, HAS_CODES: tl.constexpr, HAS_REGION: tl.constexpr, RELU: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip  # noqa: E501
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = column < row_size
    offset = row * row_size + column
    x = _load(base, factor, shift, offset, mask, channel_size, num_channels, HAS_FACTOR, HAS_SHIFT, ROUNDING)
    if QUANTIZES:
        step = tl.load(scale + row)
        ratio = tl.div_rn(x, step)
        codes = to_integer(clamp(ratio, LOW, HIGH))
        x = codes * step
        if HAS_CODES:
            tl.store(codes_out + offset, codes.to(tl.int32), mask=mask)
        if HAS_REGION:
            tl.store(region_out + offset, (ratio > LOW).to(tl.int32) + (ratio >= HIGH).to(tl.int32), mask=mask)
    if RELU:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    store(out, offset, x, mask)


@triton.jit
def _backward(grad, base, factor, shift, scale, dx, sums, row_size, channel_size, num_channels, LOW: tl.constexpr, HIGH: tl.constexpr, IS_LSQ: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SHIFT: tl.constexpr, ROUNDING: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip  # noqa: E501
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    column = block * SIZE + tl.arange(0, SIZE)
    mask = column < row_size
    offset = row * row_size + column
    x = _load(base, factor, shift, offset, mask, channel_size, num_channels, HAS_FACTOR, HAS_SHIFT, ROUNDING)
    g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    inner, product = gradient_of(x, g, tl.load(scale + row), LOW, HIGH, IS_LSQ)
    store(dx, offset, inner, mask)
    tl.store(sums + row * tl.num_programs(0) + block, tl.sum(tl.where(mask, product, 0.0), axis=0))


@triton.jit
def _region_backward(grad, region, dx, sums, row_size, LOW: tl.constexpr, HIGH: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    column = block * SIZE + tl.arange(0, SIZE)
    mask = column < row_size
    offset = row * row_size + column
    where = tl.load(region + offset, mask=mask, other=1)
    g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    store(dx, offset, tl.where(where == 1, g, 0.0), mask)
    product = tl.where(where == 1, 0.0, g * tl.where(where == 0, LOW, HIGH))
    tl.store(sums + row * tl.num_programs(0) + block, tl.sum(product, axis=0))


@triton.jit
def _sum_rows(parts, sums, size, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((SIZE,), dtype=tl.float64)
    for start in range(0, size, SIZE):
        column = start + tl.arange(0, SIZE)
        total += tl.load(parts + row * size + column, mask=column < size, other=0.0).to(tl.float64)
    tl.store(sums + row, tl.sum(total, axis=0).to(tl.float32))


def sum_rows(parts: Tensor) -> Tensor:
    """Sums ``(rows, n)`` float32 over each row, in float64."""
    sums = parts.new_empty(len(parts))
    _sum_rows[(len(parts),)](parts, sums, parts.shape[1], SIZE=BLOCK)
    return sums


def _arguments(base: Tensor, shift: Tensor | None, rows: int) -> tuple[int, int, int]:
    """Returns the size of a row, and the size and number of channels in the order of memory."""
    if shift is None:
        return base.numel() // rows, 1, 1
    inner = 1 if base.stride(1) == 1 else base.stride(1)
    return base.numel() // rows, inner, base.shape[1]


def quantize(base: Tensor, factor: Tensor | None, shift: Tensor | None, x_dtype: torch.dtype, scale: Tensor | None, low: int, high: int, out: Tensor, codes: Tensor | None = None, region: Tensor | None = None, relu: bool = False) -> None:  # fmt: skip  # noqa: E501
    """Writes the fake-quantized values to ``out``, which lies in memory as ``base``, and codes and regions if asked to.

    Without a scale the values are those of the recipe themselves, after a ReLU if ``relu``.
    """
    rows = 1 if scale is None else scale.numel()
    size, inner, channels = _arguments(base, shift, rows)
    if size:
        _forward[(triton.cdiv(size, BLOCK), rows)](
            base, factor, shift, scale, out, codes, region, size, inner, channels,
            LOW=float(low), HIGH=float(high), HAS_FACTOR=factor is not None, HAS_SHIFT=shift is not None,
            ROUNDING=ROUNDINGS[x_dtype], QUANTIZES=scale is not None, HAS_CODES=codes is not None,
            HAS_REGION=region is not None, RELU=relu, SIZE=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip


def gradients(grad: Tensor, base: Tensor, factor: Tensor | None, shift: Tensor | None, x_dtype: torch.dtype, scale: Tensor, low: int, high: int, is_lsq: bool, dx: Tensor) -> Tensor:  # fmt: skip  # noqa: E501
    """Writes the input's gradient to ``dx``; returns the scale's, float32 of as many elements as the scale has."""
    rows = scale.numel()
    size, inner, channels = _arguments(base, shift, rows)
    if not size:
        return scale.new_zeros(rows)
    blocks = triton.cdiv(size, BLOCK)
    sums = scale.new_empty(rows, blocks)
    _backward[(blocks, rows)](
        grad, base, factor, shift, scale, dx, sums, size, inner, channels,
        LOW=float(low), HIGH=float(high), IS_LSQ=is_lsq, HAS_FACTOR=factor is not None, HAS_SHIFT=shift is not None,
        ROUNDING=ROUNDINGS[x_dtype], SIZE=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return sum_rows(sums)


def region_gradients(grad: Tensor, region: Tensor, scale: Tensor, low: int, high: int, dx: Tensor) -> Tensor:
    """Writes PACT's gradient of the input to ``dx``; returns the scale's."""
    rows = scale.numel()
    size = region.numel() // rows
    if not size:
        return scale.new_zeros(rows)
    blocks = triton.cdiv(size, BLOCK)
    sums = scale.new_empty(rows, blocks)
    _region_backward[(blocks, rows)](
        grad, region, dx, sums, size, LOW=float(low), HIGH=float(high), SIZE=BLOCK, enable_fp_fusion=False
    )
    return sum_rows(sums)
