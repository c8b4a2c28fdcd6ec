"""DoReFa-Net weights and activations (Zhou et al., arXiv 1606.06160)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import SCALE_EPS, broadcast_scale, integer_range, replace_ste
from ..kernels import replaceable
from ..observer import Statistics, initial_scale
from ..quantizer import AffineGrid, Quantizer
from ..spec import IntegerTensor, QuantSpec


def largest_magnitude(squashed: Tensor, per_channel: bool) -> Tensor:
    """Returns M of the whole weight or of each channel, which broadcasts against ``squashed (O, ...)``."""
    rows = squashed.reshape(squashed.shape[0] if per_channel else 1, -1)
    # Two passes: aminmax along an axis is not vectorised.
    largest = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1))
    return broadcast_scale(largest.clamp_(min=SCALE_EPS), squashed)


def _codes(squashed: Tensor, num_bits: int, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Returns the odd integer codes, float32, and their scale."""
    magnitude = largest_magnitude(squashed, per_channel)
    steps = 2**num_bits - 1
    return (squashed / (2 * magnitude) + 0.5).mul_(steps).round_().mul_(2).sub_(steps), magnitude / steps


@replaceable("dorefa_weight")
def dorefa_weight(w: Tensor, num_bits: int, per_channel: bool) -> Tensor:
    """Fake-quantizes a weight, see :class:`DoReFaWeightQuantizer`.

    Args:
        w: ``(O, ...)``, any float dtype.
        num_bits: bit width.
        per_channel: whether each of the O channels has an M of its own.

    Returns:
        A tensor like ``w``.
    """
    squashed = torch.tanh(w.float())
    with torch.no_grad():
        codes, scale = _codes(squashed, num_bits, per_channel)
    return replace_ste(squashed, codes.mul_(scale)).to(w.dtype)


class DoReFaWeightQuantizer(Quantizer):
    """DoReFa's weights: ``2 q(tanh(w) / (2 M) + 1/2) - 1`` times ``M``, where ``M = max|tanh w|`` and q has 2^b values.

    There is no code for zero: the integers are the odd numbers from ``-(2^b - 1)`` to ``2^b - 1``, and the
    scale is ``M / (2^b - 1)``. The gradient is straight-through with M held constant: ``1 - tanh(w)^2``.

    Deviations: the paper leaves the weights in [-1, 1], which needs a normalization after the convolution;
    the factor M restores their magnitude, so that a float checkpoint still fits and the layers without
    normalization keep their output range. M may be per channel; it acts as a constant, no gradient passes through it.
    """

    def _set_range(self, statistics: Statistics, method: str) -> None:
        """Does nothing: the range follows from the weights at each forward."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.fake_quantize`."""
        return dorefa_weight(x, self.spec.num_bits, self.spec.per_channel)

    @torch.no_grad()
    def to_integer(self, x: Tensor) -> IntegerTensor:
        """See :meth:`Quantizer.to_integer`; codes are odd and take ``num_bits + 1`` bits as they stand."""
        codes, scale = _codes(torch.tanh(x.float()), self.spec.num_bits, self.spec.per_channel)
        return IntegerTensor(codes.to(torch.int32), scale, 0)


class DoReFaInputQuantizer(Quantizer):
    """DoReFa's activations: ``q(clip(a, 0, 1))`` with a fixed clipping range in place of 1.

    Deviations: the paper clips to [0, 1], which cuts off most of what a detector's BN + ReLU puts out; the
    range here is chosen once by calibration and then fixed (a range of 1 is the paper). Signed sites clip
    to a symmetric range. The gradient is straight-through inside the range.
    """

    gradient: str | None = "pact"
    scale: Tensor

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__(spec, num_channels)
        self.quant_min, self.quant_max = integer_range(spec.num_bits, spec.signed, True)
        self.register_buffer("scale", torch.full((1,), 1 / self.quant_max))

    def _set_range(self, statistics: Statistics, method: str) -> None:
        self.scale.copy_(initial_scale(statistics, self.quant_min, self.quant_max, method))

    def grid(self) -> AffineGrid:
        """See :meth:`Quantizer.grid`."""
        return AffineGrid(self.scale.float(), self.quant_min, self.quant_max)
