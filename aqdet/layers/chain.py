"""Layers in sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..quantization.kernels import replaceable
from .add import QuantAdd

RELU = nn.ReLU(inplace=True)
"""A ReLU of what nobody else reads, for chains; it has no state, so that all can share it."""


@replaceable("chain")
def run_chain(layers: Sequence[nn.Module], x: Tensor, other: Callable[[], Tensor] | None = None) -> Tensor:
    """Applies layers in sequence, each the only reader of the one before.

    Args:
        layers: convolutions, norms, ReLUs, quantizers of streams, sums.
        x: ``(N, C, H, W)``.
        other: computes the second operand of the sum, if there is one among the layers.
    """
    for layer in layers:
        if isinstance(layer, QuantAdd):
            assert other is not None
            x = layer(x, other())
        else:
            x = layer(x)
    return x


@replaceable("chains")
def run_chains(layers: Sequence[nn.Module], xs: Sequence[Tensor]) -> list[Tensor]:
    """Computes :func:`run_chain` of several tensors, such as the levels of a pyramid, in their order."""
    return [run_chain(layers, x) for x in xs]
