"""The papers' formulas one element at a time in Python floats; shares no code with aqdet."""

import math


def round_half_even(value: float) -> int:
    return round(value)


def uniform(x: float, scale: float, low: int, high: int) -> float:
    """clamp(round(x / scale)) * scale"""
    return min(max(round_half_even(x / scale), low), high) * scale


def lsq_gradients(
    xs: list[float], grads: list[float], scale: float, low: int, high: int
) -> tuple[list[float], float]:
    """LSQ (1902.08153), equations 3 and 5, with the gradient scale 1 / sqrt(N Qp)."""
    dx, dscale = [], 0.0
    for x, grad in zip(xs, grads, strict=True):
        ratio = x / scale
        if low < ratio < high:
            dx.append(grad)
            dscale += grad * (round_half_even(ratio) - ratio)
        else:
            dx.append(0.0)
            dscale += grad * (low if ratio <= low else high)
    return dx, dscale / math.sqrt(len(xs) * high)


def pact_gradients(
    xs: list[float], grads: list[float], alpha: float, low: float
) -> tuple[list[float], float]:
    """PACT (1805.06085): 1 for alpha where x >= alpha, -1 where x <= low if low is -alpha."""
    dx, dalpha = [], 0.0
    for x, grad in zip(xs, grads, strict=True):
        dx.append(grad if low < x < alpha else 0.0)
        if x >= alpha:
            dalpha += grad
        elif low < 0 and x <= low:
            dalpha -= grad
    return dx, dalpha


def dorefa_weight(ws: list[float], bits: int) -> list[float]:
    """DoReFa (1606.06160) with the magnitude M = max|tanh w| restored."""
    steps = 2**bits - 1
    largest = max(abs(math.tanh(w)) for w in ws)
    out = []
    for w in ws:
        unit = math.tanh(w) / (2 * largest) + 0.5
        out.append(largest * (2 * round_half_even(unit * steps) / steps - 1))
    return out
