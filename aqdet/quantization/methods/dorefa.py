"""DoReFa-Net weights and activations (Zhou et al., arXiv 1606.06160)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import SCALE_EPS, broadcast_scale, integer_range
from ..lean.integer import IntegerWeight
from ..lean.recipe import split_parts
from ..observer import Statistics, initial_scale
from ..quantizer import AffineGrid, Quantizer
from ..spec import IntegerTensor, QuantSpec


def _levels(w: Tensor, num_bits: int, per_channel: bool, out: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the odd integer levels to ``out``; returns ``tanh(w)`` as float32 and the scale of the levels."""
    squashed = torch.tanh(w.float())
    rows = squashed.reshape(w.shape[0] if per_channel else 1, -1)
    # Two passes: aminmax along an axis is not vectorised.
    largest = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1))
    magnitude = broadcast_scale(largest.clamp_(min=SCALE_EPS), w)
    steps = 2**num_bits - 1
    for m, squashed_part, out_part in split_parts(magnitude, squashed, out):
        levels = squashed_part / (2 * m)
        out_part.copy_(levels.add_(0.5).mul_(steps).round_().mul_(2).sub_(steps))
    return squashed, magnitude / steps


class _DoReFaWeight(torch.autograd.Function):
    """Keeps ``tanh(w)`` for backward: computing it again would take longer than all else."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, num_bits: int, per_channel: bool) -> Tensor:
        levels = torch.empty_like(w, dtype=torch.float32)
        squashed, scale = _levels(w, num_bits, per_channel, levels)
        ctx.save_for_backward(squashed)
        ctx.w_dtype = w.dtype
        return levels.mul_(scale).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (squashed,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad.float(), squashed).to(ctx.w_dtype), None, None


class DoReFaWeightQuantizer(Quantizer):
    """``2 q(tanh(w) / (2 M) + 1/2) - 1`` times ``M``, where ``M = max|tanh w|`` and q has 2^b levels.

    There is no level at zero: the integers are the odd numbers from ``-(2^b - 1)`` to ``2^b - 1``, and the
    scale is ``M / (2^b - 1)``. The gradient is straight-through with M held constant: ``1 - tanh(w)^2``.

    Deviations: the paper leaves the weights in [-1, 1], which needs a normalization after the convolution;
    the factor M restores their magnitude, so that a float checkpoint still fits and the layers without
    normalization keep their output range. M may be per channel; it acts as a constant, no gradient passes through it.
    """

    def set_range(self, statistics: Statistics, method: str) -> None:
        """Nothing to set: the range follows from the weights at each forward."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.fake_quantize`."""
        return _DoReFaWeight.apply(x, self.spec.num_bits, self.spec.per_channel)

    @torch.no_grad()
    def to_integer(self, x: Tensor) -> IntegerTensor:
        """See :meth:`Quantizer.to_integer`; codes are odd and take ``num_bits + 1`` bits as they stand."""
        levels = torch.empty_like(x, dtype=torch.int32)
        _, scale = _levels(x, self.spec.num_bits, self.spec.per_channel, levels)
        return IntegerTensor(levels, scale, 0)

    @torch.no_grad()
    def integer_weight(self, x: Tensor, largest: int = 128) -> IntegerWeight | None:
        """See :meth:`Quantizer.integer_weight`; codes are odd, and those of 8 bits do not fit."""
        if not self.is_active or 2**self.spec.num_bits - 1 > min(largest, 127):
            return None
        levels = torch.empty_like(x, dtype=torch.int8)
        _, scale = _levels(x, self.spec.num_bits, self.spec.per_channel, levels)
        return IntegerWeight(levels, scale.reshape(-1).expand(x.shape[0]).contiguous())


class DoReFaInputQuantizer(Quantizer):
    """``q(clip(a, 0, 1))`` with a fixed clipping range in place of 1.

    Deviations: the paper clips to [0, 1], which cuts off most of what a detector's BN + ReLU puts out; the
    range here is chosen once by calibration and then fixed (a range of 1 is the paper). Signed sites clip
    to a symmetric range. The gradient is straight-through inside the range.
    """

    scale: Tensor

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__(spec, num_channels)
        self.quant_min, self.quant_max = integer_range(spec.num_bits, spec.signed, True)
        self.register_buffer("scale", torch.full((1,), 1 / self.quant_max))

    def set_range(self, statistics: Statistics, method: str) -> None:
        """Sets the fixed ``scale``, see :func:`~aqdet.quantization.observer.initial_scale`."""
        self.scale.copy_(initial_scale(statistics, self.quant_min, self.quant_max, method))

    def grid(self) -> AffineGrid:
        """See :meth:`Quantizer.grid`."""
        return AffineGrid(self.scale.float(), self.quant_min, self.quant_max, "pact")
