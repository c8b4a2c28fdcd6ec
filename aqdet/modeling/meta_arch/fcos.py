"""FCOS with a low-precision trunk and head and a full-precision auxiliary path."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..assignment import atss_overlaps
from ..heads import QuantFCOSHead
from .dense import LowPrecisionDense

ASSIGNMENTS = ("fcos", "atss")


@META_ARCH_REGISTRY.register()
class QuantFCOS(LowPrecisionDense, FCOS):
    """Detectron2's FCOS (1904.01355), whose backbone, FPN and head can be quantized.

    With assignment ``"atss"`` it is the anchor-free detector of 1912.02424: other points learn an object, and nothing
    else differs. The auxiliary path and the other parts of the scaffold learn the same points.

    Args:
        assignment: ``"fcos"`` or ``"atss"``.
        atss_candidates, atss_side: see :func:`~aqdet.modeling.assignment.atss_overlaps`.
        kwargs: see :class:`LowPrecisionDense` and :class:`detectron2.modeling.meta_arch.fcos.FCOS`.

    Raises:
        ValueError: for a value that is not valid, naming its key.
    """

    head_class = QuantFCOSHead
    node = "FCOS"

    @configurable
    def __init__(
        self, *, assignment: str = "fcos", atss_candidates: int = 9, atss_side: float = 8.0, **kwargs: Any
    ) -> None:
        if assignment not in ASSIGNMENTS:
            raise ValueError(f"MODEL.FCOS.ASSIGNMENT must be one of {', '.join(ASSIGNMENTS)}, got {assignment!r}")
        if atss_candidates < 1:
            raise ValueError(f"MODEL.FCOS.ATSS_CANDIDATES must be at least 1, got {atss_candidates}")
        if not atss_side > 0:
            raise ValueError(f"MODEL.FCOS.ATSS_SIDE must be above 0, got {atss_side}")
        super().__init__(**kwargs)
        self.assignment = assignment
        self.atss_candidates = atss_candidates
        self.atss_side = atss_side

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
            "assignment": fcos.ASSIGNMENT,
            "atss_candidates": fcos.ATSS_CANDIDATES,
            "atss_side": fcos.ATSS_SIDE,
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

    def match_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]) -> list[Tensor]:
        """Returns the index of each point's object, ``(R,)`` for each image, -1 for none; Detectron2 0.6 calls it."""
        if self.assignment == "fcos":
            return super().match_anchors(anchors, gt_instances)
        matched = []
        for instances in gt_instances:
            overlaps, index = self._match_anchors(instances.gt_boxes, anchors).max(dim=0)
            index[overlaps == 0] = -1
            matched.append(index)
        return matched

    def _match_anchors(self, gt_boxes: Boxes, anchors: list[Boxes]) -> Tensor:
        """Returns how well each of G objects and R points match, ``(G, R)``; Detectron2's main branch calls it."""
        if self.assignment == "fcos":
            return super()._match_anchors(gt_boxes, anchors)
        return atss_overlaps(
            [level.tensor for level in anchors],
            gt_boxes.tensor,
            candidates=self.atss_candidates,
            side=self.atss_side,
        )

    @staticmethod
    def _with_a_box(instances: Instances) -> Instances:
        if len(instances):
            return instances
        stand_in = Instances(instances.image_size)
        stand_in.gt_boxes = Boxes(torch.zeros(1, 4, device=instances.gt_boxes.device))
        stand_in.gt_classes = instances.gt_classes.new_zeros(1)
        return stand_in
