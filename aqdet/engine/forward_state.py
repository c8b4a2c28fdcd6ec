"""State of a model that training changes without the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn


def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the values of the main one's floating point tensors, in place."""
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


def loss_normalizers(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, float]:
    """Moving averages that Detectron2's dense detectors keep in an attribute, by module."""
    return {name: float(vars(m)["loss_normalizer"]) for name, m in modules if "loss_normalizer" in vars(m)}


def set_loss_normalizers(modules: Iterable[tuple[str, nn.Module]], values: Mapping[str, float]) -> None:
    """Puts back :func:`loss_normalizers`; those without a value start anew."""
    for name, module in modules:
        vars(module).pop("loss_normalizer", None)
        if name in values:
            module.loss_normalizer = values[name]  # type: ignore[assignment]


class ForwardState:
    """What a training forward changes in a model: statistics in buffers, and loss normalizers."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.named_modules())  # walking the model in every iteration takes longer than copying
        named = model.named_buffers()
        self._buffers = [b for n, b in named if b.is_floating_point() or n.endswith("num_batches_tracked")]

    def get(self) -> tuple[list[Tensor], dict[str, float]]:
        """A copy."""
        return [buffer.clone() for buffer in self._buffers], loss_normalizers(self._modules)

    def set(self, state: tuple[list[Tensor], dict[str, float]]) -> None:
        """Puts a copy back."""
        for buffer, value in zip(self._buffers, state[0], strict=True):
            buffer.copy_(value)
        set_loss_normalizers(self._modules, state[1])
