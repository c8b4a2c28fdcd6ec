"""Recipes by which activations are computed again, so that backward need not keep them.

The output of a batch norm is a scale and a shift of each channel of the convolution's output, which the norm
keeps anyway; the output of a quantizer is its codes, a byte each, times a scale. The kernel that makes such a tensor
notes its recipe, and a kernel that needs its input in backward keeps the recipe instead. A tensor without
one, or changed in place since, is kept itself: a recipe saves memory, and nothing depends on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .parts import PART_SIZE, can_split, split_parts


class Recipe(NamedTuple):
    """Recipe of an activation: ``x = base * scale + shift``, computed in float32 and in this order, then rounded.

    Attributes:
        base: tensor of the shape of ``x`` and any dtype.
        scale: None for 1, 0-dim, or broadcastable against ``base``; ``(C,)`` if there is a shift.
        shift: None for 0, or ``(C,)``, one for each channel of ``base (N, C, H, W)``.
        dtype: precision of ``x``, to which a computed value is rounded.
    """

    base: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def compute(self, out: Tensor | None = None) -> Tensor:
        """Computes ``x`` of a part from :meth:`parts` as float32, in a new tensor or ``out``, of any dtype.

        It is ``base`` itself where that is ``x`` in float32.
        """
        if self.scale is None:
            return self.base.float() if out is None else out.copy_(self.base)
        if self.dtype == torch.float32:
            x = torch.mul(self.base, self.scale, out=out)
            return x if self.shift is None else x.add_(self.shift)
        x = self.base.float() * self.scale
        x = (x if self.shift is None else x.add_(self.shift)).to(self.dtype)
        return x.float() if out is None else out.copy_(x)

    def parts(self, *tensors: Tensor) -> list[tuple[Recipe, tuple[Tensor, ...]]]:
        """Splits the recipe and tensors like ``x`` into parts, see :func:`~.parts.split_parts`."""
        base, scale, shift, dtype = self
        if scale is None or shift is None:
            nothing = torch.zeros(()) if scale is None else scale
            parts = split_parts(nothing, base, *tensors)
            return [(Recipe(b, scale, None, dtype), rest) for _, b, *rest in parts]  # type: ignore[misc]
        if can_split(base, *tensors):
            if base.is_contiguous(memory_format=torch.channels_last):
                rows = max(1, PART_SIZE // base.shape[1])
                split = (t.permute(0, 2, 3, 1).view(-1, base.shape[1]).split(rows) for t in (base, *tensors))
                return [(Recipe(b, scale, shift, dtype), rest) for b, *rest in zip(*split, strict=True)]  # type: ignore[misc]
            if base.is_contiguous():
                split = (t.flatten(2).split(1) for t in (base, *tensors))
                scale, shift = scale.view(-1, 1), shift.view(-1, 1)
                return [(Recipe(b, scale, shift, dtype), rest) for b, *rest in zip(*split, strict=True)]  # type: ignore[misc]
        return [(Recipe(base, scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1), dtype), tensors)]


def note_recipe(x: Tensor, recipe: Recipe) -> Tensor:
    """Notes that ``x`` can be computed from ``recipe``; returns ``x``."""
    x.aqdet_recipe = (recipe, x._version)  # type: ignore[attr-defined]
    return x


def recipe_of(x: Tensor) -> Recipe:
    """Returns the noted recipe of ``x`` if it still holds, else ``x`` as its own."""
    if not torch.compiler.is_compiling():
        recipe, version = getattr(x, "aqdet_recipe", (None, None))
        if recipe is not None and version == x._version:
            return recipe
    return Recipe(x, dtype=x.dtype)


def note_terms(x: Tensor, first: Recipe, second: Recipe) -> Tensor:
    """Notes that ``x``, float32, is the sum of two tensors where both are codes of a byte; returns ``x``."""
    if x.dtype == torch.float32 and all(t.base.element_size() == 1 and t.shift is None for t in (first, second)):
        x.aqdet_terms = (first, second, x._version)  # type: ignore[attr-defined]
    return x


def terms_of(x: Tensor) -> tuple[Recipe, Recipe] | None:
    """Returns the noted terms of ``x`` if they still hold, else None."""
    noted: tuple[Recipe, Recipe, int] | None = getattr(x, "aqdet_terms", None)
    return noted[:2] if noted is not None and noted[2] == x._version else None


def summed(first: Recipe, second: Recipe | None = None) -> Tensor:
    """Computes the tensor, float32, whose terms :func:`note_terms` has noted, or that one recipe is of."""
    if second is None and first.scale is None:
        return first.base
    out = torch.empty_like(first.base, dtype=torch.float32)
    for part, (out_part, *bases) in first.parts(out, *([] if second is None else [second.base])):
        part.compute(out_part)
        for base in bases:
            assert second is not None
            out_part.add_(Recipe(base, second.scale).compute())
    return out
