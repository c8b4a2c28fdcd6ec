"""The Triton programs of batch norm with a quantizer behind it, and how they are launched.

A program of the backward works on a tile of positions and channels, for which the numbers of a channel are read once.
Arithmetic is that of :mod:`.programs`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .programs import BLOCK, ROUNDINGS, gradient_of, rounded, store

CHANNELS = 32
POSITIONS = 128
"""What follows a norm, in ``MODE``: 0 nothing, 1 a ReLU, 2 a quantizer with LSQ's gradient, 3 one with PACT's."""


@triton.jit
def _tile(inner, num_channels, num_positions, IS_LAST: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """Returns channels, offsets in memory and which of them there are."""
    position = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    mask = (position < num_positions)[:, None] & (channel < num_channels)[None, :]
    if IS_LAST:
        offset = position[:, None] * num_channels + channel[None, :]
    else:
        image = position // inner
        offset = (image * num_channels * inner + position % inner)[:, None] + channel[None, :] * inner
    return channel, offset, mask


@triton.jit
def _read(grad, x, scale, shift, mean, inverse, step, channel, offset, mask, num_channels, LOW: tl.constexpr, HIGH: tl.constexpr, MODE: tl.constexpr, ROUNDING: tl.constexpr):  # fmt: skip  # noqa: E501
    """Returns the gradient of the norm's output, the normalized input, and each part of the scale's gradient."""
    here = channel < num_channels
    z = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    centre = tl.load(mean + channel, mask=here, other=0.0)[None, :]
    width = tl.load(inverse + channel, mask=here, other=0.0)[None, :]
    product = g * 0.0
    if MODE != 0:
        y = z * tl.load(scale + channel, mask=here, other=0.0)[None, :]
        y = rounded(y + tl.load(shift + channel, mask=here, other=0.0)[None, :], ROUNDING)
        if MODE == 1:
            g = tl.where(y <= 0.0, 0.0, g)
        else:
            g, product = gradient_of(y, g, tl.load(step), LOW, HIGH, MODE == 2)
        g = rounded(g, ROUNDING)
    return g, (z - centre) * width, product


@triton.jit
def _sums(grad, x, scale, shift, mean, inverse, step, parts, steps, inner, num_channels, num_positions, LOW: tl.constexpr, HIGH: tl.constexpr, MODE: tl.constexpr, ROUNDING: tl.constexpr, IS_LAST: tl.constexpr, P: tl.constexpr, C: tl.constexpr):  # fmt: skip  # noqa: E501
    channel, offset, mask = _tile(inner, num_channels, num_positions, IS_LAST, P, C)
    g, centred, product = _read(grad, x, scale, shift, mean, inverse, step, channel, offset, mask, num_channels, LOW, HIGH, MODE, ROUNDING)  # fmt: skip  # noqa: E501
    g = tl.where(mask, g, 0.0)
    place = parts + tl.program_id(0) * num_channels + channel
    here = channel < num_channels
    tl.store(place, tl.sum(g, axis=0), mask=here)
    tl.store(place + tl.num_programs(0) * num_channels, tl.sum(g * centred, axis=0), mask=here)
    if MODE >= 2:
        total = tl.sum(tl.sum(tl.where(mask, product, 0.0), axis=1), axis=0)
        tl.store(steps + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def _finish(
    parts, steps, sums, num_blocks, num_steps, num_channels, C: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr
):
    """Adds the parts in float64: a program for each block of channels, and one for the scale."""
    block = tl.program_id(0)
    if block == tl.num_programs(0) - 1:
        total = tl.zeros((SIZE,), dtype=tl.float64)
        for start in range(0, num_steps, SIZE):
            index = start + tl.arange(0, SIZE)
            total += tl.load(steps + index, mask=index < num_steps, other=0.0).to(tl.float64)
        tl.store(sums + 2 * num_channels, tl.sum(total, axis=0).to(tl.float32))
    else:
        channel = block * C + tl.arange(0, C)
        here = channel < num_channels
        for kind in range(0, 2):
            columns = tl.zeros((ROWS, C), dtype=tl.float64)
            for start in range(0, num_blocks, ROWS):
                row = start + tl.arange(0, ROWS)
                place = parts + (kind * num_blocks + row)[:, None] * num_channels + channel[None, :]
                mask = (row < num_blocks)[:, None] & here[None, :]
                columns += tl.load(place, mask=mask, other=0.0).to(tl.float64)
            tl.store(sums + kind * num_channels + channel, tl.sum(columns, axis=0).to(tl.float32), mask=here)


@triton.jit
def _input(grad, x, scale, shift, mean, inverse, step, sums, count, out, number, inner, num_channels, num_positions, LOW: tl.constexpr, HIGH: tl.constexpr, MODE: tl.constexpr, ROUNDING: tl.constexpr, IS_LAST: tl.constexpr, HAS_COUNT: tl.constexpr, P: tl.constexpr, C: tl.constexpr):  # fmt: skip  # noqa: E501
    channel, offset, mask = _tile(inner, num_channels, num_positions, IS_LAST, P, C)
    g, centred, _ = _read(grad, x, scale, shift, mean, inverse, step, channel, offset, mask, num_channels, LOW, HIGH, MODE, ROUNDING)  # fmt: skip  # noqa: E501
    here = channel < num_channels
    if HAS_COUNT:
        number = tl.load(count)
    first = tl.div_rn(tl.load(sums + channel, mask=here, other=0.0), number)[None, :]
    second = tl.div_rn(tl.load(sums + num_channels + channel, mask=here, other=0.0), number)[None, :]
    factor = tl.load(scale + channel, mask=here, other=0.0)[None, :]
    store(out, offset, factor * (g - first - centred * second), mask)


@triton.jit
def _moments(means, variances, counts, weight, bias, running_mean, running_var, tracked, out, count_out, number, stride, num_rows, num_channels, momentum, eps, HAS_COUNTS: tl.constexpr, MOVES: tl.constexpr, C: tl.constexpr):  # fmt: skip  # noqa: E501
    channel = tl.program_id(0) * C + tl.arange(0, C)
    here = channel < num_channels
    mean = tl.load(means + channel, mask=here, other=0.0)
    var = tl.load(variances + channel, mask=here, other=0.0)
    if HAS_COUNTS:
        number = tl.load(counts) * 0.0
        mean = mean * 0.0
        for row in range(0, num_rows):
            n = tl.load(counts + row * stride)
            number += n
            mean += tl.load(means + row * stride + channel, mask=here, other=0.0) * n
        mean = tl.div_rn(mean, number + mean * 0.0)
        var = var * 0.0
        for row in range(0, num_rows):
            distance = tl.load(means + row * stride + channel, mask=here, other=0.0) - mean
            own = tl.load(variances + row * stride + channel, mask=here, other=0.0)
            var += (own + distance * distance) * tl.load(counts + row * stride)
        var = tl.div_rn(var, number + var * 0.0)
        if tl.program_id(0) == 0:
            tl.store(count_out, number)
    inverse = tl.div_rn(1.0 + var * 0.0, tl.sqrt_rn(var + eps))
    scale = tl.load(weight + channel, mask=here, other=0.0) * inverse
    shift = tl.load(bias + channel, mask=here, other=0.0) - mean * scale
    tl.store(out + channel, mean, mask=here)
    tl.store(out + num_channels + channel, inverse, mask=here)
    tl.store(out + 2 * num_channels + channel, scale, mask=here)
    tl.store(out + 3 * num_channels + channel, shift, mask=here)
    if MOVES:
        unbiased = var * (number / tl.maximum(number - 1.0, 1.0))
        old_mean = tl.load(running_mean + channel, mask=here, other=0.0)
        old_var = tl.load(running_var + channel, mask=here, other=0.0)
        tl.store(running_mean + channel, momentum * mean + (1.0 - momentum) * old_mean, mask=here)
        tl.store(running_var + channel, momentum * unbiased + (1.0 - momentum) * old_var, mask=here)
        if tl.program_id(0) == 0:
            tl.store(tracked, tl.load(tracked) + 1)


def _layout(x: Tensor) -> tuple[bool, int, int, int, int]:
    """Returns whether channels are last, positions in a row of a channel, channels, and the sizes of a tile."""
    is_last = x.shape[1] > 1 and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)
    inner = x.shape[2] * x.shape[3]
    return is_last, inner, x.shape[1], *((POSITIONS, CHANNELS) if is_last else (BLOCK, 1))


def sums(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, inverse: Tensor, step: Tensor | None, low: int, high: int, mode: int) -> Tensor:  # fmt: skip  # noqa: E501
    """Returns ``(2 C + 1,)``: sums of the gradient, of its products with the input, and the scale's gradient."""
    is_last, inner, channels, size, width = _layout(x)
    if not x.numel():
        return scale.new_zeros(2 * channels + 1)
    positions = x.numel() // channels
    grid = triton.cdiv(positions, size), triton.cdiv(channels, width)
    parts = scale.new_empty(2 * grid[0] * channels)
    steps = scale.new_empty(grid[0] * grid[1])
    _sums[grid](
        grad, x, scale, shift, mean, inverse, step, parts, steps, inner, channels, positions,
        LOW=float(low), HIGH=float(high), MODE=mode, ROUNDING=ROUNDINGS[x.dtype],
        IS_LAST=is_last, P=size, C=width, enable_fp_fusion=False,
    )  # fmt: skip
    out = scale.new_empty(2 * channels + 1)
    _finish[(triton.cdiv(channels, CHANNELS) + 1,)](
        parts, steps, out, grid[0], 0 if step is None else len(steps), channels, C=CHANNELS, SIZE=BLOCK, ROWS=CHANNELS
    )
    return out


