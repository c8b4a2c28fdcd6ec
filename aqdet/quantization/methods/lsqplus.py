"""LSQ+: a learned step and a learned offset (Bhalgat et al., arXiv 2004.09576)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import SCALE_EPS, apply, floor_scale, value_dtype
from ..observer import SMALLEST_FRACTION, Statistics, initial_scale
from ..quantizer import AffineGrid
from ..spec import IntegerTensor, QuantSpec
from .lsq import LSQQuantizer

_NUM_COARSE, _NUM_FINE = 40, 12


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, largest: int) -> Tensor:
    """Computes ``clamp(round(x / scale) + zero_point, 0, largest) - zero_point``, float32."""
    return (x.float() / scale).round_().clamp_(-zero_point, largest - zero_point)


class _FakeQuantizeOffset(torch.autograd.Function):
    """Fake quantization with LSQ+'s gradients; keeps the input alone for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, zero_point: Tensor, largest: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.largest = largest
        return _quantize(x, scale, zero_point, largest).mul_(scale).to(value_dtype(x.dtype, 0, largest))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        grad = grad.float()
        ratio = x.float() / scale + zero_point
        dx = grad.masked_fill((ratio <= 0) | (ratio >= ctx.largest), 0)
        clipped = grad - dx
        above = clipped.masked_fill(ratio <= ctx.largest / 2, 0).sum()
        residual = _quantize(x, scale, zero_point, ctx.largest).add_(zero_point).sub_(ratio)
        dscale = (residual * dx).sum() + above * ctx.largest
        return dx.to(x.dtype), dscale, clipped.sum(), None, None


class LSQPlusQuantizer(LSQQuantizer):
    """LSQ+: ``scale * round(clamp((x - offset) / scale, 0, 2^b - 1)) + offset``, for activations that can be negative.

    Gradients as in the paper, with ``v = (x - offset) / scale``: for the scale ``round(v) - v`` inside the
    range, 0 below and ``2^b - 1`` above it; for the offset 0 inside and 1 outside; for x 1 inside.

    Deviations:

    - In forward the offset acts as ``-scale * zero_point``, where ``zero_point = round(-offset / scale)`` is
      clamped to the codes, and its gradient passes straight through. So zero is always on the grid: padding
      stays exact, and the integer form has an integer zero point.
    - Where a site is declared unsigned there is no offset, and this is LSQ: nothing below zero is to be
      represented, and an offset above zero would take zero off the grid.
    - The first range comes from the calibration method: ``"minmax"`` and ``"percentile"`` look at either side
      of zero apart, ``"mse"`` searches both bounds, ``"mean"`` starts from LSQ's symmetric range.
    """

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__(spec, num_channels)
        self.largest = 2**spec.num_bits - 1
        self.offset: nn.Parameter | None = nn.Parameter(torch.zeros(1)) if spec.signed else None
        if spec.signed:
            self.gradient = None

    @property
    def num_constants(self) -> int:
        """See :attr:`Quantizer.num_constants`."""
        return self.num_scales + (self.offset is not None)

    def _set_range(self, statistics: Statistics, method: str) -> None:
        """Sets ``scale`` and ``offset`` in place, see the class."""
        super()._set_range(statistics, method)
        if self.offset is None:
            return
        if method != "mean":
            low, high = _bounds(statistics, "minmax" if method == "mse" else method)
            if method == "mse":
                low, high = _search_bounds(statistics, low, high, self.largest)
            if high > low:
                self.scale.copy_(((high - low) / self.largest).clamp(min=SCALE_EPS))
                self.offset.copy_(low)
                return
        self.offset.copy_(self.scale * self.quant_min)

    def _zero_point(self, scale: Tensor) -> Tensor:
        assert self.offset is not None
        return (-self.offset.detach().float() / scale.detach()).round().clamp(0, self.largest).reshape(())

    def value_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See :meth:`Quantizer.value_dtype`; with an offset all codes may be on one side of zero."""
        return value_dtype(dtype, 0, self.largest)

    def grid(self) -> AffineGrid:
        """See :meth:`Quantizer.grid`; the range is shifted so that the code of zero is 0."""
        grid = super().grid()
        if self.offset is None:
            return grid
        zero_point = int(self._zero_point(grid.scale))
        return grid._replace(quant_min=-zero_point, quant_max=self.largest - zero_point)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.fake_quantize`."""
        if self.offset is None:
            return super().fake_quantize(x)
        scale = floor_scale(self.scale).reshape(())
        offset = self.offset.float().reshape(())
        return apply(_FakeQuantizeOffset, x, scale, offset, self._zero_point(scale), self.largest)

    @torch.no_grad()
    def to_integer(self, x: Tensor) -> IntegerTensor:
        """See :meth:`Quantizer.to_integer`; with an offset, codes are unsigned and have a zero point."""
        if self.offset is None:
            return super().to_integer(x)
        scale = floor_scale(self.scale).reshape(())
        zero_point = self._zero_point(scale)
        codes = _quantize(x, scale, zero_point, self.largest) + zero_point
        return IntegerTensor(codes.to(torch.int32), scale.clone(), int(zero_point))


def _bounds(statistics: Statistics, method: str) -> tuple[Tensor, Tensor]:
    """Returns bounds at or around zero by ``"minmax"`` or ``"percentile"``, each side alone."""
    bounds = []
    for sign in (-1, 1):
        side = Statistics(statistics.values * sign, statistics.counts, 0.0)
        bound = initial_scale(side, 0, 1, method)[0]
        bounds.append(sign * bound if (side.values > 0).any() else torch.zeros_like(bound))
    return bounds[0], bounds[1]


def _search_bounds(statistics: Statistics, low: Tensor, high: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Returns the pair of bounds of least squared error over the decades that ``search_fractions`` searches."""
    values, counts = statistics.values, statistics.counts
    best = (math.inf, low, high)
    coarse = torch.logspace(math.log10(SMALLEST_FRACTION), 0, _NUM_COARSE)
    fine = torch.logspace(-1, 1, _NUM_FINE, base=SMALLEST_FRACTION ** (-1 / (_NUM_COARSE - 1)))
    for stage in (coarse, fine):
        centre = (low, high) if stage is coarse else best[1:]
        for lower in (stage * centre[0]).clamp(min=low.item()).unique():
            upper = (stage * centre[1]).clamp(max=high.item()).unique()
            scale = ((upper - lower) / largest).clamp(min=SCALE_EPS)[:, None]
            zero_point = (-lower / scale).round().clamp(0, largest)
            fake = _quantize(values, scale, zero_point, largest) * scale
            errors = ((fake - values).square() * counts).sum(dim=1)
            error, index = errors.min(dim=0)
            if error.item() < best[0]:
                best = (error.item(), lower, upper[index])
    return best[1], best[2]
