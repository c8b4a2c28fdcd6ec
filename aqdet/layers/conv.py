"""Convolution whose weight and input are quantized."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..quantization import AffineGrid, Quantizer, QuantSpec, build_quantizer, conv2d_fake_quantized
from ..quantization.lean.integer import IntegerWeight, largest_integer_weight, pack_weight
from ..quantization.lean.norm import normalize


@dataclasses.dataclass(frozen=True)
class Site:
    """What the structure knows of a convolution or fully connected layer before any policy.

    Attributes:
        signed: whether its input can be negative.
        role: ``"inner"``, ``"stem"`` (reads the uint8 image, which needs no quantizer) or ``"prediction"``.
    """

    signed: bool
    role: str = "inner"


def declare_site(layer: nn.Conv2d | nn.Linear, *, signed: bool, role: str = "inner") -> None:
    """Marks a layer as one that a quantization policy is to convert."""
    layer.quant_site = Site(signed, role)  # type: ignore[assignment]


def forget_sites(module: nn.Module) -> None:
    """Takes back what :func:`declare_site` marked below ``module``: it stays in float, out of every policy's reach."""
    for layer in module.modules():
        vars(layer).pop("quant_site", None)


@dataclasses.dataclass
class _SharedWeight:
    """A quantized weight for several calls of a layer, and the same packed for integer arithmetic once used."""

    weight: Tensor
    packed: IntegerWeight | None = None


class QuantConv2d(Conv2d):
    """Detectron2's ``Conv2d`` with ``weight_quantizer`` and ``input_quantizer``.

    Parameter names are those of the float layer (``weight``, ``bias``, ``norm``). Zero padding is applied to
    the quantized input, so that a padded value is exactly zero. Made by :meth:`from_float`.
    """

    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    _shared: _SharedWeight | None = None

    @classmethod
    def from_float(cls, conv: nn.Conv2d, weight: QuantSpec, input: QuantSpec | None, path: str = "") -> QuantConv2d:
        """Builds a quantized layer around the parameters of a float one (shared, not copied).

        Args:
            conv: ``torch.nn.Conv2d`` or Detectron2's.
            weight: spec of the weight quantizer.
            input: spec of the input quantizer; None where the input is exact, as a uint8 image is.
            path: dotted name of the layer in the model, for messages.

        Raises:
            ValueError: if the padding is not with zeros, or is given by name.
        """
        if conv.padding_mode != "zeros":
            raise ValueError(f"{path}: padding_mode {conv.padding_mode!r} cannot be quantized")
        if isinstance(conv.padding, str):
            raise ValueError(f"{path}: padding {conv.padding!r} cannot be quantized, give it as numbers")
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
        layer.weight = conv.weight
        layer.bias = conv.bias
        layer.weight_quantizer = build_quantizer(weight, num_channels=conv.out_channels)
        layer.weight_quantizer.path = f"{path}.weight_quantizer"
        layer.input_quantizer = None
        if input is not None:
            layer.input_quantizer = build_quantizer(input)
            layer.input_quantizer.path = f"{path}.input_quantizer"
        return layer.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, O, H', W')``, with norm and activation where the layer has them."""
        x = self._convolve(x)
        if self.norm is not None:
            x = normalize(self.norm, x) if self.weight_quantizer.is_active else self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _convolve(self, x: Tensor) -> Tensor:
        quantizer = self.input_quantizer
        grid = None
        if quantizer is not None and quantizer.is_active:
            grid = quantizer.fused_grid()
        geometry = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }
        if grid is None:
            if quantizer is not None:
                x = quantizer(x)
            weight = self._shared.weight if self._shared else self.weight_quantizer(self.weight)
            if self.weight_quantizer.is_active and x.is_cpu:
                # The layout of the integer convolutions that follow, in which norms and pooling are faster too.
                x = x.contiguous(memory_format=torch.channels_last)
            return torch.conv2d(x, weight, self.bias, **geometry)
        dtype = None
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        recompute: dict[str, Any] = {}
        if self._shared:
            weight = self._shared.weight
        elif self.weight_quantizer.updates_in_forward:
            weight = self.weight_quantizer(self.weight)
        else:
            weight = self.weight
            recompute = {
                "quantize_weight": self.weight_quantizer,
                "weight_parameters": tuple(self.weight_quantizer.parameters()),
            }
        return conv2d_fake_quantized(
            x,
            grid.scale.reshape(()),
            weight,
            self.bias,
            grid.quant_min,
            grid.quant_max,
            rule=grid.rule,
            dtype=dtype,
            integer_weight=self._integer_weight(x, grid) if dtype is None else None,
            **recompute,
            **geometry,
        )

    def _integer_weight(self, x: Tensor, grid: AffineGrid) -> IntegerWeight | None:
        """The weight for a convolution of ``x`` in integer arithmetic, where the CPU has it; in training only."""
        if not (self.training and x.is_cpu and self.weight.dtype == torch.float32):
            return None
        largest = largest_integer_weight(grid.quant_max - grid.quant_min)
        if not largest:
            return None
        shared = self._shared
        if shared is not None and shared.packed is not None:
            return shared.packed
        integer = self.weight_quantizer.integer_weight(self.weight, largest)
        if integer is not None:
            integer = pack_weight(integer, x.shape, self.stride, self.padding, self.dilation, self.groups)
            if shared is not None:
                shared.packed = integer
        return integer


@contextlib.contextmanager
def shared_weights(module: nn.Module) -> Iterator[None]:
    """Quantizes the weights below ``module`` once for several calls, as a head's over pyramid levels."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantConv2d)]
    try:
        for layer in layers:
            layer._shared = _SharedWeight(layer.weight_quantizer(layer.weight))
        yield
    finally:
        for layer in layers:
            layer._shared = None
