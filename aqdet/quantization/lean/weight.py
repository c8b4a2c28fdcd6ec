"""Weights: quantized again in backward, and as integer codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import broadcast_scale, quantize
from ..methods.dorefa import DoReFaWeightQuantizer, largest_magnitude
from ..quantizer import AffineGrid, Quantizer
from .elementwise import fake_quantized
from .integer import IntegerWeight
from .parts import split_parts


class WeightRecipe(NamedTuple):
    """What a quantized weight can be computed from again: ``compute(*tensors)``, to the bit."""

    tensors: Sequence[Tensor]
    compute: Callable[..., Tensor]


def usable_grid(quantizer: Quantizer | None) -> AffineGrid | None:
    """Returns the grid of a quantizer that runs, if fake quantization on it is all that the quantizer does."""
    if quantizer is None or not quantizer.is_active or quantizer.gradient is None:
        return None
    return quantizer.grid()


def _dorefa_codes(w: Tensor, num_bits: int, per_channel: bool, out: Tensor) -> Tensor:
    """Writes the codes to ``out``, in parts; returns the scale."""
    squashed = torch.tanh(w.float())
    magnitude = largest_magnitude(squashed, per_channel)
    steps = 2**num_bits - 1
    for m, squashed_part, out_part in split_parts(magnitude, squashed, out):
        codes = squashed_part / (2 * m)
        out_part.copy_(codes.add_(0.5).mul_(steps).round_().mul_(2).sub_(steps))
    return magnitude / steps


def _dorefa_values(w: Tensor, num_bits: int, per_channel: bool) -> Tensor:
    values = torch.empty_like(w, dtype=torch.float32)
    scale = _dorefa_codes(w, num_bits, per_channel, values)
    return values.mul_(scale).to(w.dtype)


class _DoReFaWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, num_bits: int, per_channel: bool) -> Tensor:
        ctx.save_for_backward(w)
        return _dorefa_values(w, num_bits, per_channel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad.float(), torch.tanh(w.float())).to(w.dtype), None, None


def dorefa_weight(w: Tensor, num_bits: int, per_channel: bool) -> Tensor:
    """Computes :func:`aqdet.quantization.methods.dorefa.dorefa_weight`, keeping the weight alone."""
    return _DoReFaWeight.apply(w, num_bits, per_channel)


def recipe_of_weight(quantizer: Quantizer, weight: Tensor) -> WeightRecipe | None:
    """Returns what ``quantizer(weight)`` can be computed from again; None if it cannot."""
    if not quantizer.is_active:
        return None
    spec = quantizer.spec
    if isinstance(quantizer, DoReFaWeightQuantizer):
        return WeightRecipe((weight,), lambda w: _dorefa_values(w, spec.num_bits, spec.per_channel))
    grid = usable_grid(quantizer)
    if grid is None:
        return None
    scale = broadcast_scale(grid.scale.detach(), weight)
    low, high = grid.quant_min, grid.quant_max
    return WeightRecipe((weight, scale), lambda w, s: fake_quantized(w, s, low, high, w.dtype))


@torch.no_grad()
def integer_weight(quantizer: Quantizer, weight: Tensor, largest: int = 128) -> IntegerWeight | None:
    """Returns ``quantizer(weight)`` as int8 codes for integer kernels; None if it has no such form.

    Args:
        quantizer: of the weight.
        weight: ``(O, ...)``.
        largest: largest magnitude that a code may have.
    """
    if not quantizer.is_active:
        return None
    codes = torch.empty_like(weight, dtype=torch.int8)
    if isinstance(quantizer, DoReFaWeightQuantizer):
        spec = quantizer.spec
        if 2**spec.num_bits - 1 > min(largest, 127):
            return None
        scale = _dorefa_codes(weight, spec.num_bits, spec.per_channel, codes)
    else:
        grid = usable_grid(quantizer)
        if grid is None or grid.quant_max > 127 or max(-grid.quant_min, grid.quant_max) > largest:
            return None
        scale = broadcast_scale(grid.scale, weight)
        for s, weight_part, codes_part in split_parts(scale, weight, codes):
            codes_part.copy_(quantize(weight_part, s, grid.quant_min, grid.quant_max))
    return IntegerWeight(codes, scale.reshape(-1).expand(len(weight)).contiguous())
