"""LSQ: learned step size quantization (Esser et al., arXiv 1902.08153)."""

from __future__ import annotations

import torch
from torch import nn

from ..functional import floor_scale, integer_range
from ..observer import Statistics, initial_scale
from ..quantizer import AffineGrid, Quantizer
from ..spec import QuantSpec


class LSQQuantizer(Quantizer):
    """LSQ: ``scale * round(clamp(x / scale, quant_min, quant_max))`` with a learned ``scale``.

    The gradient of the scale is the paper's equation 3. Deviations:

    - The paper's factor ``1 / sqrt(N quant_max)``, which balances the steps of scales and weights under SGD, is left
      out. The optimizer steps scales by a share of their size (:class:`aqdet.engine.solver.RelativeStep`), to which a
      factor makes no difference.
    - The first scale may come from any calibration method, not only from ``2 mean|x| / sqrt(quant_max)``.
    - A scale that training drives below ``SCALE_EPS`` acts as this number.
    - Each channel may have a scale of its own.
    """

    gradient: str | None = "lsq"

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__(spec, num_channels)
        self.quant_min, self.quant_max = integer_range(spec.num_bits, spec.signed)
        self.scale = nn.Parameter(torch.ones(self.num_scales))

    def _set_range(self, statistics: Statistics, method: str) -> None:
        """Sets ``scale`` in place, see :func:`~aqdet.quantization.observer.initial_scale`."""
        self.scale.copy_(initial_scale(statistics, self.quant_min, self.quant_max, method))

    def grid(self) -> AffineGrid:
        """See :meth:`Quantizer.grid`."""
        return AffineGrid(floor_scale(self.scale), self.quant_min, self.quant_max)
