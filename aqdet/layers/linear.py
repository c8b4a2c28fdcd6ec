"""Fully connected layer whose weight and input are quantized."""

from __future__ import annotations

from torch import Tensor, nn

from ..quantization import Quantizer, QuantSpec, build_quantizer


class QuantLinear(nn.Linear):
    """``torch.nn.Linear`` with ``weight_quantizer`` and ``input_quantizer``; parameter names are the float layer's.

    Made by :meth:`from_float`.
    """

    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None

    @classmethod
    def from_float(cls, linear: nn.Linear, weight: QuantSpec, input: QuantSpec | None, path: str = "") -> QuantLinear:
        """Builds a quantized layer around the parameters of a float one (shared, not copied).

        Args:
            linear: the float layer.
            weight: spec of the weight quantizer.
            input: spec of the input quantizer; None where the input is exact.
            path: dotted name of the layer in the model, for messages.
        """
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer.weight_quantizer = build_quantizer(weight, num_channels=linear.out_features)
        layer.weight_quantizer.path = f"{path}.weight_quantizer"
        layer.input_quantizer = None
        if input is not None:
            layer.input_quantizer = build_quantizer(input)
            layer.input_quantizer.path = f"{path}.input_quantizer"
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_features)`` to ``(N, out_features)``."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return nn.functional.linear(x, self.weight_quantizer(self.weight), self.bias)
