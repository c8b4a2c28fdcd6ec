"""Scales with which a sum is the same on every machine.

ONNX Runtime's QLinearAdd multiplies both operands by float32 ratios, in an order that depends on the machine: if the
result lies next to a rounding tie, one machine rounds up and another down. With ratios ``m / 2**shift`` of few bits,
every product and every sum is exact in float32, in any order, fused or not, and with the right ``m`` no pair of
codes ends at a tie. So there is only one result.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .program import Add, Grid

MAX_SHIFT = 15
# Limit of the sum of two products; with the zero point it is below 2**24, which float32 represents exactly.
_EXACT = 2**23
_RADIUS = 40


def choose_sum_scales(operands: tuple[Grid, Grid], target: Grid, name: str = "") -> tuple[tuple[int, int], int]:
    """Returns the dyadic scales, nearest to a sum's own, with which no pair of codes is a tie.

    The sum of codes ``a`` and ``b`` is ``round((a * multipliers[0] + b * multipliers[1]) / 2**shift)``.

    Args:
        operands: The grids of the two operands.
        target: The grid of the sum.
        name: The name of the sum for messages.

    Returns:
        The multipliers of the two operands, and the shift, 1 to :data:`MAX_SHIFT`.

    Raises:
        ValueError: In one line that names the sum, if its scales are too far apart for 24 bits.
    """
    ratios = [grid.scale / target.scale for grid in operands]
    largest = [max(-grid.quant_min, grid.quant_max) for grid in operands]
    reach = sum(ratio * code for ratio, code in zip(ratios, largest, strict=True))
    shift = min(MAX_SHIFT, int(np.floor(np.log2(_EXACT / reach)))) if reach > 0 else MAX_SHIFT
    if shift < 1 or min(ratios) * 2**shift < 0.5:
        raise ValueError(
            f"layer {name}: its operands' scales {operands[0].scale:g} and {operands[1].scale:g} and its own of "
            f"{target.scale:g} are too far apart for a sum of integers"
        )
    one = 1 << shift
    first, second = (np.arange(grid.quant_min, grid.quant_max + 1, dtype=np.int64) for grid in operands)
    middles = [round(ratio * one) for ratio in ratios]
    around = np.arange(-_RADIUS, _RADIUS + 1)
    candidates = np.stack(np.meshgrid(middles[0] + around, middles[1] + around, indexing="ij"), -1).reshape(-1, 2)
    candidates = candidates[(candidates > 0).all(1)]
    moves = (np.abs(candidates - np.array(ratios) * one) * largest).sum(1) / one
    for index in np.argsort(moves, kind="stable"):
        a, b = (int(multiplier) for multiplier in candidates[index])
        sums = first[:, None] * a + second * b
        ties = (sums & (one - 1)) == one >> 1
        # A tie outside the range is clipped in either case.
        ties &= (sums > target.quant_min * one) & (sums < target.quant_max * one)
        if not ties.any():
            return (a, b), shift
    raise ValueError(f"layer {name}: no scales of its sum leave every pair of codes off a rounding tie")


def largest_move(add: Add, grids: Mapping[str, Grid]) -> float:
    """Returns the largest change of a sum before rounding against its operands' own scales, in codes of the sum."""
    move = 0.0
    for name, multiplier in zip(add.inputs, add.multipliers, strict=True):
        grid = grids[name]
        move += abs(multiplier / 2**add.shift - grid.scale / add.grid.scale) * max(-grid.quant_min, grid.quant_max)
    return move
