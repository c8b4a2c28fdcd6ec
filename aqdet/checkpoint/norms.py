"""Batch norms whose running statistics a checkpoint has folded into weight and bias."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modeling.scaffold import SCAFFOLD_PREFIXES

_TOLERANCE = 1e-4
"""Tolerance of a variance of 1; it is above the epsilon by which Detectron2's frozen norms differ from 1."""


def add_folded_statistics(model: nn.Module, state: MutableMapping[str, Tensor]) -> int:
    """Adds running means of 0 and variances of 1 for batch norms of which a file has only weight and bias.

    Caffe2's files, such as MSRA's ResNets, are of this kind: ``weight`` and ``bias`` already contain the statistics.
    Detectron2 does the same, but only for its FrozenBN.

    Args:
        model: The model that is loaded.
        state: The file's state dict under the model's names; it is changed in place.

    Returns:
        The number of norms that got statistics.
    """
    count = 0
    for name, norm in _batch_norms(model):
        keys = {key: f"{name}.{key}" for key in ("weight", "bias", "running_mean", "running_var")}
        if keys["weight"] not in state or keys["bias"] not in state:
            continue
        if keys["running_mean"] in state or keys["running_var"] in state:
            continue
        assert norm.running_mean is not None and norm.running_var is not None
        state[keys["running_mean"]] = torch.zeros_like(norm.running_mean, device="cpu")
        state[keys["running_var"]] = torch.ones_like(norm.running_var, device="cpu")
        count += 1
    return count


def folded_norms(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Returns the batch norms for which a file has statistics of 0 and 1 beside trained weights and biases."""
    folded = []
    for name, _ in _batch_norms(model):
        keys = [f"{name}.{key}" for key in ("running_mean", "running_var", "weight")]
        if all(key in state for key in keys):
            mean, variance, weight = (state[key] for key in keys)
            is_folded = not mean.any() and bool(((variance - 1).abs() < _TOLERANCE).all())
            if is_folded and bool((weight != 1).any()):
                folded.append(name)
    return folded


def _batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Returns the detector's batch norms that change their statistics in training; FrozenBN does not."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine and module.running_mean is not None
        if not name.startswith(SCAFFOLD_PREFIXES)
    ]
