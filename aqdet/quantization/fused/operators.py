"""Fake quantization and its gradients as operators of PyTorch, one kernel each on a GPU.

They are registered with PyTorch, so that shapes can be computed without values and a compiler can leave them whole.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..kernels import plain
from ..lean.elementwise import code_type
from ..lean.parts import laid_out_as
from ..lean.recipe import Recipe

HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its programs in Python, which works on tensors of a CPU, for tests."""

_library = torch.library.Library("aqdet", "DEF")
_INPUT = "Tensor base, Tensor? factor, Tensor? shift, ScalarType x_dtype"
"""A recipe: see :class:`~aqdet.quantization.lean.recipe.Recipe`."""

LAUNCHES = {"fake_quantize_backward": 2, "region_backward": 2, "norm_sums": 2}
"""Kernels that an operator launches on a GPU, where they are more than one: sums are finished in a second one."""


def define(schema: str, on_gpu: Callable[..., Any], on_cpu: Callable[..., Any], shape: Callable[..., Any]) -> None:
    """Registers an operator: as programs of a GPU, as formulas of a CPU, and as shapes."""
    _library.define(schema)
    name = schema.split("(")[0]
    _library.impl(name, on_gpu, "CUDA")
    _library.impl(name, on_gpu if IS_INTERPRETED else on_cpu, "CPU")
    _library.impl(name, shape, "Meta")


def recipe_from(base: Tensor, factor: Tensor | None, shift: Tensor | None, x_dtype: torch.dtype) -> Recipe:
    """Returns a recipe whose ``compute`` broadcasts."""
    if factor is not None and shift is not None:
        factor, shift = factor.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
    return Recipe(base, factor, shift, x_dtype)


def _quantize(*args: Any) -> Tensor:
    from . import programs

    *recipe, scale, low, high, dtype = args
    out = torch.empty_like(recipe[0], dtype=dtype)
    programs.quantize(*(*recipe, scale, low, high, out))
    return out


def _quantize_plainly(*args: Any) -> Tensor:
    *recipe, scale, low, high, dtype = args
    x = recipe_from(*recipe).compute()
    return (functional.quantize(x, scale, low, high) * scale).to(dtype)


def _quantize_shape(*args: Any) -> Tensor:
    return torch.empty_like(args[0], dtype=args[-1])


define(
    f"fake_quantize({_INPUT}, Tensor scale, int low, int high, ScalarType dtype) -> Tensor",
    _quantize,
    _quantize_plainly,
    _quantize_shape,
)


def _codes(*args: Any) -> tuple[Tensor, Tensor]:
    from . import programs

    *recipe, scale, low, high, dtype = args
    out = torch.empty_like(recipe[0], dtype=dtype)
    codes = torch.empty_like(out, dtype=code_type(low))
    programs.quantize(*(*recipe, scale, low, high, out, codes))
    return out, codes


def _codes_plainly(*args: Any) -> tuple[Tensor, Tensor]:
    *recipe, scale, low, high, dtype = args
    codes = functional.quantize(recipe_from(*recipe).compute(), scale, low, high)
    return (codes * scale).to(dtype), codes.to(code_type(low))


