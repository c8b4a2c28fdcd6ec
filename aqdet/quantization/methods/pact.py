"""PACT: parameterized clipping activation (Choi et al., arXiv 1805.06085)."""

from __future__ import annotations

import torch
from torch import nn

from ..functional import floor_scale, integer_range
from ..observer import Statistics, initial_scale
from ..quantizer import AffineGrid, Quantizer
from ..spec import QuantSpec


class PACTQuantizer(Quantizer):
    """Clips to ``[0, alpha]`` and quantizes uniformly with step ``alpha / (2^b - 1)``; alpha is learned.

    ``d y / d alpha`` is 1 where ``x >= alpha`` and 0 elsewhere. The optimizer gives ``alpha`` a weight decay
    of its own (``MODEL.QUANT.PACT_ALPHA_DECAY``), the paper's L2 term.

    Deviations:

    - The paper's method is for activations after ReLU. Signed sites and weights clip to ``[-alpha, alpha]`` with step
      ``alpha / (2^(b-1) - 1)``, and the gradient is -1 at ``x <= -alpha``.
    - The first alpha comes from calibration, and weights may have one for each channel.
    - The decay is decoupled from the gradient; the paper's L2 term is part of it.
    """

    gradient: str | None = "pact"

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__(spec, num_channels)
        self.quant_min, self.quant_max = integer_range(spec.num_bits, spec.signed, True)
        self.alpha = nn.Parameter(torch.ones(self.num_scales))

    def _set_range(self, statistics: Statistics, method: str) -> None:
        """Sets ``alpha`` in place, see :func:`~aqdet.quantization.observer.initial_scale`."""
        scale = initial_scale(statistics, self.quant_min, self.quant_max, method)
        self.alpha.copy_(scale * self.quant_max)

    def grid(self) -> AffineGrid:
        """See :meth:`Quantizer.grid`."""
        scale = floor_scale(self.alpha.float() / self.quant_max)
        return AffineGrid(scale, self.quant_min, self.quant_max)
