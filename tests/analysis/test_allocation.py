"""Bits within a budget, against every possible choice."""

import itertools
import math

import pytest

from aqdet.analysis.allocation import Budget, allocate, average_bits, monotone_costs
from aqdet.analysis.sensitivity import Sensitivity

MACS = {"a.conv1": 100, "a.conv2": 300, "b": 50, "c": 1000}
WEIGHTS = {"a.conv1": 10, "a.conv2": 30, "b": 500, "c": 80}
LAYERS = {"a": ["a.conv1", "a.conv2"], "b": ["b"], "c": ["c"]}
COSTS = {
    "a": {2: 0.9, 3: 0.3, 4: 0.1, 8: 0.0},
    "b": {2: 0.5, 3: 0.4, 4: 0.35, 8: 0.01},
    "c": {2: 0.2, 3: 0.05, 4: 0.04, 8: -0.01},
}
FOUND = Sensitivity(0.7, LAYERS, MACS, WEIGHTS, COSTS)


def total(values, bits, power):
    return sum(values[name] * bits[group] ** power for group, names in LAYERS.items() for name in names)


def brute_force(fits, objective):
    choices = [dict(zip(LAYERS, widths, strict=True)) for widths in itertools.product((2, 3, 4, 8), repeat=3)]
    return min(objective(bits) for bits in choices if fits(bits))


def cost(bits):
    return sum(max(COSTS[group][width], 0) for group, width in bits.items())


@pytest.mark.parametrize("budget", [2.0, 2.2, 2.5, 3.0, 3.7, 5.0, 8.0])
def test_average_bits(budget):
    bits = allocate(FOUND, Budget(bits=budget))
    limit = budget**2 * sum(MACS.values())
    assert total(MACS, bits, 2) <= limit * (1 + 1e-9) and average_bits(FOUND, bits) <= budget * (1 + 1e-9)
    assert average_bits(FOUND, bits) == pytest.approx(math.sqrt(total(MACS, bits, 2) / sum(MACS.values())))
    assert cost(bits) == pytest.approx(brute_force(lambda b: total(MACS, b, 2) <= limit, cost))


@pytest.mark.parametrize("budget", [155.0, 200.0, 400.0, 620.0])
def test_bytes_of_weights(budget):
    bits = allocate(FOUND, Budget(weight_bytes=budget))
    assert total(WEIGHTS, bits, 1) / 8 <= budget
    assert cost(bits) == pytest.approx(brute_force(lambda b: total(WEIGHTS, b, 1) / 8 <= budget, cost))


@pytest.mark.parametrize("budget", [0.02, 0.2, 0.5, 2.0])
def test_least_operations_for_a_cost(budget):
    bits = allocate(FOUND, Budget(cost=budget))
    assert cost(bits) <= budget
    least = brute_force(lambda b: cost(b) <= budget, lambda b: total(MACS, b, 2))
    assert total(MACS, bits, 2) == least


def test_bit_operations_are_those_of_the_average():
    limit = 2.5**2 * sum(MACS.values())
    assert allocate(FOUND, Budget(bit_ops=limit)) == allocate(FOUND, Budget(bits=2.5))


def test_noise_of_the_measure_gains_nothing():
    # 3 bits that seem to cost less than 4 cost as much as 4 at least.
    assert monotone_costs({2: 0.5, 3: 0.1, 4: 0.2, 8: -0.3}) == {8: 0.0, 4: 0.2, 3: 0.2, 2: 0.5}


def test_budgets_that_nothing_fits_are_refused():
    with pytest.raises(ValueError, match="the budget is 3 bytes of weights, and the least that there is takes 155"):
        allocate(FOUND, Budget(weight_bytes=3))
    with pytest.raises(ValueError, match="one budget"):
        Budget(bits=2, cost=1)
    with pytest.raises(ValueError, match="one budget"):
        Budget()
