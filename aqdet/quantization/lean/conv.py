"""Convolution of quantized operands with the memory of a float convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import plain
from ..quantizer import AffineGrid
from .elementwise import fake_quantized, quantize_to_bytes, recipe_gradients, recipe_quantized
from .integer import IntegerWeight, integer_conv2d, largest_integer_weight, pack_weight
from .norm import normalize
from .recipe import Recipe, recipe_of
from .weight import WeightRecipe, integer_weight, kept_weight, recipe_of_weight, usable_grid


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
    replay_weight: Callable[..., tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]]


class _QuantizedConv2d(torch.autograd.Function):
    """Keeps the operands before quantization, and quantizes them again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        packed: IntegerWeight | None,
        input_recipe: Recipe,
        options: _Options,
        *weight_tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*input_recipe, scale, *weight_tensors)
        ctx.options = options
        ctx.x_dtype = x.dtype
        ctx.bias_size, ctx.bias_dtype = (None, None) if bias is None else (list(bias.shape), bias.dtype)
        quant_min, quant_max = options.grid.quant_min, options.grid.quant_max
        if packed is not None:
            codes = quantize_to_bytes(x, scale, quant_min, quant_max)
            return integer_conv2d(codes, -quant_min, scale, packed, bias, *options.geometry)
        weight, _ = options.replay_weight(*weight_tensors)
        x_q = fake_quantized(x, scale, quant_min, quant_max, options.dtype)
        bias = None if bias is None else bias.to(options.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return torch.conv2d(x_q, weight.to(options.dtype), bias, *options.geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        base, factor, shift, scale, *weight_tensors = ctx.saved_tensors
        recipe = Recipe(base, factor, shift)
        grid, gradient, geometry, dtype, replay_weight = ctx.options
        weight, weight_gradients = replay_weight(*weight_tensors)
        x_q = recipe_quantized(recipe, scale, grid.quant_min, grid.quant_max, dtype)
        if weight.numel() > x_q.numel():
            # Channels last would have the weight and its gradient converted.
            grad, x_q = grad.contiguous(), x_q.contiguous()
        needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        needs_weight = any(ctx.needs_input_grad[6:])
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
        grads: Sequence[Tensor | None] = [None] * len(weight_tensors)
        if needs_weight:  # its gradient may come along with the bias's
            grads = weight_gradients(grad_weight.to(weight.dtype).contiguous())
        grad_bias = None if grad_bias is None else grad_bias.to(ctx.bias_dtype)
        return dx, dscale, grad_bias, None, None, None, *grads


def quantized_conv2d(
    x: Tensor,
    grid: AffineGrid,
    weight: WeightRecipe,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    gradient: str,
    dtype: torch.dtype | None = None,
    packed: IntegerWeight | None = None,
) -> Tensor:
    """Computes ``conv2d(fake_quantize(x, *grid), weight, bias)`` with the memory of a float convolution.

    A convolution keeps its operands for backward, and here these would be quantized copies beside the
    originals. This one keeps the originals and quantizes again in backward, which costs some element-wise
    passes and gives the same values to the bit.

    Args:
        x: ``(N, C, H, W)``.
        grid: of ``x``, with one scale.
        weight: what the quantized weight, ``(O, C / groups, kH, kW)``, is computed from.
        bias: ``(O,)`` or None.
        geometry: stride, padding, dilation and groups.
        gradient: ``"lsq"`` or ``"pact"``, that of the scale.
        dtype: in which the convolution runs; that of ``weight`` if None.
        packed: the quantized weight from :func:`~.integer.pack_weight`, for a float32 convolution in integer
            arithmetic; equal to the float one but for its rounding.

    Returns:
        ``(N, O, H', W')``.
    """
    dtype = dtype or weight.tensors[0].dtype
    options = _Options(grid._replace(scale=grid.scale.detach()), gradient, geometry, dtype, weight.replay)
    return _QuantizedConv2d.apply(x, grid.scale.reshape(()), bias, packed, recipe_of(x), options, *weight.tensors)


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
    # A shared weight is alive until the backward of the last call in any case.
    shared = layer.shared_weight
    weight = recipe_of_weight(layer.weight_quantizer, layer.weight) if shared is None else kept_weight(shared)
    dtype = packed = None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    elif layer.training and x.is_cpu and layer.weight.dtype == torch.float32:
        packed = _packed_weight(layer, x, grid, geometry)
    return quantized_conv2d(
        x,
        grid,
        weight,
        layer.bias,
        geometry,
        gradient=layer.input_quantizer.gradient,
        dtype=dtype,
        packed=packed,
    )


def _packed_weight(layer: Any, x: Tensor, grid: AffineGrid, geometry: Geometry) -> IntegerWeight | None:
    """Returns the weight for a convolution in integer arithmetic; None where the CPU or the method has none."""
    largest = largest_integer_weight(grid.quant_max - grid.quant_min)
    if not largest:
        return None
    shared = layer.shared_weight
    packed: IntegerWeight | None = getattr(shared, "aqdet_packed", None)  # of an earlier call
    if packed is None:
        packed = integer_weight(layer.weight_quantizer, layer.weight, largest)
        if packed is not None:
            packed = pack_weight(packed, x.shape, *geometry)
            if shared is not None:
                shared.aqdet_packed = packed
    return packed
