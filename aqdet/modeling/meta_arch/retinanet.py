"""RetinaNet with a low-precision trunk and head and a full-precision auxiliary path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor

from ..heads import QuantRetinaNetHead
from .dense import LowPrecisionDense
from .shared_losses import at, box_losses, by_level, places, positive_anchors, positive_places


@META_ARCH_REGISTRY.register()
class QuantRetinaNet(LowPrecisionDense, RetinaNet):
    """RetinaNet (1708.02002) whose backbone, FPN and head can be quantized.

    Args:
        kwargs: see :class:`LowPrecisionDense` and :class:`detectron2.modeling.RetinaNet`.
    """

    head_class = QuantRetinaNetHead
    node = "RETINANET"

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Builds Detectron2's arguments, with our head and the scaffold.

        Raises:
            ValueError: in one line, for a config value that is not valid, naming its key.
        """
        theirs = cfg.clone()
        if cfg.MODEL.RETINANET.NORM == "GN":  # which the head that is built here, and replaced, does not take
            theirs.defrost()
            theirs.MODEL.RETINANET.NORM = ""
        arguments = super().from_config(theirs)
        return {**arguments, **cls.build_heads(cfg, arguments["backbone"])}

    def losses_of_heads(
        self, anchors: list[Boxes], gt_labels: list[Tensor], gt_boxes: list[Tensor], heads: Sequence[list[list[Tensor]]]
    ) -> list[dict[str, Tensor]]:
        """See :meth:`LowPrecisionDense.losses_of_heads`; anchors labeled -1 have no loss."""
        if not self.has_own(RetinaNet.losses):
            return super().losses_of_heads(anchors, gt_labels, gt_boxes, heads)
        labels = torch.stack(gt_labels)
        valid, positive = places(labels >= 0), positive_places(labels, self.num_classes)
        normalizer = self.normalizer(len(positive), len(gt_labels), 100)
        one_hot = F.one_hot(at(valid, labels), num_classes=self.num_classes + 1)[:, :-1]
        boxes = box_losses(
            positive_anchors(anchors, positive),
            at(positive, torch.stack(gt_boxes)),
            [by_level(positive, deltas) for _, deltas in heads],
            self.box2box_transform,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        losses = []
        for (logits, _), box_loss in zip(heads, boxes, strict=True):
            class_loss = sigmoid_focal_loss_jit(
                by_level(valid, logits),
                one_hot.to(logits[0].dtype),
                alpha=self.focal_loss_alpha,
                gamma=self.focal_loss_gamma,
                reduction="sum",
            )
            losses.append({"loss_cls": class_loss / normalizer, "loss_box_reg": box_loss / normalizer})
        return losses
