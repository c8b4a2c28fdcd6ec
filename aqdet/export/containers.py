"""Integer weights in 8-bit tensors, so that every x86 computes with them exactly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .program import Conv, Grid, largest_code

INT8_LIMIT = 127
# Of the sum of two products of uint8 and int8 in the 16 bits of x86 without VNNI.
PAIR_LIMIT = 2**15 - 1


def split_copies(weight: NDArray[np.int32], path: str, groups: int) -> list[NDArray[np.int8]]:
    """Integer weights as a sum of int8 ones, for a convolution that reads its input that many times.

    One, unless codes reach beyond int8, as DoReFa's at 8 bits do.

    Raises:
        ValueError: if a grouped convolution would need more than one.
    """
    count = max(1, -(-int(np.abs(weight).max(initial=0)) // INT8_LIMIT))
    if count > 1 and groups > 1:
        raise ValueError(f"layer {path}: weight codes up to {np.abs(weight).max()} in a grouped convolution, not int8")
    parts, rest = [], weight
    for left in range(count, 0, -1):
        part = np.trunc(rest / left).astype(np.int8)
        parts.append(part)
        rest = rest - part
    return parts


def stored_as_uint8(conv: Conv, source: Grid) -> bool:
    """Whether the weights of a convolution that reads ``source`` are uint8 with zero point 128, and not int8.

    Without VNNI, x86 adds two products of uint8 and int8 in int16, which saturates; products of uint8 and uint8 are
    added in int32. Predictions always are: ONNX Runtime has ConvInteger for uint8 weights only.
    """
    parts = split_copies(conv.integer_weight, conv.path, conv.groups)
    largest = max(int(np.abs(part.astype(np.int32)).max(initial=0)) for part in parts)
    return conv.grid is None or 2 * largest_code(source) * largest > PAIR_LIMIT
