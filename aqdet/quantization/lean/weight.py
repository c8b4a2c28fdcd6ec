"""Weights: quantized again in backward, and as integer codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import broadcast_scale, quantize
from ..methods.dorefa import DoReFaWeightQuantizer, largest_magnitude
from ..methods.lsqodd import LSQOddQuantizer, odd_codes, odd_gradients, prepared
from ..quantizer import AffineGrid, Quantizer
from .elementwise import fake_quantized, scale_gradients
from .integer import IntegerWeight
from .parts import join_sums, split_parts
from .sharing import grid_of


class WeightRecipe(NamedTuple):
    """Recipe of a quantized weight, which forward and backward compute from the weight before quantization.

    Attributes:
        tensors: differentiable tensors, the weight before quantization first.
        replay: maps ``tensors`` and ``dtype=`` to the quantized weight in it and a function that maps the gradient of
            that to those of ``tensors``; without autograd.
    """

    tensors: tuple[Tensor, ...]
    replay: Callable[..., tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]]


def usable_grid(quantizer: Quantizer | None) -> AffineGrid | None:
    """Returns the grid of a quantizer that runs, if fake quantization on it is all that the quantizer does."""
    return grid_of(quantizer) if quantizer is not None and is_usable(quantizer) else None


def is_usable(quantizer: Quantizer | None) -> bool:
    """Returns whether a quantizer runs and has a grid, which costs nothing to know; see :func:`usable_grid`."""
    return quantizer is not None and quantizer.is_active and quantizer.gradient is not None


def _dorefa_codes(squashed: Tensor, num_bits: int, per_channel: bool, out: Tensor) -> Tensor:
    """Writes the codes of ``squashed = tanh(w)`` to ``out``, in parts; returns the scale."""
    magnitude = largest_magnitude(squashed, per_channel)
    steps = 2**num_bits - 1
    for m, squashed_part, out_part in split_parts(magnitude, squashed, out):
        codes = squashed_part / (2 * m)
        out_part.copy_(codes.add_(0.5).mul_(steps).round_().mul_(2).sub_(steps))
    return magnitude / steps


def _dorefa_values(w: Tensor, squashed: Tensor, num_bits: int, per_channel: bool) -> Tensor:
    values = torch.empty_like(w, dtype=torch.float32)
    return values.mul_(_dorefa_codes(squashed, num_bits, per_channel, values)).to(w.dtype)


def _tanh_gradient(grad: Tensor, squashed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.aten.tanh_backward(grad.float(), squashed).to(dtype)


class _DoReFaWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, num_bits: int, per_channel: bool) -> Tensor:
        ctx.save_for_backward(w)
        return _dorefa_values(w, torch.tanh(w.float()), num_bits, per_channel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        return _tanh_gradient(grad, torch.tanh(w.float()), w.dtype), None, None


def dorefa_weight(w: Tensor, num_bits: int, per_channel: bool) -> Tensor:
    """Computes :func:`aqdet.quantization.methods.dorefa.dorefa_weight`, keeping the weight alone."""
    return _DoReFaWeight.apply(w, num_bits, per_channel)


def _write_odd_codes(x: Tensor, scale: Tensor, num_bits: int, out: Tensor) -> None:
    """Writes the odd codes of ``x`` to ``out``, in parts."""
    for s, x_part, out_part in split_parts(scale, x, out):
        out_part.copy_(odd_codes(x_part / s, num_bits))


def _odd_recipe(quantizer: LSQOddQuantizer, weight: Tensor) -> WeightRecipe:
    spec = quantizer.spec

    def replay(w: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
        x = prepared(w, spec)

        def gradients(grad: Tensor) -> Sequence[Tensor]:
            dx, sums = torch.empty_like(x), []
            for s, grad_part, x_part, dx_part in split_parts(scale, grad.float(), x, dx):
                found, dscale = odd_gradients(grad_part, x_part, s, spec.num_bits)
                dx_part.copy_(found)
                sums.append(dscale)
            return prepared(dx, spec).to(w.dtype), join_sums(sums, scale)

        values = torch.empty_like(x)
        _write_odd_codes(x, scale, spec.num_bits, values)
        return values.mul_(scale / 2).to(w.dtype).to(dtype), gradients

    return WeightRecipe((weight, quantizer.broadcast_scale(weight)), replay)


def kept_weight(weight: Tensor) -> WeightRecipe:
    """Returns the recipe of a quantized weight that is kept itself."""
    return WeightRecipe((weight,), lambda w, dtype: (w.to(dtype), lambda grad: (grad.to(w.dtype),)))


def recipe_of_weight(quantizer: Quantizer, weight: Tensor) -> WeightRecipe:
    """Returns what ``quantizer(weight)`` is computed from; where it cannot be computed again, that itself."""
    spec = quantizer.spec
    if isinstance(quantizer, DoReFaWeightQuantizer) and quantizer.is_active:

        def replay_dorefa(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
            squashed = torch.tanh(w.float())
            values = _dorefa_values(w, squashed, spec.num_bits, spec.per_channel)
            return values.to(dtype), lambda grad: (_tanh_gradient(grad, squashed, w.dtype),)

        return WeightRecipe((weight,), replay_dorefa)
    if isinstance(quantizer, LSQOddQuantizer) and quantizer.is_active:
        return _odd_recipe(quantizer, weight)
    grid, gradient = usable_grid(quantizer), quantizer.gradient
    if grid is None or gradient is None:
        return kept_weight(quantizer(weight))
    low, high = grid.quant_min, grid.quant_max

    def replay(w: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
        def gradients(grad: Tensor) -> Sequence[Tensor]:
            return scale_gradients(grad, w, scale, low, high, gradient, w.dtype)

        return fake_quantized(w, scale, low, high, dtype), gradients

    return WeightRecipe((weight, broadcast_scale(grid.scale, weight)), replay)


@torch.no_grad()
def integer_weight(quantizer: Quantizer, weight: Tensor, largest: int = 128) -> IntegerWeight | None:
    """Returns ``quantizer(weight)`` as int8 codes for integer kernels; None if it has no such form.

    Args:
        quantizer: the weight's quantizer.
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
        scale = _dorefa_codes(torch.tanh(weight.float()), spec.num_bits, spec.per_channel, codes)
    elif isinstance(quantizer, LSQOddQuantizer):
        if 2**quantizer.spec.num_bits - 1 > largest:
            return None
        scale = quantizer.broadcast_scale(weight)
        _write_odd_codes(prepared(weight, quantizer.spec), scale, quantizer.spec.num_bits, codes)
        scale = scale / 2
    else:
        grid = usable_grid(quantizer)
        if grid is None or grid.quant_max > 127 or max(-grid.quant_min, grid.quant_max) > largest:
            return None
        scale = broadcast_scale(grid.scale, weight)
        for s, weight_part, codes_part in split_parts(scale, weight, codes):
            codes_part.copy_(quantize(weight_part, s, grid.quant_min, grid.quant_max))
    return IntegerWeight(codes, scale.reshape(-1).expand(len(weight)).contiguous())
