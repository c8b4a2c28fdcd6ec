"""Fake quantization and its gradients as operators of PyTorch, one kernel each on a GPU.

They are registered with PyTorch, so that shapes can be computed without values and a compiler can leave them whole.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from .. import functional
from ..kernels import plain
from ..lean.recipe import Recipe

HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its programs in Python, which works on tensors of a CPU, for tests."""

_library = torch.library.Library("aqdet", "DEF")
_library.define(
    "fake_quantize(Tensor base, Tensor? factor, Tensor? shift, Tensor scale, int low, int high, ScalarType dtype) "
    "-> Tensor"
)
_library.define(
    "fake_quantize_backward(Tensor grad, Tensor base, Tensor? factor, Tensor? shift, Tensor scale, int low, int high, "
    "bool is_lsq) -> (Tensor, Tensor)"
)


def _quantize(
    base: Tensor, factor: Tensor | None, shift: Tensor | None, scale: Tensor, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    from . import programs

    out = torch.empty_like(base, dtype=dtype)
    programs.quantize(base, factor, shift, scale, low, high, out)
    return out


def _gradients(
    grad: Tensor,
    base: Tensor,
    factor: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    low: int,
    high: int,
    is_lsq: bool,
) -> tuple[Tensor, Tensor]:
    from . import programs

    dx = torch.empty_like(base, dtype=torch.float32)
    if grad.stride() != dx.stride():
        grad = torch.empty_like(dx, dtype=grad.dtype).copy_(grad)
    return dx, programs.gradients(grad, base, factor, shift, scale, low, high, is_lsq, dx).view(scale.shape)


def _quantize_shape(
    base: Tensor, factor: Tensor | None, shift: Tensor | None, scale: Tensor, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(base, dtype=dtype)


def _gradients_shape(
    grad: Tensor,
    base: Tensor,
    factor: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    low: int,
    high: int,
    is_lsq: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base, dtype=torch.float32), torch.empty_like(scale)


def _values(base: Tensor, factor: Tensor | None, shift: Tensor | None) -> Tensor:
    if factor is not None and shift is not None:
        factor, shift = factor.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
    return Recipe(base, factor, shift).compute()


def _quantize_plainly(
    base: Tensor, factor: Tensor | None, shift: Tensor | None, scale: Tensor, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    return (functional.quantize(_values(base, factor, shift), scale, low, high) * scale).to(dtype)


def _gradients_plainly(
    grad: Tensor,
    base: Tensor,
    factor: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    low: int,
    high: int,
    is_lsq: bool,
) -> tuple[Tensor, Tensor]:
    gradient = "lsq" if is_lsq else "pact"
    return functional.scale_gradients(grad, _values(base, factor, shift), scale, low, high, gradient)


for _name, _on_gpu, _on_cpu, _shape in (
    ("fake_quantize", _quantize, _quantize_plainly, _quantize_shape),
    ("fake_quantize_backward", _gradients, _gradients_plainly, _gradients_shape),
):
    _library.impl(_name, _on_gpu, "CUDA")
    _library.impl(_name, _on_gpu if IS_INTERPRETED else _on_cpu, "CPU")
    _library.impl(_name, _shape, "Meta")


def _can_run(scale: Tensor, x: Tensor) -> bool:
    """Returns whether the kernels can work on a tensor: on a GPU, without gaps, with one scale or one for each row."""
    return (
        (x.is_cuda or IS_INTERPRETED)
        and scale.dtype == torch.float32
        and (scale.dim() == 0 or (scale.shape == (x.shape[0], *[1] * (x.dim() - 1)) and _is_dense(x, first=True)))
        and _is_dense(x)
    )


def _is_dense(x: Tensor, first: bool = False) -> bool:
    """Returns whether ``x`` covers its memory once, and if ``first`` whether its first axis is the outermost."""
    expected = 1
    for axis in sorted(range(x.dim()), key=lambda axis: (x.stride(axis), -axis)):
        if x.shape[axis] != 1:
            if x.stride(axis) != expected:
                return False
            expected *= x.shape[axis]
    return not first or x.shape[0] in (0, 1) or x.stride(0) * x.shape[0] == x.numel()


def _is_plain_recipe(recipe: Recipe) -> bool:
    """Returns whether the kernels know the recipe: values, values times one number, or an affine for each channel."""
    if recipe.shift is not None:
        base = recipe.base
        return base.dim() == 4 and (
            base.is_contiguous() or base.is_contiguous(memory_format=torch.channels_last) and base.shape[1] > 1
        )
    return recipe.scale is None or recipe.scale.numel() == 1


def fake_quantized(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> Tensor:
    """Computes :func:`aqdet.quantization.lean.elementwise.fake_quantized`."""
    if not _can_run(scale, x):
        return plain("fake_quantized")(x, scale, quant_min, quant_max, dtype)
    return torch.ops.aqdet.fake_quantize(x, None, None, scale, quant_min, quant_max, dtype)


def scale_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, gradient: str
) -> tuple[Tensor, Tensor]:
    """Computes :func:`aqdet.quantization.lean.elementwise.scale_gradients`."""
    if not _can_run(scale, x):
        return plain("scale_gradients")(grad, x, scale, quant_min, quant_max, gradient)
    backward = torch.ops.aqdet.fake_quantize_backward
    return backward(grad, x, None, None, scale, quant_min, quant_max, gradient == "lsq")


def recipe_gradients(
    grad: Tensor, recipe: Recipe, scale: Tensor, quant_min: int, quant_max: int, gradient: str
) -> tuple[Tensor, Tensor]:
    """Computes :func:`aqdet.quantization.lean.elementwise.recipe_gradients`."""
    if not (_can_run(scale, recipe.base) and _is_plain_recipe(recipe)):
        return plain("recipe_gradients")(grad, recipe, scale, quant_min, quant_max, gradient)
    backward = torch.ops.aqdet.fake_quantize_backward
    return backward(grad, *recipe, scale, quant_min, quant_max, gradient == "lsq")


def recipe_quantized(recipe: Recipe, scale: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> Tensor:
    """Computes :func:`aqdet.quantization.lean.elementwise.recipe_quantized`."""
    if not (_can_run(scale, recipe.base) and _is_plain_recipe(recipe)):
        return plain("recipe_quantized")(recipe, scale, quant_min, quant_max, dtype)
    return torch.ops.aqdet.fake_quantize(*recipe, scale, quant_min, quant_max, dtype)
