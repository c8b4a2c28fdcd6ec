"""State of a model that a forward pass in training changes, without the optimizer."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from detectron2.layers import CycleBatchNormList
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn

from ..quantization import quantizers


def _dense(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Yields the dense detectors; a keypoint head's ``loss_normalizer`` is a setting, not an average."""
    return ((name, module) for name, module in modules if isinstance(module, DenseDetector))


def loss_normalizers(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, float]:
    """Returns, by module, the moving averages that Detectron2's dense detectors keep in an attribute."""
    return {name: float(vars(m)["loss_normalizer"]) for name, m in _dense(modules) if "loss_normalizer" in vars(m)}


def set_loss_normalizers(modules: Iterable[tuple[str, nn.Module]], values: Mapping[str, float]) -> None:
    """Restores the averages of :func:`loss_normalizers`; an average without a value starts anew."""
    for name, module in _dense(modules):
        vars(module).pop("loss_normalizer", None)
        if name in values:
            module.loss_normalizer = values[name]  # type: ignore[assignment]


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies tensors into others of their shape, in few launches of a GPU."""
    if targets:
        torch._foreach_copy_(targets, sources)


class ForwardState:
    """The state that a training forward pass changes in a model: statistics in buffers, and loss normalizers."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.named_modules())  # once: it takes longer than copying
        named = model.named_buffers()
        self._buffers = [b for n, b in named if b.is_floating_point() or n.endswith("num_batches_tracked")]

    def get(self) -> tuple[list[Tensor], dict[str, float]]:
        """Returns a copy of the state."""
        copies = [torch.empty_like(buffer) for buffer in self._buffers]
        copy_all(copies, self._buffers)
        return copies, loss_normalizers(self._modules)

    def set(self, state: tuple[list[Tensor], dict[str, float]]) -> None:
        """Restores a copy that :meth:`get` returned."""
        copy_all(self._buffers, state[0])
        set_loss_normalizers(self._modules, state[1])


@contextlib.contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Restores buffers (BN statistics), loss normalizers, positions of BN lists and random states after the block.

    Quantizers keep what the block has changed.
    """
    owned = {id(buffer) for _, quantizer in quantizers(model) for buffer in quantizer.buffers()}
    buffers = [(b, b.clone()) for b in model.buffers() if id(b) not in owned]
    attributes = []
    for module in model.modules():
        if isinstance(module, CycleBatchNormList):
            attributes.append((module, "_pos", module._pos))
        if isinstance(module, DenseDetector):
            attributes.append((module, "loss_normalizer", vars(module).get("loss_normalizer")))
    random_states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        for module, name, value in attributes:
            if value is not None:
                setattr(module, name, value)
            else:
                vars(module).pop(name, None)
