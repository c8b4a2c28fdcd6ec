"""Max pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantization.kernels import replaceable


@replaceable("max_pool2d")
def max_pool2d(x: Tensor, *, kernel_size: int, stride: int, padding: int) -> Tensor:
    """Computes ``torch.max_pool2d`` of ``(N, C, H, W)``."""
    return torch.max_pool2d(x, kernel_size, stride, padding)
