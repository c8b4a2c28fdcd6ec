"""Fake quantization that keeps as little as possible for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import check_gradient, quantize, value_dtype
from ..kernels import replaceable
from .parts import join_sums, split_parts, sum_to
from .recipe import Recipe, note_recipe, recipe_of


@replaceable("fake_quantized")
def fake_quantized(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> Tensor:
    """Quantizes and dequantizes in parts, without gradients."""
    out = torch.empty_like(x, dtype=dtype)
    for s, x_part, out_part in split_parts(scale, x, out):
        torch.mul(quantize(x_part, s, quant_min, quant_max), s, out=out_part)
    return out


@replaceable("recipe_quantized")
def recipe_quantized(recipe: Recipe, scale: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> Tensor:
    """Computes :func:`fake_quantized` of an activation that is computed from its recipe, with a 0-dim scale."""
    out = torch.empty_like(recipe.base, dtype=dtype)
    for part, (out_part,) in recipe.parts(out):
        torch.mul(quantize(part.compute(), scale, quant_min, quant_max), scale, out=out_part)
    return out


@replaceable("recipe_codes")
def recipe_codes(
    recipe: Recipe, scale: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes :func:`recipe_quantized` and the codes, int8 or uint8."""
    out = torch.empty_like(recipe.base, dtype=dtype)
    codes = torch.empty_like(out, dtype=code_type(quant_min))
    for part, (out_part, codes_part) in recipe.parts(out, codes):
        values = quantize(part.compute(), scale, quant_min, quant_max)
        torch.mul(values, scale, out=out_part)
        to_bytes(values, codes_part, quant_max)
    return out, codes


def code_type(quant_min: int) -> torch.dtype:
    """Returns the type of codes of a byte."""
    return torch.int8 if quant_min < 0 else torch.uint8


def to_bytes(codes: Tensor, out: Tensor, quant_max: int) -> None:
    """Writes float codes that fit into ``out``, int8 or uint8; changes ``codes``.

    A conversion to int8 is vectorised, one to uint8 is not.
    """
    if out.dtype == torch.uint8 and quant_max > 127:
        out.view(torch.int8).copy_(codes.sub_(128))
        out.bitwise_xor_(128)
    else:
        out.view(torch.int8).copy_(codes)


