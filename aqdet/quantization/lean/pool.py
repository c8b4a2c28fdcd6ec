"""Max pooling that keeps two bytes of each output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import plain

_LARGEST = torch.iinfo(torch.int16).max


class _MaxPool2d(torch.autograd.Function):
    """Keeps the place of each maximum, counted in the input's order from the first place of its window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: tuple[int, int, int]) -> Tensor:
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, *([size, size] for size in geometry))
        first = _first_places(y, x.shape[-1], geometry)
        ctx.save_for_backward(indices.sub_(first).to(torch.int16), first)
        ctx.geometry = geometry
        ctx.like = x.shape, x.stride(), x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        places, first = ctx.saved_tensors
        shape, stride, dtype = ctx.like
        indices = places.long().add_(first)
        like = grad.new_empty_strided(shape, stride, dtype=dtype)  # its values are not read
        sizes = [[size, size] for size in ctx.geometry]
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, like, *sizes, [1, 1], False, indices), None


def _first_places(y: Tensor, width: int, geometry: tuple[int, int, int]) -> Tensor:
    """Returns the index of each window's first place in an input of a width, ``(H, W)`` of the output ``y``."""
    _, stride, padding = geometry
    height, length = (size * stride for size in y.shape[2:])
    top = torch.arange(-padding * width, (height - padding) * width, stride * width, device=y.device)
    left = torch.arange(-padding, length - padding, stride, device=y.device)
    return top[:, None] + left


def max_pool2d(x: Tensor, *, kernel_size: int, stride: int, padding: int) -> Tensor:
    """Computes ``torch.max_pool2d`` of ``(N, C, H, W)`` and keeps nothing of ``x``."""
    needs_places = torch.is_grad_enabled() and x.requires_grad
    if not needs_places or kernel_size * (x.shape[-1] + 1) > _LARGEST:
        return plain("max_pool2d")(x, kernel_size=kernel_size, stride=stride, padding=padding)
    return _MaxPool2d.apply(x, (kernel_size, stride, padding))