def _codes_shape(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(args[0], dtype=args[-1]), torch.empty_like(args[0], dtype=code_type(args[-3]))


define(
    f"fake_quantize_codes({_INPUT}, Tensor scale, int low, int high, ScalarType dtype) -> (Tensor, Tensor)",
    _codes,
    _codes_plainly,
    _codes_shape,
)


def _region(x: Tensor, scale: Tensor, low: int, high: int, with_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    from . import programs

    out, region, codes = _region_shape(x, scale, low, high, with_codes)
    programs.quantize(x, None, None, x.dtype, scale, low, high, out, codes if with_codes else None, region)
    return out, region, codes


def _region_plainly(x: Tensor, scale: Tensor, low: int, high: int, with_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    out, region, codes = plain("region_quantized")(x, scale, low, high, with_codes)
    return out, region, x.new_empty(0, dtype=code_type(low)) if codes is None else codes


def _region_shape(x: Tensor, scale: Tensor, low: int, high: int, with_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    kind = code_type(low)
    codes = torch.empty_like(x, dtype=kind) if with_codes else x.new_empty(0, dtype=kind)
    out = torch.empty_like(x, dtype=functional.value_dtype(x.dtype, low, high))
    return out, torch.empty_like(x, dtype=torch.uint8), codes


define(
    "region_quantize(Tensor x, Tensor scale, int low, int high, bool with_codes) -> (Tensor, Tensor, Tensor)",
    _region,
    _region_plainly,
    _region_shape,
)


def _gradients(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from . import programs

    *recipe, scale, low, high, is_lsq, dtype = args
    dx = torch.empty_like(recipe[0], dtype=dtype)
    dscale = programs.gradients(laid_out_as(grad, dx), *(*recipe, scale, low, high, is_lsq, dx))
    return dx, dscale.view(scale.shape)


def _gradients_plainly(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *recipe, scale, low, high, is_lsq, dtype = args
    x = recipe_from(*recipe).compute()
    dx, dscale = functional.scale_gradients(grad, x, scale, low, high, "lsq" if is_lsq else "pact")
    return dx.to(dtype), dscale


def _gradients_shape(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(args[0], dtype=args[-1]), torch.empty_like(args[-5])


define(
    f"fake_quantize_backward(Tensor grad, {_INPUT}, Tensor scale, int low, int high, bool is_lsq, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    _gradients,
    _gradients_plainly,
    _gradients_shape,
)


def _region_gradients(
    grad: Tensor, region: Tensor, scale: Tensor, low: int, high: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from . import programs

    dx = torch.empty_like(region, dtype=dtype)
    return dx, programs.region_gradients(laid_out_as(grad, dx), region, scale, low, high, dx).view(scale.shape)


def _region_gradients_shape(
    grad: Tensor, region: Tensor, scale: Tensor, low: int, high: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(region, dtype=dtype), torch.empty_like(scale)


define(
    "region_backward(Tensor grad, Tensor region, Tensor scale, int low, int high, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    _region_gradients,
    plain("region_gradients"),
    _region_gradients_shape,
)


def can_run(scale: Tensor, x: Tensor) -> bool:
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


def is_plain_recipe(recipe: Recipe) -> bool:
    """Returns whether the kernels know the recipe: values, values times one number, or an affine for each channel."""
    if recipe.shift is not None:
        base = recipe.base
        return base.dim() == 4 and (
            base.is_contiguous() or base.is_contiguous(memory_format=torch.channels_last) and base.shape[1] > 1
        )
    return recipe.scale is None or recipe.scale.numel() == 1


def fake_quantized(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> Tensor:
    """Computes :func:`aqdet.quantization.lean.elementwise.fake_quantized`."""
    if not can_run(scale, x):
        return plain("fake_quantized")(x, scale, quant_min, quant_max, dtype)
    return torch.ops.aqdet.fake_quantize(x, None, None, x.dtype, scale, quant_min, quant_max, dtype)


def scale_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, gradient: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes :func:`aqdet.quantization.lean.elementwise.scale_gradients`."""
    if not can_run(scale, x):
        return plain("scale_gradients")(grad, x, scale, quant_min, quant_max, gradient, dtype)
    backward = torch.ops.aqdet.fake_quantize_backward
    return backward(grad, x, None, None, x.dtype, scale, quant_min, quant_max, gradient == "lsq", dtype)


def recipe_gradients(
    grad: Tensor, recipe: Recipe, scale: Tensor, quant_min: int, quant_max: int, gradient: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes :func:`aqdet.quantization.lean.elementwise.recipe_gradients`."""
    if not (can_run(scale, recipe.base) and is_plain_recipe(recipe)):
        return plain("recipe_gradients")(grad, recipe, scale, quant_min, quant_max, gradient, dtype)
    backward = torch.ops.aqdet.fake_quantize_backward
    return backward(grad, *recipe, scale, quant_min, quant_max, gradient == "lsq", dtype)


def recipe_quantized(recipe: Recipe, scale: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> Tensor:
    """Computes :func:`aqdet.quantization.lean.elementwise.recipe_quantized`."""
    if not (can_run(scale, recipe.base) and is_plain_recipe(recipe)):
        return plain("recipe_quantized")(recipe, scale, quant_min, quant_max, dtype)
    return torch.ops.aqdet.fake_quantize(*recipe, scale, quant_min, quant_max, dtype)


def recipe_codes(
    recipe: Recipe, scale: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes :func:`aqdet.quantization.lean.elementwise.recipe_codes`."""
    if not (can_run(scale, recipe.base) and is_plain_recipe(recipe)):
        return plain("recipe_codes")(recipe, scale, quant_min, quant_max, dtype)
    return torch.ops.aqdet.fake_quantize_codes(*recipe, scale, quant_min, quant_max, dtype)


def region_quantized(
    x: Tensor, scale: Tensor, quant_min: int, quant_max: int, with_codes: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes :func:`aqdet.quantization.lean.elementwise.region_quantized`."""
    if not can_run(scale, x):
        return plain("region_quantized")(x, scale, quant_min, quant_max, with_codes)
    out, region, codes = torch.ops.aqdet.region_quantize(x, scale, quant_min, quant_max, with_codes)
    return out, region, codes if with_codes else None


def region_gradients(
    grad: Tensor, region: Tensor, scale: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes :func:`aqdet.quantization.lean.elementwise.region_gradients`."""
    if not can_run(scale, region):
        return plain("region_gradients")(grad, region, scale, quant_min, quant_max, dtype)
    return torch.ops.aqdet.region_backward(grad, region, scale, quant_min, quant_max, dtype)
