"""The papers' formulas, one element at a time in Python floats. Shares no code with aqdet.

A method is named as in the config. ``bound`` is what a uniform method learns or calibrates: PACT's
alpha; the step for LSQ and for DoReFa's activations. Python's ``round`` rounds half to even.
"""

import itertools
import math
from collections.abc import Callable


def code_range(method: str, bits: int, signed: bool) -> tuple[int, int]:
    """LSQ takes all of two's complement; PACT and DoReFa clip to a symmetric range."""
    if not signed:
        return 0, 2**bits - 1
    high = 2 ** (bits - 1) - 1
    return (-high - 1, high) if method == "lsq" else (-high, high)


def step(method: str, bound: float, high: int) -> float:
    return bound / high if method == "pact" else bound


def uniform(x: float, scale: float, low: int, high: int) -> tuple[int, float]:
    """The code and the value of ``scale * round(clip(x / scale, low, high))``."""
    code = round(min(max(x / scale, low), high))
    return code, code * scale


def lsq_gradients(xs: list[float], grads: list[float], scale: float, low: int, high: int) -> tuple[list[float], float]:
    """LSQ (1902.08153), equations 3 and 5, without the factor that balances scales and weights under SGD."""
    dx, dscale = [], 0.0
    for x, grad in zip(xs, grads, strict=True):
        ratio = x / scale
        if low < ratio < high:
            dx.append(grad)
            dscale += grad * (round(ratio) - ratio)
        else:
            dx.append(0.0)
            dscale += grad * (low if ratio <= low else high)
    return dx, dscale


def pact_gradients(xs: list[float], grads: list[float], alpha: float, signed: bool) -> tuple[list[float], float]:
    """PACT (1805.06085): dy/dalpha is 1 where x >= alpha; signed, also -1 where x <= -alpha."""
    dx, dalpha = [], 0.0
    for x, grad in zip(xs, grads, strict=True):
        dx.append(grad if (-alpha if signed else 0.0) < x < alpha else 0.0)
        if x >= alpha:
            dalpha += grad
        elif signed and x <= -alpha:
            dalpha -= grad
    return dx, dalpha


def dorefa_weights(ws: list[float], bits: int) -> tuple[list[int], list[float]]:
    """DoReFa (1606.06160), ``2 q(tanh(w) / (2 M) + 1/2) - 1``, with the magnitude M restored."""
    steps = 2**bits - 1
    largest = max(abs(math.tanh(w)) for w in ws)
    codes = [2 * round((math.tanh(w) / (2 * largest) + 0.5) * steps) - steps for w in ws]
    return codes, [largest * code / steps for code in codes]


def dorefa_weight_gradients(ws: list[float], grads: list[float]) -> list[float]:
    return [grad * (1 - math.tanh(w) ** 2) for w, grad in zip(ws, grads, strict=True)]


def slope(function: Callable[[float], float], at: float, width: float = 1e-6) -> float:
    """Central difference."""
    return (function(at + width) - function(at - width)) / (2 * width)


def best_step(xs: list[float], low: int, high: int, count: int = 300) -> tuple[float, float]:
    """The step of least squared error on a fine linear grid, and its error."""
    largest = max(abs(x) for x in xs)
    steps = [largest / high * 1.2 * (i + 1) / count for i in range(count)]
    errors = [squared_error(xs, s, low, high) for s in steps]
    return steps[errors.index(min(errors))], min(errors)


def squared_error(xs: list[float], scale: float, low: int, high: int) -> float:
    return sum((uniform(x, scale, low, high)[1] - x) ** 2 for x in xs)


def lsqplus(
    xs: list[float], grads: list[float], scale: float, offset: float, bits: int
) -> tuple[list[int], list[float], list[float], float, float]:
    """LSQ+ (2004.09576) with the offset at the nearest multiple of the step.

    Returns codes from 0, values, and the gradients of x, scale and offset.
    """
    largest = 2**bits - 1
    zero_point = min(max(round(-offset / scale), 0), largest)
    codes, values, dx, dscale, doffset = [], [], [], 0.0, 0.0
    for x, grad in zip(xs, grads, strict=True):
        v = x / scale + zero_point
        code = min(max(round(x / scale) + zero_point, 0), largest)
        codes.append(code)
        values.append((code - zero_point) * scale)
        inside = 0 < v < largest
        dx.append(grad if inside else 0.0)
        dscale += grad * ((code - v) if inside else code)
        doffset += 0.0 if inside else grad
    return codes, values, dx, dscale, doffset


