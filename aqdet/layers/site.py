"""The kinds of layers that can be quantized, and what the structure of a model knows of each such layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from .conv import QuantConv2d
from .deconv import QuantConvTranspose2d
from .linear import QuantLinear

LAYER_KINDS: dict[type[nn.Module], type[QuantConv2d] | type[QuantConvTranspose2d] | type[QuantLinear]] = {
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
}
"""Float layer -> its quantized form, which is a subclass. Any other layer with a weight is refused by name."""

Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


@dataclasses.dataclass(frozen=True)
class Site:
    """Declaration of a layer before any policy.

    Attributes:
        signed: whether its input can be negative.
        role: ``"inner"``, ``"stem"`` (reads the uint8 image, which needs no quantizer) or ``"prediction"``.
    """

    signed: bool
    role: str = "inner"


def declare_site(layer: Layer, *, signed: bool, role: str = "inner") -> None:
    """Marks a layer as one that a quantization policy is to convert."""
    layer.quant_site = Site(signed, role)  # type: ignore[assignment]


def forget_sites(module: nn.Module) -> None:
    """Takes back what :func:`declare_site` marked below ``module``: it stays in float, out of every policy's reach."""
    for layer in module.modules():
        vars(layer).pop("quant_site", None)


def weighted_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields every layer below ``module`` that multiplies by a weight, of any class, with its dotted name.

    Such a layer owns a parameter with two or more axes. Norms own vectors, and quantizers belong to their layer.
    """
    for name, layer in module.named_modules():
        if any(parameter.dim() > 1 for parameter in layer.parameters(recurse=False)):
            yield name, layer


def quantized_form(layer: nn.Module) -> type[QuantConv2d] | type[QuantConvTranspose2d] | type[QuantLinear] | None:
    """Returns the class that a layer is converted to; None if there is none."""
    return next((quantized for kind, quantized in LAYER_KINDS.items() if isinstance(layer, kind)), None)
