"""The integer program in plain, slow numpy, which is the reference for every other execution.

It executes the arithmetic that ships, which is ONNX Runtime's: sums of products are int32; a sum becomes float32, is
multiplied by a float32 multiplier and rounded to nearest with ties to even; a change of grid goes through float32
values. IEEE 754 defines each of these steps, so that every machine and every language gets the same codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from .program import IMAGE, Add, Conv, DepthToSpace, Grid, MaxPool, Operation, PadImage, Program, Requantize, inputs_of

Array = NDArray[np.int64]


def _onto(real: NDArray[np.float32], grid: Grid) -> Array:
    """Rounds values in units of a grid to its codes, ties to even."""
    return np.clip(np.rint(real), grid.quant_min, grid.quant_max).astype(np.int64)


def convolve(x: Array, weight: NDArray[np.int32], conv: Conv) -> Array:
    """Computes the integer cross-correlation, without bias.

    Products are summed in float64 matrix products, which is exact: every partial sum is an integer below 2**53.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(O, C / groups, kH, kW)``.
        conv: The convolution, for its geometry.
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
    """Returns the int32 sums of a convolution, with the bias."""
    return convolve(x, conv.integer_weight, conv) + conv.bias.astype(np.int64).reshape(1, -1, 1, 1)


def conv_unit(conv: Conv, input_scale: float) -> NDArray[np.float32]:
    """Returns the real value of one unit of each channel's sum, ``(O,)``."""
    return np.float32(input_scale) * conv.scale


def conv_multiplier(conv: Conv, input_scale: float) -> NDArray[np.float32]:
    """Returns the multiplier, ``(O,)``, that turns a sum into output codes or a predicted value."""
    unit = conv_unit(conv, input_scale)
    return unit if conv.grid is None else unit / np.float32(conv.grid.scale)


def execute(operation: Operation, inputs: list[Array], grids: Mapping[str, Grid]) -> NDArray[np.generic]:
    """Runs one operation.

    Args:
        operation: The operation.
        inputs: Codes, ``(N, C, H, W)``.
        grids: The grids of all values by name.

    Returns:
        Codes, or float32 values for a convolution that predicts.
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
        sums = accumulate(operation, x).astype(np.float32)
        real = sums * conv_multiplier(operation, grids[operation.input].scale).reshape(1, -1, 1, 1)
        return real if operation.grid is None else _onto(real, operation.grid)
    if isinstance(operation, Requantize):
        real = x.astype(np.float32) * np.float32(grids[operation.input].scale)
        return _onto(real / np.float32(operation.grid.scale), operation.grid)
    if isinstance(operation, Add):
        total = sum(value * multiplier for value, multiplier in zip(inputs, operation.multipliers, strict=True))
        rounded = (np.asarray(total) + (1 << (operation.shift - 1))) >> operation.shift
        return np.clip(rounded, operation.grid.quant_min, operation.grid.quant_max)
    if isinstance(operation, MaxPool):
        return _max_pool(x, operation)
    if isinstance(operation, DepthToSpace):
        return depth_to_space(x, operation.block)
    return x.repeat(2, axis=2).repeat(2, axis=3)


def depth_to_space(x: Array, block: int) -> Array:
    """Spreads channels over squares, see :class:`~aqdet.export.program.DepthToSpace`."""
    number, channels, height, width = x.shape
    squares = x.reshape(number, channels // block**2, block, block, height, width)
    return squares.transpose(0, 1, 4, 2, 5, 3).reshape(number, -1, height * block, width * block)


def space_to_depth(x: NDArray[np.generic], block: int) -> NDArray[np.generic]:
    """Gathers squares into channels, the inverse of :func:`depth_to_space`."""
    number, channels, height, width = x.shape
    squares = x.reshape(number, channels, height // block, block, width // block, block)
    return squares.transpose(0, 1, 3, 5, 2, 4).reshape(number, -1, height // block, width // block)


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
        program: The program.
        image: ``(N, 3, H, W)``, whose height and width are multiples of ``program.size_divisibility``; for
            regions, their codes as they are stored, ``(R, C, S, S)`` uint8.
        progress: A function that is called with each operation before it runs.

    Returns:
        Every value by name, codes as int16 and predictions as float32.
    """
    grids = program.grids()
    values: dict[str, NDArray[np.generic]] = {IMAGE: image.astype(np.int16) - program.image.zero_point}
    for operation in program.operations:
        progress(operation)
        inputs = [values[name].astype(np.int64) for name in inputs_of(operation)]
        value = execute(operation, inputs, grids)
        values[operation.output] = value if value.dtype == np.float32 else value.astype(np.int16)
    return values