def input_gradient(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, inverse: Tensor, step: Tensor | None, low: int, high: int, mode: int, totals: Tensor, count: Tensor | None, out: Tensor) -> None:  # fmt: skip  # noqa: E501
    """Writes the gradient of the norm's input to ``out``, from the sums over all processes."""
    is_last, inner, channels, size, width = _layout(x)
    positions = x.numel() // channels
    if positions:
        _input[(triton.cdiv(positions, size), triton.cdiv(channels, width))](
            grad, x, scale, shift, mean, inverse, step, totals, count, out, float(positions), inner, channels,
            positions,
            LOW=float(low), HIGH=float(high), MODE=mode, ROUNDING=ROUNDINGS[x.dtype],
            IS_LAST=is_last, HAS_COUNT=count is not None, P=size, C=width, enable_fp_fusion=False,
        )  # fmt: skip


def moments(means: Tensor, variances: Tensor, counts: Tensor | None, number: int, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None, tracked: Tensor | None, momentum: float, eps: float, out: Tensor, count: Tensor) -> None:  # fmt: skip  # noqa: E501
    """Writes mean, inverse, scale and shift to ``out``, ``(4, C)``; moves the running statistics if they are given."""
    channels = len(weight)
    _moments[(triton.cdiv(channels, CHANNELS),)](
        means, variances, counts, weight, bias, running_mean, running_var, tracked, out, count, float(number),
        means.stride(0), len(means), channels, momentum, eps, HAS_COUNTS=counts is not None,
        MOVES=running_mean is not None, C=CHANNELS, enable_fp_fusion=False,
    )  # fmt: skip
