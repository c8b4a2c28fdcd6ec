"""Convolution of quantized operands with the memory of a float convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import value_dtype
from ..kernels import keeps_less, plain
from ..precision import autocast_dtype, in_own_precision
from ..quantizer import AffineGrid
from .elementwise import fake_quantized, quantize_to_bytes, recipe_gradients, recipe_quantized
from .integer import IntegerWeight, integer_conv2d, largest_integer_weight, pack_weight
from .moments import Moments, norm_gradients, normalized, quantized_norm_gradients
from .norm import Activation, Deferred, computed, defer, defer_behind, defers_behind
from .recipe import Recipe, recipe_of
from .sharing import operands_of
from .weight import WeightRecipe, integer_weight, kept_weight, recipe_of_weight, usable_grid


class Geometry(NamedTuple):
    """The positions that a convolution reads: the arguments of ``torch.conv2d`` after the bias."""

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
    recipe: Recipe | None
    deferred: Deferred | None
    has_input: bool
    has_reader: bool


class _QuantizedConv2d(torch.autograd.Function):
    """Keeps the operands before quantization, and quantizes them again in backward.

    Its input is ``x``, or where that is deferred, the input of the norm which ``x`` is the output of, or the token that
    stands for ``x``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        packed: IntegerWeight | None,
        options: _Options,
        *weight_tensors: Tensor,
    ) -> Tensor:
        recipe, deferred = options.recipe, options.deferred
        assert recipe is not None  # None is what backward sees
        moments = (None,) * 5 if deferred is None else deferred.moments
        # Without what is saved, which options would keep alive.
        ctx.options = options._replace(recipe=None, deferred=None)
        ctx.norm = None if deferred is None else (deferred.eps, deferred.group)
        ctx.dtypes = x.dtype, recipe.dtype
        ctx.save_for_backward(*recipe[:3], norm_weight, *moments, scale, *weight_tensors)
        ctx.bias_size, ctx.bias_dtype = (None, None) if bias is None else (list(bias.shape), bias.dtype)
        quant_min, quant_max = options.grid.quant_min, options.grid.quant_max
        if packed is not None:
            codes = quantize_to_bytes(Recipe(x) if options.has_input else recipe, scale, quant_min, quant_max)
            return integer_conv2d(codes, -quant_min, scale, packed, bias, *options.geometry)
        weight, _ = options.replay_weight(*weight_tensors, dtype=options.dtype)
        if options.has_input:
            x_q = fake_quantized(x, scale, quant_min, quant_max, options.dtype)
        else:
            x_q = recipe_quantized(recipe, scale, quant_min, quant_max, options.dtype)
        bias = None if bias is None else bias.to(options.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return torch.conv2d(x_q, weight, bias, *options.geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        base, factor, shift, norm_weight, *rest = ctx.saved_tensors
        moments, scale, weight_tensors = rest[:5], rest[5], rest[6:]
        x_dtype, recipe_dtype = ctx.dtypes
        recipe = Recipe(base, factor, shift, recipe_dtype)
        grid, gradient, geometry, dtype, replay_weight = ctx.options[:5]
        is_raw = ctx.options.has_reader  # quantization and norm have their gradients computed with others'
        options = scale, grid.quant_min, grid.quant_max
        weight, weight_gradients = replay_weight(*weight_tensors, dtype=dtype)
        x_q = recipe_quantized(recipe, *options, dtype)
        if weight.numel() > x_q.numel():
            # Channels last would have the weight and its gradient converted.
            grad, x_q = grad.contiguous(), x_q.contiguous()
        needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        needs_weight = any(ctx.needs_input_grad[7:])
        grad_x_q, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            x_q,
            weight,
            ctx.bias_size,
            list(geometry.stride),
            list(geometry.padding),
            list(geometry.dilation),
            False,
            [0, 0],
            geometry.groups,
            [needs_x, needs_weight, ctx.bias_size is not None],
        )
        del x_q
        dx = dscale = dnorm_weight = dnorm_bias = None
        if needs_x and is_raw:
            dx = grad_x_q.to(x_dtype)
        elif needs_x and ctx.norm is None:
            dx, dscale = recipe_gradients(grad_x_q, recipe, *options, gradient, x_dtype)
        elif needs_x:
            dx, dnorm_weight, dnorm_bias, dscale = quantized_norm_gradients(
                grad_x_q, base, norm_weight, Moments(*moments), *(*ctx.norm, *options, gradient)
            )
        grads: Sequence[Tensor | None] = [None] * len(weight_tensors)
        if needs_weight:  # its gradient may come along with the bias's
            grads = weight_gradients(grad_weight.contiguous())
        grad_bias = None if grad_bias is None else grad_bias.to(ctx.bias_dtype)
        return dx, dscale, grad_bias, dnorm_weight, dnorm_bias, None, None, *grads


def quantized_conv2d(
    x: Activation,
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
        x: ``(N, C, H, W)``; where it is deferred it is computed while it is quantized.
        grid: the grid of ``x``, with one scale.
        weight: the recipe of the quantized weight, ``(O, C / groups, kH, kW)``.
        bias: ``(O,)`` or None.
        geometry: stride, padding, dilation and groups.
        gradient: the gradient of the scale, ``"lsq"`` or ``"pact"``.
        dtype: the precision of the convolution; the weight's if None, unless it is too coarse for the grid.
        packed: the quantized weight from :func:`~.integer.pack_weight`, for a float32 convolution in integer
            arithmetic; equal to the float one but for its rounding.

    Returns:
        ``(N, O, H', W')``.
    """
    dtype = dtype or value_dtype(weight.tensors[0].dtype, grid.quant_min, grid.quant_max)
    inputs: tuple[Tensor, Tensor | None, Tensor | None]
    deferred, has_reader = None, False
    if not isinstance(x, Deferred):
        recipe, inputs = recipe_of(x), (x, None, None)
    elif x.token is not None:
        recipe, inputs, has_reader = x.recipe, (x.token, None, None), x.reader is not None
    else:
        recipe, inputs, deferred = x.recipe, (x.x, x.weight, x.bias), x
    grid_alone = grid._replace(scale=grid.scale.detach())
    has_input = not isinstance(x, Deferred)
    options = _Options(grid_alone, gradient, geometry, dtype, weight.replay, recipe, deferred, has_input, has_reader)
    scale = grid.scale.reshape(())
    return _QuantizedConv2d.apply(inputs[0], scale, bias, *inputs[1:], packed, options, *weight.tensors)


class _RecomputingConv2d(torch.autograd.Function):
    """A convolution in float of a deferred norm's ReLU: keeps the norm's input, and computes its own in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        deferred: Deferred,
        geometry: Geometry,
        dtype: torch.dtype,
    ) -> Tensor:
        x = deferred.x.detach()
        ctx.save_for_backward(x, norm_weight, weight, *deferred.moments)
        ctx.norm, ctx.geometry, ctx.dtype = (deferred.eps, deferred.group), geometry, dtype
        ctx.bias_size, ctx.bias_dtype = (None, None) if bias is None else (list(bias.shape), bias.dtype)
        y, bias = normalized(x, deferred.moments, True).to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return torch.conv2d(y, weight.to(dtype), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, weight, *values = ctx.saved_tensors
        moments = Moments(*values)
        stride, padding, dilation, groups = ctx.geometry
        operands = grad, normalized(x, moments, True).to(ctx.dtype), weight.to(ctx.dtype), ctx.bias_size
        places = list(stride), list(padding), list(dilation), False, [0, 0], groups
        needs = [True, ctx.needs_input_grad[3], ctx.bias_size is not None]
        dy, dweight, dbias = torch.ops.aten.convolution_backward(*operands, *places, needs)
        del operands
        dweight = None if dweight is None else dweight.to(weight.dtype)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        rest = dweight, dbias, None, None, None
        if norm_weight is None:  # the ReLU and the norm have their gradients computed with others'
            return dy.to(x.dtype), None, None, *rest
        eps, group = ctx.norm
        return *norm_gradients(dy, x, norm_weight, moments, eps, group, True), *rest


def has_hooks(module: nn.Module) -> bool:
    """Returns whether somebody reads what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def can_recompute(layer: nn.Module) -> bool:
    """Returns whether a layer is a convolution in float, without a norm, whose input backward can compute again."""
    return (
        isinstance(layer, nn.Conv2d)
        and not hasattr(layer, "weight_quantizer")
        and getattr(layer, "norm", None) is None
        and getattr(layer, "activation", None) is None
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def recomputing_conv2d(layer: Any, x: Deferred) -> Tensor:
    """Computes a convolution in float of the ReLU of a norm's output, of which neither is kept."""
    weight, bias = operands_of(layer)
    geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
    inputs = (x.x, x.weight, x.bias) if x.token is None else (x.token, None, None)
    assert x.token is None or x.reader is not None
    return _RecomputingConv2d.apply(*inputs, weight, bias, x, geometry, autocast_dtype(layer.weight))


def conv2d(layer: Any, x: Tensor) -> Tensor:
    """Computes the forward of a :class:`aqdet.layers.QuantConv2d`: ``(N, C, H, W)`` to ``(N, O, H', W')``."""
    return computed(deferred_conv2d(layer, x))


def deferred_conv2d(layer: Any, x: Activation) -> Activation:
    """Computes :func:`conv2d` but for the last step where the layer ends in a batch norm."""
    if not layer.weight_quantizer.is_active:
        return plain("conv2d")(layer, computed(x))
    out = _stem(layer, x)
    if out is None:
        out = _convolve(layer, x)
        if layer.norm is not None:
            out = defer(layer.norm, out)
    return out if layer.activation is None else layer.activation(computed(out))


def _laid_out(x: Tensor) -> Tensor:
    """Returns ``x`` in the layout of the integer convolutions that follow; norms and pooling are faster in it, too."""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cpu else x


def _float_conv2d(x: Tensor, *args: Any) -> Tensor:
    return torch.conv2d(_laid_out(x), *args)


def _stem(layer: Any, x: Activation) -> Activation | None:
    """Computes a layer that reads the image but for the last step of its norm, if backward is to convolve it again.

    The image has fewer values than what is computed from it, and few channels. None for any other layer.
    """
    if not keeps_less():
        return None
    if isinstance(x, Deferred) or x.requires_grad or layer.input_quantizer is not None:
        return None
    if layer.norm is None or layer.bias is not None or not defers_behind(layer.norm, x, layer.weight):
        return None
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    return defer_behind(layer.norm, _laid_out(x), layer.quantized_weight(), geometry)


def _convolve(layer: Any, x: Activation) -> Tensor:
    geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
    grid = usable_grid(layer.input_quantizer)
    if grid is None:
        value, quantizer = computed(x), layer.input_quantizer
        if quantizer is not None:
            value = quantizer(value)
        return in_own_precision(_float_conv2d, quantizer, value, layer.quantized_weight(), layer.bias, *geometry)
    # A shared weight is alive until the backward of the last call in any case.
    shared = layer.shared_weight
    weight = recipe_of_weight(layer.weight_quantizer, layer.weight) if shared is None else kept_weight(shared)
    dtype = packed = None
    source = x.x if isinstance(x, Deferred) else x
    if torch.is_autocast_enabled(source.device.type):
        dtype = layer.input_quantizer.value_dtype(torch.get_autocast_dtype(source.device.type))
    elif layer.training and source.is_cpu and layer.weight.dtype == torch.float32:
        packed = _packed_weight(layer, source, grid, geometry)
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
