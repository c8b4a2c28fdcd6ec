"""Parts of a LazyConfig that are built from one of aqdet's configs."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import nn

from .solver import build_optimizer


def parameters_of(model: nn.Module) -> nn.Module:
    """Returns the model; it is the ``params`` of a LazyConfig's optimizer, where the training script sets it."""
    return model


def optimizer_of(cfg: CfgNode, params: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer of a config.

    Args:
        cfg: The config of the model.
        params: The model, see :func:`parameters_of`.

    Returns:
        The optimizer, see :func:`aqdet.engine.build_optimizer`.
    """
    return build_optimizer(cfg, params)
