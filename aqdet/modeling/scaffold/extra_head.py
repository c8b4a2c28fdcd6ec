"""A second quantized head with losses of its own: one of the rivals that the auxiliary path is compared with."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from ...layers import forget_sites
from ..policy import QuantPolicy


def build_extra_head(cfg: CfgNode, head: nn.Module) -> nn.Module:
    """Makes a fresh head the extra one of ``MODEL.EXTRA_LOSS``, with the quantizers of the detector's own.

    All of it is quantized as the detector's head is: an extra loss with a full-precision head would be an auxiliary
    path without adaptors, and leave open whether the loss helps or the precision. It keeps its random weights.

    Args:
        cfg: config.
        head: head of the class of the detector's, in float, whose convolutions have declared sites.

    Raises:
        ValueError: for a negative ``LOSS_WEIGHT``.
    """
    if not cfg.MODEL.EXTRA_LOSS.LOSS_WEIGHT >= 0:
        raise ValueError(f"MODEL.EXTRA_LOSS.LOSS_WEIGHT must not be negative, got {cfg.MODEL.EXTRA_LOSS.LOSS_WEIGHT}")
    if cfg.MODEL.QUANT.ENABLED:
        QuantPolicy.from_config(cfg).apply(head, "head.")  # its rules are those of the detector's head
    forget_sites(head)
    return head
