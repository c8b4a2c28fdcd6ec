"""Convolution of quantized operands with the memory of a float convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import quantize
from ..kernels import plain
from ..quantizer import AffineGrid
from .elementwise import fake_quantized, quantize_to_bytes, recipe_gradients
from .integer import IntegerWeight, integer_conv2d, largest_integer_weight, pack_weight
from .norm import normalize
from .recipe import Recipe, recipe_of
from .weight import WeightRecipe, integer_weight, recipe_of_weight, usable_grid


class Geometry(NamedTuple):
    """Where a convolution reads: the arguments of ``torch.conv2d`` after the bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Options(NamedTuple):
    grid: AffineGrid
    gradient: str
    geometry: Geometry
    dtype: torch.dtype
    compute_weight: Callable[..., Tensor] | None


class _QuantizedConv2d(torch.autograd.Function):
    """Keeps the operands before quantization, and quantizes them again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        packed: IntegerWeight | None,
        input_recipe: Recipe,
        weight_recipe: WeightRecipe | None,
        options: _Options,
    ) -> Tensor:
        kept = (weight,) if weight_recipe is None else weight_recipe.tensors
        ctx.save_for_backward(*input_recipe, scale, *kept)
        ctx.options = options
        ctx.x_dtype = x.dtype
        ctx.weight_dtype = weight.dtype
        ctx.bias_size = None if bias is None else list(bias.shape)
        quant_min, quant_max = options.grid.quant_min, options.grid.quant_max
        if packed is not None:
            codes = quantize_to_bytes(x, scale, quant_min, quant_max)
            return integer_conv2d(codes, -quant_min, scale, packed, bias, *options.geometry)
        x_q = fake_quantized(x, scale, quant_min, quant_max, options.dtype)
        bias = None if bias is None else bias.to(options.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return torch.conv2d(x_q, weight.to(options.dtype), bias, *options.geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        base, factor, shift, scale, *kept = ctx.saved_tensors
        recipe = Recipe(base, factor, shift)
        grid, gradient, geometry, dtype, compute_weight = ctx.options
        weight = kept[0] if compute_weight is None else compute_weight(*kept)
        x_q = torch.empty_like(base, dtype=dtype)
        for part, (out_part,) in recipe.parts(x_q):
            torch.mul(quantize(part.compute(), scale, grid.quant_min, grid.quant_max), scale, out=out_part)
        if weight.numel() > x_q.numel():
            # Channels last would have the weight and its gradient converted.
            grad, x_q = grad.contiguous(), x_q.contiguous()
        needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        needs_weight = ctx.needs_input_grad[2]
        grad_x_q, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            x_q,
            weight.to(dtype),
            ctx.bias_size,
            list(geometry.stride),
            list(geometry.padding),
            list(geometry.dilation),
            False,
            [0, 0],
            geometry.groups,
            [needs_x, needs_weight, ctx.bias_size is not None],
        )
        dx = dscale = None
        if needs_x:
            dx, dscale = recipe_gradients(grad_x_q, recipe, scale, grid.quant_min, grid.quant_max, gradient)
            dx = dx.to(ctx.x_dtype)
        # The weight's gradient may come along with the bias's.
        grad_weight = grad_weight.to(ctx.weight_dtype).contiguous() if needs_weight else None
        grad_bias = None if grad_bias is None else grad_bias.to(ctx.weight_dtype)
        return dx, dscale, grad_weight, grad_bias, None, None, None, None


def quantized_conv2d(
    x: Tensor,
    grid: AffineGrid,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    gradient: str,
    dtype: torch.dtype | None = None,
    weight_recipe: WeightRecipe | None = None,
    packed: IntegerWeight | None = None,
) -> Tensor:
    """Computes ``conv2d(fake_quantize(x, *grid), weight, bias)`` with the memory of a float convolution.

    A convolution keeps its operands for backward, and here these would be quantized copies beside the
    originals. This one keeps the originals and quantizes again in backward, which costs some element-wise
    passes and gives the same values to the bit.

    Args:
        x: ``(N, C, H, W)``.
        grid: of ``x``, with one scale.
        weight: ``(O, C / groups, kH, kW)``, quantized.
        bias: ``(O,)`` or None.
        geometry: stride, padding, dilation and groups.
        gradient: ``"lsq"`` or ``"pact"``, that of the scale.
        dtype: in which the convolution runs; that of ``weight`` if None.
        weight_recipe: what ``weight`` is computed from again in backward; None to keep it.
        packed: ``weight`` from :func:`~.integer.pack_weight`, for a float32 convolution in integer arithmetic; equal
            to the float one but for its rounding.

    Returns:
        ``(N, O, H', W')``.
    """
    compute = None if weight_recipe is None else weight_recipe.compute
    options = _Options(grid._replace(scale=grid.scale.detach()), gradient, geometry, dtype or weight.dtype, compute)
    scale = grid.scale.reshape(())
    return _QuantizedConv2d.apply(x, scale, weight, bias, packed, recipe_of(x), weight_recipe, options)


def conv2d(layer: Any, x: Tensor) -> Tensor:
    """Computes the forward of a :class:`aqdet.layers.QuantConv2d`: ``(N, C, H, W)`` to ``(N, O, H', W')``."""
    if not layer.weight_quantizer.is_active:
        return plain("conv2d")(layer, x)
    x = _convolve(layer, x)
    if layer.norm is not None:
        x = normalize(layer.norm, x)
    return x if layer.activation is None else layer.activation(x)


def _convolve(layer: Any, x: Tensor) -> Tensor:
    geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
    grid = usable_grid(layer.input_quantizer)
    if grid is None:
        if layer.input_quantizer is not None:
            x = layer.input_quantizer(x)
        if x.is_cpu:
            # The layout of the integer convolutions that follow, in which norms and pooling are faster too.
            x = x.contiguous(memory_format=torch.channels_last)
        return torch.conv2d(x, layer.quantized_weight(), layer.bias, *geometry)
    weight = layer.quantized_weight()
    dtype = packed = None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    elif layer.training and x.is_cpu and weight.dtype == torch.float32:
        packed = _packed_weight(layer, weight, x, grid, geometry)
    # A shared weight is alive until the last call's backward in any case.
    recipe = None if weight is layer.shared_weight else recipe_of_weight(layer.weight_quantizer, layer.weight)
    return quantized_conv2d(
        x,
        grid,
        weight,
        layer.bias,
        geometry,
        gradient=layer.input_quantizer.gradient,
        dtype=dtype,
        weight_recipe=recipe,
        packed=packed,
    )


def _packed_weight(layer: Any, weight: Tensor, x: Tensor, grid: AffineGrid, geometry: Geometry) -> IntegerWeight | None:
    """Returns the weight for a convolution in integer arithmetic; None where the CPU or the method has none."""
    largest = largest_integer_weight(grid.quant_max - grid.quant_min)
    if not largest:
        return None
    packed: IntegerWeight | None = getattr(weight, "aqdet_packed", None)  # of an earlier call, where it is shared
    if packed is None:
        packed = integer_weight(layer.weight_quantizer, layer.weight, largest)
        if packed is not None:
            packed = pack_weight(packed, x.shape, *geometry)
            if weight is layer.shared_weight:
                weight.aqdet_packed = packed  # type: ignore[attr-defined]
    return packed
