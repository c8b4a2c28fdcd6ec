"""Helpers for training in several processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def distribute(model: nn.Module) -> nn.Module:
    """Puts a model into a ``DistributedDataParallel``; a single process gets the model itself.

    Args:
        model: The model, on the GPU that it trains on or on the CPU.
    """
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside a ``DistributedDataParallel`` or what ``torch.compile`` made of it, or else itself."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the main one's values of floating point tensors, in place."""
    if comm.get_world_size() > 1:
        for tensor in tensors:
            if tensor.is_floating_point():
                dist.broadcast(tensor, 0)


def average_over_processes(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the mean of their values of floating point tensors, in place."""
    if comm.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= comm.get_world_size()
