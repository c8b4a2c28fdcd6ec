"""Transposed convolution whose weight and input are quantized."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..quantization import Quantizer, QuantSpec
from ..quantization.precision import in_own_precision
from .from_float import take_over


def output_first(layer: Any) -> Tensor:
    """Returns the weight of a layer as its quantizer reads it, with output channels for the first axis: a view."""
    weight: Tensor = layer.weight
    return weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight


class QuantConvTranspose2d(nn.ConvTranspose2d):
    """A ``torch.nn.ConvTranspose2d`` with ``weight_quantizer`` and ``input_quantizer``.

    Parameter names are the float layer's. Made by :meth:`from_float`.
    """

    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None

    @classmethod
    def from_float(cls, deconv: nn.ConvTranspose2d, weight: QuantSpec, input: QuantSpec | None) -> QuantConvTranspose2d:
        """Builds a quantized layer around the parameters of a float one (shared, not copied).

        Args:
            deconv: the float layer.
            weight: spec of the weight quantizer.
            input: spec of the input quantizer; None where the input is exact.

        Raises:
            ValueError: for groups, whose output channels lie in two axes of the weight.
        """
        if deconv.groups != 1:
            raise ValueError(f"a transposed convolution with {deconv.groups} groups cannot be quantized")
        layer = cls(
            deconv.in_channels,
            deconv.out_channels,
            deconv.kernel_size,  # type: ignore[arg-type]
            stride=deconv.stride,  # type: ignore[arg-type]
            padding=deconv.padding,  # type: ignore[arg-type]
            output_padding=deconv.output_padding,  # type: ignore[arg-type]
            dilation=deconv.dilation,  # type: ignore[arg-type]
            bias=deconv.bias is not None,
            device="meta",
        )
        return take_over(layer, deconv, weight, input, deconv.out_channels)

    def quantized_weight(self) -> Tensor:
        """Returns the fake-quantized weight, ``(C, O, kH, kW)``."""
        return self.weight_quantizer(output_first(self)).transpose(0, 1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps ``(N, C, H, W)`` to ``(N, O, H', W')``.

        Raises:
            ValueError: for an ``output_size``, which is given by ``output_padding`` here.
        """
        if output_size is not None:
            raise ValueError(f"output_size must be None, got {output_size}")
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        geometry = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        operation, weight = F.conv_transpose2d, self.quantized_weight()
        return in_own_precision(operation, self.input_quantizer, x, weight, self.bias, *geometry)
