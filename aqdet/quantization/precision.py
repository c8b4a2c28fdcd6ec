"""Precision in which a layer computes with quantized operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .quantizer import Quantizer


def autocast_dtype(weight: Tensor) -> torch.dtype:
    """Returns the precision that a layer in float computes in: autocast's, or without autocast its weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def own_precision(quantizer: Quantizer | None, device: str, dtype: torch.dtype) -> torch.dtype | None:
    """Returns the precision that a layer needs where that around it is too coarse for its input; else None.

    Args:
        quantizer: quantizer of the layer's input; None if the input is exact.
        device: type of the device, whose autocast counts.
        dtype: precision of the layer outside of autocast.
    """
    if quantizer is None or not quantizer.is_active:
        return None
    around = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    needed = quantizer.value_dtype(around)
    return None if needed == around else needed


def in_own_precision(
    operation: Callable[..., Tensor],
    quantizer: Quantizer | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """Computes ``operation(x, weight, bias, *geometry)`` of a quantized ``x``, in its :func:`own_precision`."""
    dtype = own_precision(quantizer, x.device.type, weight.dtype)
    if dtype is None:
        return operation(x, weight, bias, *geometry)
    with torch.autocast(x.device.type, enabled=False):
        return operation(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *geometry)
