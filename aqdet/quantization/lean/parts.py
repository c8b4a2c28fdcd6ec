"""Parts of tensors that stay in a CPU's cache.

Memory takes three times as long as arithmetic in an element-wise pass over a large tensor, which a chain of passes over
a part in the cache does not pay.
"""

from __future__ import annotations

import torch
from torch import Tensor

PART_SIZE = 1 << 17
"""Elements of a part of a tensor whose intermediates stay in a CPU's cache."""


def can_split(*tensors: Tensor) -> bool:
    """Returns whether tensors are large, on a CPU and alike in memory, and nothing else will fuse their arithmetic."""
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and first.is_cpu
        and first.numel() > 2 * PART_SIZE
        and all(t.stride() == first.stride() for t in tensors)
    )


def split_parts(scale: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Splits a scale and tensors of one shape into views, part by part.

    The parts cover every element once, in the order of memory if ``scale`` is 0-dim and by rows of the first
    axis if it is ``(C, 1, ...)``. Small tensors, tensors on another device and tensors that do not lie alike
    in memory come whole.

    Returns:
        For each part ``(scale, *tensors)``.
    """
    whole = [(scale, *tensors)]
    first = tensors[0]
    if not can_split(*tensors):
        return whole
    if scale.dim() == 0:
        order = sorted(range(first.dim()), key=first.stride, reverse=True)
        if not first.permute(order).is_contiguous():
            return whole
        flat = [t.permute(order).view(-1).split(PART_SIZE) for t in tensors]
        return [(scale, *parts) for parts in zip(*flat, strict=True)]
    if scale.shape != (first.shape[0], *[1] * (first.dim() - 1)) or not first.is_contiguous():
        return whole
    rows = max(1, PART_SIZE * first.shape[0] // first.numel())
    return list(zip(*(t.split(rows) for t in (scale, *tensors)), strict=True))


def sum_to(value: Tensor, like: Tensor) -> Tensor:
    """Sums ``value`` over the axes in which ``like`` is broadcast."""
    return value.sum() if like.dim() == 0 else value.sum_to_size(like.shape)


def join_sums(sums: list[Tensor], scale: Tensor) -> Tensor:
    """Returns the sum for each element of ``scale`` from those of the parts of :func:`split_parts`."""
    if len(sums) == 1:
        return sums[0]
    return torch.stack(sums).sum() if scale.dim() == 0 else torch.cat(sums)


def laid_out_as(grad: Tensor, x: Tensor) -> Tensor:
    """Returns a gradient that lies in memory as ``x``, so that its sums do not depend on where it comes from."""
    like = torch.empty_like(x, dtype=grad.dtype)
    return grad if grad.stride() == like.stride() else like.copy_(grad)
