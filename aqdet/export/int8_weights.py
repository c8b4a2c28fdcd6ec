"""Integer weights as int8 tensors with which every x86 computes exactly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .program import Conv, Grid, largest_code

INT8_LIMIT = 127
# Largest sum of two products of uint8 and int8 in the 16 bits of x86 without VNNI.
PAIR_LIMIT = 2**15 - 1


def int8_parts(conv: Conv, source: Grid) -> list[NDArray[np.int8]]:
    """Splits integer weights into a sum of int8 parts; each part convolves the input, on the grid ``source``, once.

    Without VNNI, x86 adds two products of uint8 and int8 in int16, which saturates. So the sum of two of a part's
    products with the largest input code is at most :data:`PAIR_LIMIT`. There is one part up to 7 bits, and there are
    two at 8 bits.

    Raises:
        ValueError: If a grouped convolution would need more than one part.
    """
    weight = conv.integer_weight
    limit = min(INT8_LIMIT, PAIR_LIMIT // (2 * largest_code(source)))
    largest = int(np.abs(weight).max(initial=0))
    count = max(1, -(-largest // limit))
    if count > 1 and conv.groups > 1:
        raise ValueError(
            f"layer {conv.name}: weight codes up to {largest} in a grouped convolution, at most {limit} are exact on "
            "every x86; give the layer fewer weight or input bits (MODEL.QUANT.RULES)"
        )
    parts, rest = [], weight
    for left in range(count, 0, -1):
        part = np.trunc(rest / left).astype(np.int8)
        parts.append(part)
        rest = rest - part
    return parts
