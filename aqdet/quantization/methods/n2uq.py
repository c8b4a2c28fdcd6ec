"""N2UQ: learned input thresholds, uniform output values (Liu et al., CVPR 2022, arXiv 2111.14826)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..functional import apply, floor_scale, integer_range, value_dtype
from ..observer import Statistics, initial_scale
from ..quantizer import Quantizer
from ..spec import IntegerTensor, QuantSpec
from .thresholds import count_below, sum_by_index

MIN_INTERVAL = 1e-3
"""Shortest interval, in output steps."""


class _ThresholdQuantize(torch.autograd.Function):
    """Computes ``scale * (quant_min + number of thresholds below x)``, with the generalized straight-through gradient.

    Backward differentiates the piecewise linear function that rises by one step over each interval, the
    expectation of a stochastic quantizer, in place of the stairs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, start: Tensor, intervals: Tensor, quant_min: int) -> Tensor:
        ctx.save_for_backward(x, scale, start, intervals)
        ctx.quant_min = quant_min
        codes = _codes(x, _thresholds(start, intervals), quant_min)
        return codes.mul_(scale).to(value_dtype(x.dtype, quant_min, quant_min + len(intervals)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, start, intervals = ctx.saved_tensors
        flat, flat_grad = x.float().flatten(), grad.float().flatten()
        dscale = torch.dot(_codes(flat, _thresholds(start, intervals), ctx.quant_min), flat_grad)
        knots = _knots(start, intervals)
        # Interval of each element: 0 below the first, n + 1 above the last, where the slope is 0.
        index = count_below(flat[None], knots[None])[0]
        dx = pad(scale / intervals, (1, 1)).index_select(0, index).mul_(flat_grad)
        # For each interval: the sum of dx, and of dx times the share of the interval that lies below x.
        below = (flat - pad(knots, (1, 0)).index_select(0, index)).mul_(dx)
        size = len(knots) + 1
        sums = sum_by_index(dx, index, size)[1:-1]
        shares = sum_by_index(below, index, size)[1:-1] / intervals
        # A longer interval is less steep, and moves those after it to the right.
        after = sums.sum() - _running_sums(sums)
        dintervals = -(shares + after).float()
        return dx.view_as(x).to(x.dtype), dscale, -sums.sum().float(), dintervals, None


def _running_sums(values: Tensor) -> Tensor:
    """Computes the ``cumsum`` of a short vector, which torch's own is not deterministic for on a GPU."""
    return (values * torch.ones_like(values).expand(len(values), -1).tril()).sum(dim=1)


def _knots(start: Tensor, intervals: Tensor) -> Tensor:
    """Returns the ``(n + 1,)`` ends of the intervals, ascending."""
    return torch.cat([start.reshape(1), start + _running_sums(intervals)])


def _thresholds(start: Tensor, intervals: Tensor) -> Tensor:
    """Returns the ``(n,)`` middles of the intervals, where the output steps up."""
    knots = _knots(start, intervals)
    return (knots[1:] + knots[:-1]) / 2


def _codes(x: Tensor, thresholds: Tensor, quant_min: int) -> Tensor:
    count = count_below(x.float().reshape(1, -1), thresholds[None])
    return count.add_(quant_min).float().view(x.shape)


class N2UQQuantizer(Quantizer):
    """Uniform values ``scale * code``; the code steps up at ``2^b - 1`` learned thresholds. For activations.

    The thresholds are the middles of consecutive intervals of learned lengths ``intervals`` from ``start`` on.
    The gradient is that of the piecewise linear function through the interval ends (G-STE): for x
    ``scale / interval``, and accordingly for the interval lengths and the start; for the scale it is the code.

    Deviations:

    - The paper also learns a factor of the input, which thresholds with a free start and free lengths make redundant.
    - The paper starts from the range [0, 2]; here calibration gives a uniform start.
    - The floor of a length passes the gradient on.
    - Signed sites use the two's complement codes; unsigned ones include the ReLU.
    - The paper's weight quantizer and its biases around PReLU are left out.

    An output is ``scale`` times an integer with zero point 0, so that the convolution after it is an integer
    one. But a code is not ``round(x / scale)``: a runtime has to compare with :meth:`thresholds`.
    """

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__(spec, num_channels)
        self.quant_min, self.quant_max = integer_range(spec.num_bits, spec.signed)
        self.scale = nn.Parameter(torch.ones(1))
        self.start = nn.Parameter(torch.full((1,), float(self.quant_min)))
        self.intervals = nn.Parameter(torch.ones(2**spec.num_bits - 1))

    @property
    def num_constants(self) -> int:
        """See :attr:`Quantizer.num_constants`."""
        return 1 + self.intervals.numel()

    def _set_range(self, statistics: Statistics, method: str) -> None:
        """Starts as the uniform quantizer of :func:`~aqdet.quantization.observer.initial_scale`."""
        scale = initial_scale(statistics, self.quant_min, self.quant_max, method)
        self.scale.copy_(scale)
        self.start.copy_(scale * self.quant_min)
        self.intervals.copy_(scale.expand_as(self.intervals))

    def _effective(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns scale and start, 0-dim, and the interval lengths, as forward uses them."""
        scale = floor_scale(self.scale).reshape(())
        shortest = MIN_INTERVAL * scale.detach()
        # Straight-through above a floor that is in units of the step.
        intervals = floor_scale(self.intervals)
        intervals = intervals + (shortest - intervals.detach()).clamp(min=0)
        return scale, self.start.float().reshape(()), intervals

    @torch.no_grad()
    def thresholds(self) -> Tensor:
        """Returns ``(2^b - 1,)`` ascending thresholds; the code is ``quant_min`` plus the number of those below x."""
        _, start, intervals = self._effective()
        return _thresholds(start, intervals)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.fake_quantize`."""
        scale, start, intervals = self._effective()
        x = x if self.spec.signed else torch.relu(x)
        return apply(_ThresholdQuantize, x, scale, start, intervals, self.quant_min)

    @torch.no_grad()
    def to_integer(self, x: Tensor) -> IntegerTensor:
        """See :meth:`Quantizer.to_integer`; the codes come from the thresholds."""
        scale, start, intervals = self._effective()
        x = x if self.spec.signed else torch.relu(x)
        codes = _codes(x, _thresholds(start, intervals), self.quant_min)
        return IntegerTensor(codes.to(torch.int32), scale.clone(), 0)