def basis_levels(basis: list[float], signs: bool) -> list[tuple[float, list[int]]]:
    """LQ-Nets (1807.10029): every combination of the basis, ascending, each with its factors."""
    choices = (-1, 1) if signs else (0, 1)
    combinations = itertools.product(choices, repeat=len(basis))
    return sorted((sum(b * v for b, v in zip(bits, basis, strict=True)), list(bits)) for bits in combinations)


def nearest_level(x: float, levels: list[tuple[float, list[int]]]) -> tuple[float, list[int]]:
    """Thresholds are half-way between levels."""
    index = sum(x > (a[0] + b[0]) / 2 for a, b in itertools.pairwise(levels))
    return levels[index]


def least_squares(rows: list[list[int]], xs: list[float]) -> list[float]:
    """``(B'B)^-1 B'x`` by Gauss-Jordan elimination; B'B must be regular."""
    size = len(rows[0])
    matrix = [[float(sum(r[i] * r[j] for r in rows)) for j in range(size)] for i in range(size)]
    for i in range(size):
        matrix[i].append(sum(r[i] * x for r, x in zip(rows, xs, strict=True)))
    for i in range(size):
        pivot = max(range(i, size), key=lambda j: abs(matrix[j][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        matrix[i] = [value / matrix[i][i] for value in matrix[i]]
        for j in range(size):
            if j != i:
                matrix[j] = [a - matrix[j][i] * b for a, b in zip(matrix[j], matrix[i], strict=True)]
    return [row[size] for row in matrix]


def n2uq(
    xs: list[float], grads: list[float], scale: float, start: float, intervals: list[float], low: int
) -> tuple[list[int], list[float], float, float, list[float]]:
    """N2UQ (2111.14826): codes from ``low``, and the G-STE gradients of x, scale, start and intervals.

    Between the ends of interval i the gradient is that of ``scale * (low + i + (x - end_i) / interval_i)``.
    """
    ends = [start]
    for interval in intervals:
        ends.append(ends[-1] + interval)
    codes, dx, dscale, dstart, dintervals = [], [], 0.0, 0.0, [0.0] * len(intervals)
    for x, grad in zip(xs, grads, strict=True):
        codes.append(low + sum(x > (a + b) / 2 for a, b in itertools.pairwise(ends)))
        dscale += grad * codes[-1]
        inside = [i for i in range(len(intervals)) if ends[i] < x <= ends[i + 1]]
        dx.append(0.0)
        for i in inside:
            dx[-1] = grad * scale / intervals[i]
            dstart -= dx[-1]
            for j in range(i):
                dintervals[j] -= dx[-1]
            dintervals[i] -= grad * scale * (x - ends[i]) / intervals[i] ** 2
    return codes, dx, dscale, dstart, dintervals


def lsqodd(
    xs: list[float], grads: list[float], scale: float, bits: int, centered: bool
) -> tuple[list[int], list[float], list[float], float]:
    """LSQ on odd multiples of half a step, for values that share a scale.

    Returns codes, values, and the gradients of x and of the scale.
    """
    mean = math.fsum(xs) / len(xs) if centered else 0.0
    half = 2 ** (bits - 1)
    codes, values, passed, dscale = [], [], [], 0.0
    for x, grad in zip(xs, grads, strict=True):
        ratio = (x - mean) / scale
        # Of the levels the one whose interval holds the ratio; the outermost intervals have no end.
        code = max([k for k in range(1 - 2 * half, 2 * half, 2) if k / 2 - 0.5 <= ratio], default=1 - 2 * half)
        codes.append(code)
        values.append(code * scale / 2)
        inside = -half < ratio < half
        passed.append(grad if inside else 0.0)
        dscale += grad * (code / 2 - ratio if inside else code / 2)
    lowered = math.fsum(passed) / len(xs) if centered else 0.0
    return codes, values, [grad - lowered for grad in passed], dscale
