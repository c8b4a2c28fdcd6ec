"""A convolution of the image with stride 2, as one with stride 1 of the image in blocks of 2x2 pixels.

A detector's first convolution reads three channels at every other pixel. Kernels of integer convolutions are made for
many channels side by side: ONNX Runtime takes a quarter of the time for the same products once the pixels of a block
are channels (SpaceToDepth). The sums are the same integers.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .packed_weights import grid_of_codes, packed_bits
from .program import IMAGE, Conv, PadImage, Program

BLOCK = 2
_MOST_CHANNELS = 4
"""Images have at most so many channels; with more, nothing is gained."""


def reads_blocks(conv: Conv, program: Program) -> bool:
    """Returns whether a convolution of ``program`` can read the image in blocks, and gains from it."""
    images = {IMAGE, *(operation.output for operation in program.operations if isinstance(operation, PadImage))}
    smallest, step = grid_of_codes(conv.weight, conv.weight_bits)
    return (
        conv.input in images
        and conv.weight.shape[1] <= _MOST_CHANNELS
        and conv.stride == (BLOCK, BLOCK)
        and conv.padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and program.size_divisibility % BLOCK == 0  # and padding adds as much on both sides
        # The kernel is filled up with weights of zero, which packed codes may not have.
        and (packed_bits(conv) > 4 or smallest % step == 0)
    )


def of_blocks(conv: Conv, source: str) -> Conv:
    """Returns the convolution with stride 1 that gives the same sums as one with stride 2, without padding.

    Args:
        conv: The convolution, with a weight ``(O, C, kH, kW)``.
        source: The name of its input after SpaceToDepth, ``(N, 4 C, H / 2, W / 2)``: channel ``(2 i + j) C + c`` is row
            ``i`` and column ``j`` of the blocks of channel ``c``.

    Returns:
        A convolution of ``source``, with a weight ``(O, 4 C, ceil(kH / 2), ceil(kW / 2))``.
    """
    outputs, channels, *kernel = conv.weight.shape
    rest = [(0, -size % BLOCK) for size in kernel]
    weight = np.pad(conv.weight, ((0, 0), (0, 0), *rest))
    height, width = (size // BLOCK for size in weight.shape[2:])
    blocks = weight.reshape(outputs, channels, height, BLOCK, width, BLOCK).transpose(0, 3, 5, 1, 2, 4)
    weight = np.ascontiguousarray(blocks.reshape(outputs, BLOCK * BLOCK * channels, height, width))
    return dataclasses.replace(conv, input=source, weight=weight, stride=(1, 1))
