"""Convolution whose weight and input are quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..quantization import Quantizer, QuantSpec
from ..quantization.kernels import replaceable
from ..quantization.precision import in_own_precision
from .from_float import take_over


class QuantConv2d(Conv2d):
    """Detectron2's ``Conv2d`` with ``weight_quantizer`` and ``input_quantizer``.

    Parameter names are those of the float layer (``weight``, ``bias``, ``norm``). Zero padding is applied to
    the quantized input, so that a padded value is exactly zero. Made by :meth:`from_float`.

    Attributes:
        shared_weight: the quantized weight of a layer that is called several times, see :func:`shared_weights`.
    """

    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    shared_weight: Tensor | None = None

    @classmethod
    def from_float(cls, conv: nn.Conv2d, weight: QuantSpec, input: QuantSpec | None) -> QuantConv2d:
        """Builds a quantized layer around the parameters of a float one (shared, not copied).

        Args:
            conv: ``torch.nn.Conv2d`` or Detectron2's.
            weight: spec of the weight quantizer.
            input: spec of the input quantizer; None where the input is exact, as a uint8 image is.

        Raises:
            ValueError: if the padding is not with zeros, or is given by name.
        """
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode {conv.padding_mode!r} cannot be quantized")
        if isinstance(conv.padding, str):
            raise ValueError(f"padding {conv.padding!r} cannot be quantized, give it as numbers")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            norm=getattr(conv, "norm", None),
            activation=getattr(conv, "activation", None),
            device="meta",
        )
        return take_over(layer, conv, weight, input, conv.out_channels)

    def quantized_weight(self) -> Tensor:
        """Returns the fake-quantized weight, ``(O, C / groups, kH, kW)``."""
        return self.weight_quantizer(self.weight) if self.shared_weight is None else self.shared_weight

    @replaceable("conv2d")
    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C, H, W)`` to ``(N, O, H', W')``, with norm and activation where the layer has them."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight = self.quantized_weight()
        geometry = self.stride, self.padding, self.dilation, self.groups
        x = in_own_precision(F.conv2d, self.input_quantizer, x, weight, self.bias, *geometry)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


@replaceable("shared_weights")
@contextlib.contextmanager
def shared_weights(module: nn.Module) -> Iterator[None]:
    """Quantizes the weights of the convolutions below ``module`` once for several calls, as over pyramid levels."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantConv2d)]
    try:
        for layer in layers:
            # Not by setattr, which would register the Parameter that a quantizer returns when it is switched off.
            layer.__dict__["shared_weight"] = layer.weight_quantizer(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("shared_weight", None)
