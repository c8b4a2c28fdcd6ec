"""Fully connected layer whose weight and input are quantized."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..quantization import Quantizer, QuantSpec
from ..quantization.precision import in_own_precision
from .from_float import take_over


class QuantLinear(nn.Linear):
    """A ``torch.nn.Linear`` with ``weight_quantizer`` and ``input_quantizer``; parameter names are the float layer's.

    Made by :meth:`from_float`.
    """

    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None

    @classmethod
    def from_float(cls, linear: nn.Linear, weight: QuantSpec, input: QuantSpec | None) -> QuantLinear:
        """Builds a quantized layer around the parameters of a float one (shared, not copied).

        Args:
            linear: the float layer.
            weight: spec of the weight quantizer.
            input: spec of the input quantizer; None where the input is exact.
        """
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        return take_over(layer, linear, weight, input, linear.out_features)

    def quantized_weight(self) -> Tensor:
        """Returns the fake-quantized weight, ``(out_features, in_features)``."""
        return self.weight_quantizer(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, in_features)`` to ``(N, out_features)``."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return in_own_precision(F.linear, self.input_quantizer, x, self.quantized_weight(), self.bias)