def quantize_to_bytes(recipe: Recipe, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Computes ``quantize(...) - quant_min`` as uint8, for a range of at most 256 codes and a 0-dim scale."""
    out = torch.empty_like(recipe.base, dtype=torch.uint8)
    for part, (out_part,) in recipe.parts(out):
        codes = quantize(part.compute(), scale, quant_min, quant_max)
        to_bytes(codes.sub_(quant_min) if quant_min else codes, out_part, quant_max - quant_min)
    return out


@replaceable("scale_gradients")
def scale_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, gradient: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes :func:`aqdet.quantization.functional.scale_gradients` in parts; the gradient of ``x`` has ``dtype``."""
    grad = grad.float()
    dx = torch.empty_like(grad)
    sums = [
        _part_gradients(grad_part, x_part.float(), s, quant_min, quant_max, gradient, dx_part)
        for s, grad_part, x_part, dx_part in split_parts(scale, grad, x, dx)
    ]
    return dx.to(dtype), join_sums(sums, scale)


@replaceable("recipe_gradients")
def recipe_gradients(
    grad: Tensor, recipe: Recipe, scale: Tensor, quant_min: int, quant_max: int, gradient: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes :func:`scale_gradients` for an activation that is computed again, with a 0-dim scale."""
    grad = grad.float()
    dx = torch.empty_like(grad)
    sums = [
        _part_gradients(grad_part, part.compute(), scale, quant_min, quant_max, gradient, dx_part)
        for part, (grad_part, dx_part) in recipe.parts(grad, dx)
    ]
    return dx.to(dtype), join_sums(sums, scale)


def _part_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, gradient: str, dx: Tensor
) -> Tensor:
    """Computes the gradients of one part; writes ``dx`` and returns ``dscale``.

    Float operations alone: a multiplication by a boolean mask is forty times slower on a CPU.
    """
    hardtanh_backward = torch.ops.aten.hardtanh_backward
    ratio = x / scale
    hardtanh_backward.grad_input(grad, ratio, quant_min, quant_max, grad_input=dx)
    if gradient == "lsq":
        inside = hardtanh_backward(ratio, ratio, quant_min, quant_max)
        products = ratio.clamp_(quant_min, quant_max).round_().sub_(inside).mul_(grad)
    else:
        # Clipped gradients times the bound they were clipped at.
        products = ratio.clamp_(quant_min, quant_max).round_().mul_(grad - dx)
    return sum_to(products, scale)


class _KeepInput(torch.autograd.Function):
    """Keeps the input, or its recipe, for backward and computes everything from it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, gradient: str, recipe: Recipe
    ) -> Tensor:
        ctx.save_for_backward(scale, *recipe[:3])
        ctx.options = quant_min, quant_max, gradient, x.dtype
        ctx.recipe_dtype = recipe.dtype
        return fake_quantized(x, scale, quant_min, quant_max, value_dtype(x.dtype, quant_min, quant_max))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, base, factor, shift = ctx.saved_tensors
        if scale.dim() == 0:
            dx, dscale = recipe_gradients(grad, Recipe(base, factor, shift, ctx.recipe_dtype), scale, *ctx.options)
        else:
            dx, dscale = scale_gradients(grad, base, scale, *ctx.options)
        return dx, dscale, None, None, None, None


@replaceable("region_quantized")
def region_quantized(
    x: Tensor, scale: Tensor, quant_min: int, quant_max: int, with_codes: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantizes and dequantizes in parts, without gradients; also returns where each value lies, and its code.

    Returns:
        The quantized ``x``; uint8 0 at or below ``quant_min``, 1 inside, 2 at or above ``quant_max``; int8 or uint8
        codes, or None.
    """
    region = torch.empty_like(x, dtype=torch.uint8)
    out = torch.empty_like(x, dtype=value_dtype(x.dtype, quant_min, quant_max))
    codes = torch.empty_like(x, dtype=code_type(quant_min)) if with_codes else None
    for s, x_part, region_part, out_part, *codes_part in split_parts(
        scale, x, region, out, *(() if codes is None else (codes,))
    ):
        ratio = x_part.float() / s
        inside_or_above = (ratio > quant_min).view(torch.uint8)
        torch.add(inside_or_above, (ratio >= quant_max).view(torch.uint8), out=region_part)
        ratio.clamp_(quant_min, quant_max).round_()
        torch.mul(ratio, s, out=out_part)
        if codes_part:
            to_bytes(ratio, codes_part[0], quant_max)
    return out, region, codes


@replaceable("region_gradients")
def region_gradients(
    grad: Tensor, region: Tensor, scale: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes PACT's gradients from the regions of :func:`region_quantized`; the input's gradient has ``dtype``."""
    grad = grad.float()
    dx = torch.empty_like(grad)
    sums = []
    for s, grad_part, region_part, dx_part in split_parts(scale, grad, region, dx):
        where = region_part.float()
        torch.ops.aten.hardtanh_backward.grad_input(grad_part, where, 0, 2, grad_input=dx_part)
        clipped = grad_part - dx_part
        above = torch.ops.aten.threshold_backward(clipped, where, 1)
        above_sum, clipped_sum = sum_to(above, s), sum_to(clipped, s)
        sums.append(above_sum * quant_max + (clipped_sum - above_sum) * quant_min)
    return dx.to(dtype), join_sums(sums, scale)


class _KeepRegion(torch.autograd.Function):
    """Keeps where each value lies, a byte an element, which PACT's gradient needs.

    A second result is the codes as bytes, if they are asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, with_codes: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, region, codes = region_quantized(x, scale, quant_min, quant_max, with_codes)
        ctx.save_for_backward(region, scale)
        ctx.options = quant_min, quant_max, x.dtype
        if codes is not None:
            ctx.mark_non_differentiable(codes)
        return out, codes

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        region, scale = ctx.saved_tensors
        dx, dscale = region_gradients(grad, region, scale, *ctx.options)
        return dx, dscale, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    gradient: str = "lsq",
    note_codes: bool = False,
) -> Tensor:
    """Computes :func:`aqdet.quantization.functional.fake_quantize`.

    Args:
        x, scale, quant_min, quant_max, gradient: see there.
        note_codes: whether to note the codes as the recipe of the result, for layers that read it. A 0-dim
            scale and ``gradient="pact"`` only.

    Returns:
        A tensor like ``x``. For backward the recipe of ``x`` is kept if that was noted; otherwise LSQ keeps
        ``x`` itself (which the layer before keeps anyway), PACT one byte an element unless ``x`` is a parameter.
    """
    check_gradient(gradient)
    recipe = recipe_of(x) if scale.dim() == 0 else Recipe(x, dtype=x.dtype)
    if gradient == "pact" and (note_codes or (recipe.base is x and not isinstance(x, torch.nn.Parameter))):
        note_codes &= torch.is_grad_enabled() and x.requires_grad
        y, codes = _KeepRegion.apply(x, scale, quant_min, quant_max, note_codes)
        return y if codes is None else note_recipe(y, Recipe(codes, scale.detach(), None, y.dtype))
    return _KeepInput.apply(x, scale, quant_min, quant_max, gradient, recipe)
