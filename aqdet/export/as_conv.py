"""Fully connected layers and 2x2 deconvolutions as the convolutions that they are."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from ..layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from ..quantization import Quantizer

BLOCK = 2
"""Side of the square that a deconvolution makes of a value."""


@dataclasses.dataclass(frozen=True)
class AsConv:
    """A layer of another kind as the convolution that the export reads.

    Attributes:
        weight: The weight, ``(O, C, kH, kW)``, a view of the layer's.
        bias: The layer's own bias.
    """

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    out_channels: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    norm: None = None
    activation: None = None


def linear_as_conv(layer: nn.Module, name: str, channels: int) -> AsConv:
    """Returns a fully connected layer over ``(channels, S, S)`` as an SxS convolution without padding.

    Raises:
        ValueError: in one line that names the layer, if it is in float.
    """
    if not isinstance(layer, QuantLinear):
        raise ValueError(_in_float(layer, name))
    side = round((layer.in_features / channels) ** 0.5)
    weight = layer.weight.view(layer.out_features, channels, side, side)
    return AsConv(weight, layer.bias, layer.weight_quantizer, layer.input_quantizer, layer.out_features)


def deconv_as_conv(layer: nn.Module, name: str) -> AsConv:
    """Returns a 2x2 deconvolution with stride 2 with its weight as ``(O, C, 2, 2)``: a 1x1 convolution for each place.

    Raises:
        ValueError: in one line that names the layer, if it is in float or another kind of deconvolution.
    """
    if not isinstance(layer, QuantConvTranspose2d):
        raise ValueError(_in_float(layer, name))
    shape: tuple[Any, ...] = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.dilation)
    if shape != ((BLOCK, BLOCK), (BLOCK, BLOCK), (0, 0), (0, 0), (1, 1)):
        raise ValueError(f"layer {name}: export knows deconvolutions of 2x2 with stride 2 and no padding, got {shape}")
    weight = layer.weight.transpose(0, 1)
    return AsConv(weight, layer.bias, layer.weight_quantizer, layer.input_quantizer, layer.out_channels)


def quantized_conv(module: Any, name: str) -> QuantConv2d | AsConv:
    """Returns a module that is a quantized convolution, or stands for one.

    Raises:
        ValueError: in one line that names the layer, if it is in float.
    """
    if not isinstance(module, QuantConv2d | AsConv):
        raise ValueError(_in_float(module, name))
    return module


def _in_float(module: Any, name: str) -> str:
    return (
        f"layer {name} is in float ({type(module).__name__}): MODEL.QUANT.ENABLED must be True, and no "
        "MODEL.QUANT.RULES may leave it out, for a detector that runs on integers"
    )
