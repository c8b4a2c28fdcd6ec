"""The integer program in numpy, slow and plain: what every other execution is compared with.

Integers only. A multiplication by a real number is a multiplication by a 31-bit integer and a right shift that
rounds to nearest, ties to even, as ``torch.round`` and ONNX's QuantizeLinear do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from .program import IMAGE, Add, Conv, Grid, MaxPool, Operation, PadImage, Program, Requantize, inputs_of

Array = NDArray[np.int64]
MULTIPLIER_BITS = 31
_MAX_SHIFT = 62


def as_multiplier(ratio: float) -> tuple[int, int]:
    """``(multiplier, shift)`` with ``multiplier / 2**shift`` the nearest to ``ratio``, multiplier in 31 bits.

    Example: 0.75 is ``(0x60000000, 31)``.
    """
    mantissa, exponent = math.frexp(ratio)
    multiplier, shift = round(mantissa * 2**MULTIPLIER_BITS), MULTIPLIER_BITS - exponent
    if shift > _MAX_SHIFT:
        multiplier, shift = multiplier >> (shift - _MAX_SHIFT), _MAX_SHIFT
    if shift < 1:
        raise ValueError(f"a multiplier must be less than 2**30, got {ratio}")
    return multiplier, shift


def shift_round(value: Array, shift: int | Array) -> Array:
    """``value / 2**shift`` to the nearest integer, ties to even. Example: 5 and 7 by 1 are 2 and 4."""
    quotient = value >> shift
    rest = value - (quotient << shift)
    half = np.int64(1) << (np.asarray(shift, np.int64) - 1)
    return quotient + ((rest > half) | ((rest == half) & (quotient & 1 == 1)))


def _rescale(value: Array, ratios: NDArray[np.float64], grid: Grid) -> Array:
    """``(N, C, H, W)`` times a number for each channel, or one for all, onto the codes of ``grid``."""
    pairs = [as_multiplier(float(ratio)) for ratio in np.atleast_1d(ratios)]
    multiplier, shift = (np.array(v, np.int64).reshape(1, -1, 1, 1) for v in zip(*pairs, strict=True))
    return np.clip(shift_round(value * multiplier, shift), grid.quant_min, grid.quant_max)


def convolve(x: Array, weight: NDArray[np.int32], conv: Conv) -> Array:
    """Integer cross-correlation, without bias.

    Products are summed in float64 matrix products, which is exact: every partial sum is an integer below 2**53.

    Args:
        x: ``(N, C, H, W)``. weight: ``(O, C / groups, kH, kW)``. conv: for the geometry.
    """
    vertical, horizontal = conv.padding
    padded = np.pad(x, ((0, 0), (0, 0), (vertical, vertical), (horizontal, horizontal)))
    kernel_h, kernel_w = weight.shape[2:]
    (stride_h, stride_w), (dilation_h, dilation_w) = conv.stride, conv.dilation
    out_h = (padded.shape[2] - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    out_w = (padded.shape[3] - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    outputs = []
    for part, kernel in zip(np.split(padded, conv.groups, 1), np.split(weight, conv.groups, 0), strict=True):
        total = np.zeros((x.shape[0], kernel.shape[0], out_h * out_w))
        for i in range(kernel_h):
            for j in range(kernel_w):
                top, left = i * dilation_h, j * dilation_w
                window = part[:, :, top : top + out_h * stride_h : stride_h, left : left + out_w * stride_w : stride_w]
                window = window.reshape(x.shape[0], part.shape[1], -1)
                total += kernel[:, :, i, j].astype(np.float64) @ window.astype(np.float64)
        outputs.append(total.reshape(x.shape[0], -1, out_h, out_w))
    return np.concatenate(outputs, 1).astype(np.int64)


def accumulate(conv: Conv, x: Array) -> Array:
    """The int32 sums of a convolution, bias included."""
    return convolve(x, conv.integer_weight, conv) + conv.bias.astype(np.int64).reshape(1, -1, 1, 1)


def conv_unit(conv: Conv, input_scale: float) -> NDArray[np.float64]:
    """What one unit of each channel's sum stands for, ``(O,)``."""
    return conv.scale.astype(np.float64) * input_scale


def execute(operation: Operation, inputs: list[Array], grids: Mapping[str, Grid]) -> NDArray[np.generic]:
    """Runs one operation.

    Args:
        operation: what to run.
        inputs: codes, ``(N, C, H, W)``.
        grids: of all values by name.

    Returns:
        Codes; float32 for the convolutions that predict.
    """
    x = inputs[0]
    if isinstance(operation, PadImage):
        vertical, horizontal = operation.amount
        channels = [
            np.pad(x[:, c], ((0, 0), (vertical, vertical), (horizontal, horizontal)), constant_values=value)
            for c, value in enumerate(operation.values)
        ]
        return np.stack(channels, 1)
    if isinstance(operation, Conv):
        sums = accumulate(operation, x)
        unit = conv_unit(operation, grids[operation.input].scale)
        if operation.grid is None:
            return (sums * unit.reshape(1, -1, 1, 1)).astype(np.float32)
        return _rescale(sums, unit / operation.grid.scale, operation.grid)
    if isinstance(operation, Requantize):
        return _rescale(x, np.array(grids[operation.input].scale / operation.grid.scale), operation.grid)
    if isinstance(operation, Add):
        grid = operation.grid
        ratios = [grids[name].scale / grid.scale for name in operation.inputs]
        _, shift = as_multiplier(max(ratios))
        total = sum(value * round(ratio * 2**shift) for value, ratio in zip(inputs, ratios, strict=True))
        return np.clip(shift_round(np.asarray(total), shift), grid.quant_min, grid.quant_max)
    if isinstance(operation, MaxPool):
        return _max_pool(x, operation)
    return x.repeat(2, axis=2).repeat(2, axis=3)


def _max_pool(x: Array, pool: MaxPool) -> Array:
    lowest = np.iinfo(np.int64).min
    p, k, s = pool.padding, pool.kernel, pool.stride
    padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)), constant_values=lowest)
    out_h, out_w = ((side + 2 * p - k) // s + 1 for side in x.shape[2:])
    result = np.full((*x.shape[:2], out_h, out_w), lowest)
    for i in range(k):
        for j in range(k):
            np.maximum(result, padded[:, :, i:, j:][:, :, ::s, ::s][:, :, :out_h, :out_w], out=result)
    return result


def run(
    program: Program, image: NDArray[np.uint8], progress: Callable[[Operation], object] = lambda _: None
) -> dict[str, NDArray[np.generic]]:
    """Executes a program.

    Args:
        program: what to execute.
        image: ``(N, 3, H, W)``, height and width multiples of ``program.size_divisibility``.
        progress: called with each operation before it runs.

    Returns:
        Every value by name: codes as int16, predictions as float32.
    """
    grids = program.grids()
    values: dict[str, NDArray[np.generic]] = {IMAGE: image}
    for operation in program.operations:
        progress(operation)
        inputs = [values[name].astype(np.int64) for name in inputs_of(operation)]
        value = execute(operation, inputs, grids)
        values[operation.output] = value if value.dtype == np.float32 else value.astype(np.int16)
    return values
