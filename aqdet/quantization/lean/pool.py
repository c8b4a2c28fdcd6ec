"""Max pooling whose input need not be kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .recipe import recipe_of


class _MaxPool2d(torch.autograd.Function):
    """Keeps a tensor like its input, for its shape alone, and four bytes for each output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, like: Tensor, geometry: tuple[int, int, int]) -> Tensor:
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, *([size, size] for size in geometry))
        ctx.save_for_backward(like, indices.int())
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        like, indices = ctx.saved_tensors
        sizes = [[size, size] for size in ctx.geometry]
        dx = torch.ops.aten.max_pool2d_with_indices_backward(grad, like, *sizes, [1, 1], False, indices.long())
        return dx, None, None


def max_pool2d(x: Tensor, *, kernel_size: int, stride: int, padding: int) -> Tensor:
    """Computes ``torch.max_pool2d`` of ``(N, C, H, W)`` and keeps the recipe of ``x`` in its place."""
    like = recipe_of(x).base
    if like is x:
        return torch.max_pool2d(x, kernel_size, stride, padding)
    return _MaxPool2d.apply(x, like, (kernel_size, stride, padding))
