"""FCOS with a low-precision trunk and head and a full-precision auxiliary path."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes, Instances

from ..heads import QuantFCOSHead
from .dense import LowPrecisionDense


@META_ARCH_REGISTRY.register()
class QuantFCOS(LowPrecisionDense, FCOS):
    """Detectron2's FCOS (1904.01355), whose backbone, FPN and head can be quantized.

    Args:
        kwargs: see :class:`LowPrecisionDense` and :class:`detectron2.modeling.meta_arch.fcos.FCOS`.
    """

    head_class = QuantFCOSHead
    node = "FCOS"

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Builds the arguments from ``MODEL.FCOS``, with our head and the scaffold.

        Raises:
            ValueError: in one line, for a config value that is not valid, naming its key.
        """
        fcos = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "head_in_features": fcos.IN_FEATURES,
            "num_classes": fcos.NUM_CLASSES,
            "center_sampling_radius": fcos.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": fcos.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": fcos.FOCAL_LOSS_GAMMA,
            "test_score_thresh": fcos.SCORE_THRESH_TEST,
            "test_topk_candidates": fcos.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": fcos.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            **cls.build_heads(cfg, backbone),
        }

    def label_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]) -> Any:
        """See Detectron2's, whose 0.6 fails on an image without boxes: it gets an empty box, which no point is in."""
        return super().label_anchors(anchors, [self._with_a_box(instances) for instances in gt_instances])

    @staticmethod
    def _with_a_box(instances: Instances) -> Instances:
        if len(instances):
            return instances
        stand_in = Instances(instances.image_size)
        stand_in.gt_boxes = Boxes(torch.zeros(1, 4, device=instances.gt_boxes.device))
        stand_in.gt_classes = instances.gt_classes.new_zeros(1)
        return stand_in
