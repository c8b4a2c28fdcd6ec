"""Layout of a model in memory."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import nn


def laid_out(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Returns the model, whose weights have channels last where a GPU trains it in half precision.

    Tensor cores read operands in this layout. A convolution passes it on, so that activations have it from the first
    layer on.
    """
    if cfg.SOLVER.AMP.ENABLED and next(model.parameters()).is_cuda:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
