"""Heads whose convolutions can be quantized."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from ..layers import declare_site, shared_weights


class QuantRetinaNetHead(RetinaNetHead):
    """Detectron2's RetinaNet head with a declared site at every convolution.

    Norm ``"BN"`` or ``"SyncBN"`` is one batch norm per pyramid level (AQD, 2007.06919), as in Detectron2.

    Args:
        signed_input: whether the pyramid levels can be negative.
        kwargs: see :class:`detectron2.modeling.meta_arch.retinanet.RetinaNetHead`.
    """

    @configurable
    def __init__(self, *, signed_input: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for tower in (self.cls_subnet, self.bbox_subnet):
            signed = signed_input
            for layer in tower:
                if isinstance(layer, nn.Conv2d):
                    declare_site(layer, signed=signed)
                    signed = False
        for layer in (self.cls_score, self.bbox_pred):
            declare_site(layer, signed=False, role="prediction")  # behind the last ReLU of its tower

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """See Detectron2's; the weights, shared over the levels, are quantized once."""
        with shared_weights(self):
            return super().forward(features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Detectron2's arguments; the levels are unsigned where the FPN ends in ReLU."""
        arguments = super().from_config(cfg, input_shape)
        return {**arguments, "signed_input": not cfg.MODEL.FPN.RELU}
