"""DoReFa-Net weights and activations (Zhou et al., arXiv 1606.06160)."""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import SCALE_EPS, integer_range, round_ste
from .observer import Statistics, initial_scale
from .quantizer import AffineGrid, Quantizer
from .spec import IntegerTensor, QuantSpec


class DoReFaWeightQuantizer(Quantizer):
    """``2 q(tanh(w) / (2 M) + 1/2) - 1`` times ``M``, where ``M = max|tanh w|`` and q has 2^b levels.

    There is no level at zero: the integers are the odd numbers from ``-(2^b - 1)`` to ``2^b - 1``, and the
    scale is ``M / (2^b - 1)``. The gradient is straight-through with M held constant: ``1 - tanh(w)^2``.

    Deviations: the paper leaves the weights in [-1, 1], which needs a normalization after the convolution;
    the factor M restores their magnitude, so that a float checkpoint still fits and the layers without
    normalization keep their output range. M may be per channel.
    """

    def set_range(self, statistics: Statistics, method: str) -> None:
        """Nothing to set: the range follows from the weights at each forward."""

    def _levels(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Odd integer levels (straight-through) and their scale, both float32."""
        squashed = torch.tanh(w.float())
        with torch.no_grad():
            dims = tuple(range(1, w.dim())) if self.spec.per_channel else tuple(range(w.dim()))
            magnitude = squashed.abs().amax(dim=dims, keepdim=self.spec.per_channel)
            magnitude = magnitude.clamp(min=SCALE_EPS)
        steps = 2**self.spec.num_bits - 1
        unit = squashed / (2 * magnitude) + 0.5
        return 2 * round_ste(unit * steps) - steps, magnitude / steps

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.fake_quantize`."""
        codes, scale = self._levels(x)
        return (codes * scale).to(x.dtype)

    @torch.no_grad()
    def to_integer(self, x: Tensor) -> IntegerTensor:
        """See :meth:`Quantizer.to_integer`; codes are odd and take ``num_bits + 1`` bits as they stand."""
        codes, scale = self._levels(x)
        return IntegerTensor(codes.to(torch.int32), scale, 0)


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

    def grid(self, num_shared: int | None = None) -> AffineGrid:
        """See :meth:`Quantizer.grid`."""
        return AffineGrid(self.scale, self.quant_min, self.quant_max, "pact")
