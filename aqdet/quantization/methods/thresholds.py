"""Sums and counts over the values between ascending thresholds, for methods whose values are not evenly spaced.

A method with one step size needs neither: its codes are rounded quotients (:mod:`..functional`).
"""

from __future__ import annotations

import torch
from torch import Tensor

_FEW_THRESHOLDS = 16


def count_below(rows: Tensor, thresholds: Tensor) -> Tensor:
    """Counts the thresholds below each value: int64, of the shape of ``rows``, without gradient.

    Args:
        rows: ``(C, K)`` float32.
        thresholds: ``(C, n)`` float32, ascending.
    """
    if torch.jit.is_tracing() or thresholds.shape[1] > _FEW_THRESHOLDS:  # a trace has no view in another dtype
        return torch.searchsorted(thresholds, rows.contiguous())
    # A handful of comparisons is several times faster than a binary search on a CPU.
    count = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device)
    for threshold in thresholds.split(1, dim=1):
        count.add_((rows > threshold).view(torch.uint8))
    return count.long()


_GPU_SUMS = 2**15


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums the values of each index: ``(size,)`` float64, also where torch is to be deterministic on a GPU.

    Args:
        values: ``(N,)``.
        index: ``(N,)`` int64 in ``[0, size)``.
        size: number of sums.
    """
    # A GPU adds in turn what goes to one address, so that its sums are many, and added up afterwards.
    parts = max(1, _GPU_SUMS // size) if values.is_cuda else 1
    if parts > 1:
        index = index + size * (torch.arange(len(index), device=index.device) % parts)
    sums = torch.zeros(parts * size, dtype=torch.float64, device=values.device)
    return sums.scatter_add_(0, index, values.double()).view(parts, size).sum(dim=0)
