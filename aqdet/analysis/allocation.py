"""Choice of the bits of each part of a detector, with the least measured cost within a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from .sensitivity import Sensitivity


@dataclasses.dataclass(frozen=True)
class Budget:
    """The limit of an allocation; one of the attributes is given.

    Attributes:
        bits: The average bits, which are the root of bit operations per multiply-accumulate.
        weight_bytes: The bytes of the packed weights of the layers that take part.
        bit_ops: Multiply-accumulates x weight bits x input bits for one image, over the layers that take part.
        cost: The sum of the measured costs; bit operations are then as few as possible.
    """

    bits: float | None = None
    weight_bytes: float | None = None
    bit_ops: float | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in dataclasses.astuple(self)) != 1:
            raise ValueError("an allocation has one budget: bits, weight_bytes, bit_ops or cost")


def monotone_costs(costs: Mapping[int, float]) -> dict[int, float]:
    """Returns costs that are not negative and do not rise with the bits; other measurements are noise."""
    result: dict[int, float] = {}
    largest = 0.0
    for bits in sorted(costs, reverse=True):
        largest = max(largest, costs[bits])
        result[bits] = largest
    return result


def allocate(sensitivity: Sensitivity, budget: Budget) -> dict[str, int]:
    """Chooses the bits of each group, of weights and inputs alike.

    It assumes that the costs of groups add up. SciPy (HiGHS) solves the choice as an integer program.

    Args:
        sensitivity: The measured costs.
        budget: The limit.

    Returns:
        Name of each group -> bits.

    Raises:
        ValueError: In one line, if the fewest bits exceed the budget, or the most bits cost more than it.
    """
    # Imported late, since it is slow.
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [
        (group, bits, cost)
        for group in sensitivity.layers
        for bits, cost in sorted(monotone_costs(sensitivity.costs[group]).items())
    ]
    macs = [sum(sensitivity.macs[name] for name in sensitivity.layers[group]) for group, _, _ in choices]
    weights = [sum(sensitivity.weights[name] for name in sensitivity.layers[group]) for group, _, _ in choices]
    cost = np.array([c for _, _, c in choices])
    bit_ops = np.array([m * bits**2 for m, (_, bits, _) in zip(macs, choices, strict=True)], dtype=float)
    weight_bytes = np.array([w * bits / 8 for w, (_, bits, _) in zip(weights, choices, strict=True)])
    objective, taken, limit, what = cost, bit_ops, budget.bit_ops, "bit operations"
    if budget.bits is not None:
        limit = budget.bits**2 * sum(sensitivity.macs.values())
    elif budget.weight_bytes is not None:
        taken, limit, what = weight_bytes, budget.weight_bytes, "bytes of weights"
    elif budget.cost is not None:
        objective, taken, limit, what = bit_ops, cost, budget.cost, "cost"
    assert limit is not None
    one_each = np.array([[float(group == other) for other, _, _ in choices] for group in sensitivity.layers])
    least = sum(taken[one_each[i] > 0].min() for i in range(len(sensitivity.layers)))
    if least > limit:
        raise ValueError(f"the budget is {limit:.6g} {what}, and the least that there is takes {least:.6g}")
    # Scaled to the size that the solver's tolerances are made for.
    scale = max(abs(objective).max(), 1e-30)
    found = milp(
        objective / scale,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(taken[None] / max(limit, 1e-30), -math.inf, 1),
        ],
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise ValueError(f"no allocation was found: {found.message}")
    return {group: bits for (group, bits, _), is_chosen in zip(choices, found.x, strict=True) if is_chosen > 0.5}


def average_bits(sensitivity: Sensitivity, bits: Mapping[str, int]) -> float:
    """Returns the root of the bit operations per multiply-accumulate, over the layers that take part."""
    macs = {group: sum(sensitivity.macs[name] for name in names) for group, names in sensitivity.layers.items()}
    return math.sqrt(sum(macs[group] * bits[group] ** 2 for group in macs) / sum(macs.values()))
