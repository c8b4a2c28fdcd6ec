"""Parts of a LazyConfig that are built from one of our configs."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import nn

from .solver import build_optimizer


def parameters_of(model: nn.Module) -> nn.Module:
    """Returns the model: the ``params`` of an optimizer in a LazyConfig, whose ``model`` the training script sets."""
    return model


def optimizer_of(cfg: CfgNode, params: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer of a config.

    Args:
        cfg: config of the model.
        params: the model, see :func:`parameters_of`.

    Returns:
        See :func:`aqdet.engine.build_optimizer`.
    """
    return build_optimizer(cfg, params)
