"""The papers' formulas, one element at a time in Python floats. Shares no code with aqdet.

A method is named as in the config. ``bound`` is what a uniform method learns or calibrates: PACT's
alpha; the step for LSQ and for DoReFa's activations. Python's ``round`` rounds half to even.
"""

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
    """LSQ (1902.08153), equations 3 and 5, with the gradient scale 1 / sqrt(N Qp)."""
    dx, dscale = [], 0.0
    for x, grad in zip(xs, grads, strict=True):
        ratio = x / scale
        if low < ratio < high:
            dx.append(grad)
            dscale += grad * (round(ratio) - ratio)
        else:
            dx.append(0.0)
            dscale += grad * (low if ratio <= low else high)
    return dx, dscale / math.sqrt(len(xs) * high)


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
