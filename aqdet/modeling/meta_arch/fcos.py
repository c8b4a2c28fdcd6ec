"""FCOS with a low-precision trunk and head and a full-precision auxiliary path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from fvcore.nn import giou_loss, sigmoid_focal_loss_jit
from torch import Tensor

from ...utils.distributed import average_over_processes
from ..assignment import atss_overlaps
from ..heads import QuantFCOSHead
from ..losses import harmonious_iou_loss, quality_focal_loss, task_correlation_loss
from .dense import LowPrecisionDense
from .shared_losses import at, box_losses, by_level, positive_anchors, positive_places

ASSIGNMENTS = ("fcos", "atss")
CLASS_LOSSES = ("focal", "quality")
QUALITY_BOX_WEIGHT = 2.0
"""Weight of the boxes' GIoU loss beside the quality focal loss (2006.04388)."""


@META_ARCH_REGISTRY.register()
class QuantFCOS(LowPrecisionDense, FCOS):
    """Detectron2's FCOS (1904.01355), whose backbone, FPN and head can be quantized.

    With assignment ``"atss"`` it is the anchor-free detector of 1912.02424: other points learn an object, and nothing
    else differs. With class loss ``"quality"`` (2006.04388) the class's score learns the overlap of the box that is
    predicted beside it, and there is no centerness. The auxiliary path and the other parts of the scaffold learn the
    same points by the same losses.

    Args:
        assignment: ``"fcos"`` or ``"atss"``.
        atss_candidates, atss_side: see :func:`~aqdet.modeling.assignment.atss_overlaps`.
        class_loss: ``"focal"`` or ``"quality"``; the head has a centerness with the former alone.
        harmonious_iou_weight, task_correlation_weight: factors of the losses that HQOD (2408.02561) adds at positive
            points, 0 for none.
        kwargs: see :class:`LowPrecisionDense` and :class:`detectron2.modeling.meta_arch.fcos.FCOS`.

    Raises:
        ValueError: for a value that is not valid, naming its key.
    """

    head_class = QuantFCOSHead
    node = "FCOS"

    @configurable
    def __init__(
        self,
        *,
        assignment: str = "fcos",
        atss_candidates: int = 9,
        atss_side: float = 8.0,
        class_loss: str = "focal",
        harmonious_iou_weight: float = 0.0,
        task_correlation_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if assignment not in ASSIGNMENTS:
            raise ValueError(f"MODEL.FCOS.ASSIGNMENT must be one of {', '.join(ASSIGNMENTS)}, got {assignment!r}")
        if atss_candidates < 1:
            raise ValueError(f"MODEL.FCOS.ATSS_CANDIDATES must be at least 1, got {atss_candidates}")
        if not atss_side > 0:
            raise ValueError(f"MODEL.FCOS.ATSS_SIDE must be above 0, got {atss_side}")
        for key, weight in (
            ("HARMONIOUS_IOU_WEIGHT", harmonious_iou_weight),
            ("TASK_CORRELATION_WEIGHT", task_correlation_weight),
        ):
            if not weight >= 0:
                raise ValueError(f"MODEL.FCOS.{key} must not be negative, got {weight}")
        super().__init__(**kwargs)
        self.class_loss = class_loss
        self.harmonious_iou_weight = harmonious_iou_weight
        self.task_correlation_weight = task_correlation_weight
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
        if fcos.CLASS_LOSS not in CLASS_LOSSES:
            raise ValueError(f"MODEL.FCOS.CLASS_LOSS must be one of {', '.join(CLASS_LOSSES)}, got {fcos.CLASS_LOSS!r}")
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "head_in_features": fcos.IN_FEATURES,
            "num_classes": fcos.NUM_CLASSES,
            "assignment": fcos.ASSIGNMENT,
            "atss_candidates": fcos.ATSS_CANDIDATES,
            "atss_side": fcos.ATSS_SIDE,
            "class_loss": fcos.CLASS_LOSS,
            "harmonious_iou_weight": fcos.HARMONIOUS_IOU_WEIGHT,
            "task_correlation_weight": fcos.TASK_CORRELATION_WEIGHT,
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

    def losses_of_heads(
        self, anchors: list[Boxes], gt_labels: list[Tensor], gt_boxes: list[Any], heads: Sequence[list[list[Tensor]]]
    ) -> list[dict[str, Tensor]]:
        """See :meth:`LowPrecisionDense.losses_of_heads`; Detectron2's losses have their targets in common."""
        is_plain = self.class_loss == "focal" and not (self.harmonious_iou_weight or self.task_correlation_weight)
        if not (is_plain and self.has_own(QuantFCOS.losses)):
            return super().losses_of_heads(anchors, gt_labels, gt_boxes, heads)
        labels = torch.stack(gt_labels)
        positive = positive_places(labels, self.num_classes)
        normalizer = self.normalizer(len(positive), len(gt_labels), 300)
        one_hot = F.one_hot(labels, num_classes=self.num_classes + 1)[:, :, :-1]
        own_anchors = positive_anchors(anchors, positive)
        tensors = [getattr(boxes, "tensor", boxes) for boxes in gt_boxes]
        own_boxes = at(positive, torch.stack(tensors))
        deltas = [by_level(positive, head[1]) for head in heads]
        boxes = box_losses(own_anchors, own_boxes, deltas, self.box2box_transform, "giou")
        # Detectron2 0.6 has the boxes as Boxes, its main branch as tensors.
        matched = own_boxes if tensors[0] is gt_boxes[0] else Boxes(own_boxes)
        centerness = self.compute_ctrness_targets([Boxes(own_anchors)], [matched])[0]
        losses = []
        for (logits, _, centers), box_loss in zip(heads, boxes, strict=True):
            class_loss = sigmoid_focal_loss_jit(
                torch.cat(logits, dim=1),
                one_hot.to(logits[0].dtype),
                alpha=self.focal_loss_alpha,
                gamma=self.focal_loss_gamma,
                reduction="sum",
            )
            predicted = by_level(positive, centers).squeeze(1)
            center_loss = F.binary_cross_entropy_with_logits(predicted, centerness, reduction="sum")
            found = {"loss_fcos_cls": class_loss, "loss_fcos_loc": box_loss, "loss_fcos_ctr": center_loss}
            losses.append({name: loss / normalizer for name, loss in found.items()})
        return losses

    @staticmethod
    def _with_a_box(instances: Instances) -> Instances:
        if len(instances):
            return instances
        stand_in = Instances(instances.image_size)
        stand_in.gt_boxes = Boxes(torch.zeros(1, 4, device=instances.gt_boxes.device))
        stand_in.gt_classes = instances.gt_classes.new_zeros(1)
        return stand_in

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Any],
        *pred_centerness: list[Tensor],
    ) -> dict[str, Tensor]:
        """Computes the losses of a head's predictions: Detectron2's, or those of the keys of ``MODEL.FCOS``.

        Args:
            anchors: the points of each level, as squares as large as its stride.
            pred_logits, pred_anchor_deltas, pred_centerness: predictions of each level, ``(N, R_l, K)``,
                ``(N, R_l, 4)`` and, with the focal loss, ``(N, R_l, 1)``.
            gt_labels: classes of each image's points, ``(R,)``, K for background.
            gt_boxes: boxes of the objects of each image's points, ``(R, 4)``.
        """
        if self.class_loss == "focal":
            losses = super().losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, *pred_centerness)
            if not (self.harmonious_iou_weight or self.task_correlation_weight):
                return losses
        labels, logits = torch.stack(gt_labels), torch.cat(pred_logits, dim=1).float()
        positive = labels != self.num_classes
        points = Boxes.cat(anchors).tensor.expand(len(labels), -1, -1)[positive]
        boxes = self.box2box_transform.apply_deltas(torch.cat(pred_anchor_deltas, dim=1)[positive].float(), points)
        objects = torch.stack([getattr(boxes_of_image, "tensor", boxes_of_image) for boxes_of_image in gt_boxes])
        objects, classes = objects[positive], labels[positive]
        overlap = matched_pairwise_iou(Boxes(boxes), Boxes(objects))
        if self.class_loss == "quality":
            losses = self._quality_losses(logits, positive, classes, boxes, objects, overlap.detach())
        normalizer = self.loss_normalizer / comm.get_world_size()
        if self.harmonious_iou_weight:
            total = harmonious_iou_loss(overlap).sum()
            losses["loss_fcos_iou"] = self.harmonious_iou_weight * total / normalizer
        if self.task_correlation_weight:
            score = logits[positive].sigmoid().gather(1, classes[:, None]).squeeze(1)
            total = task_correlation_loss(score, overlap).sum()
            losses["loss_fcos_task"] = self.task_correlation_weight * total / normalizer
        return losses

    def _quality_losses(
        self, logits: Tensor, positive: Tensor, classes: Tensor, boxes: Tensor, objects: Tensor, overlap: Tensor
    ) -> dict[str, Tensor]:
        """Computes the quality focal loss, and the GIoU loss of the boxes weighted by the points' largest score.

        Deviation from 2006.04388: no distribution of distances is learned; the weights' mean over the batch is 1, and
        the divisor is the moving average of the number of positive points, as of Detectron2's losses.

        Args:
            logits: ``(N, R, K)``.
            positive: mask ``(N, R)`` of the P positive points.
            classes: classes of their objects, ``(P,)``.
            boxes, objects: predicted for them, and to be predicted, ``(P, 4)``.
            overlap: IoU of the two, ``(P,)``.
        """
        number = int(positive.sum())
        get_event_storage().put_scalar("num_pos_anchors", number / len(positive))
        normalizer = self._ema_update("loss_normalizer", max(number, 1), 300)
        quality = torch.zeros_like(logits)
        quality[positive] = F.one_hot(classes, self.num_classes) * overlap[:, None]
        weight = logits.detach()[positive].sigmoid().amax(dim=1)
        sums = torch.stack([weight.sum(), weight.new_tensor(float(number))])
        if torch.is_grad_enabled():
            average_over_processes([sums])
        weight = weight * (sums[1] / sums[0].clamp(min=torch.finfo(sums.dtype).tiny))
        box_loss = (weight * giou_loss(boxes, objects)).sum()
        return {
            "loss_fcos_cls": quality_focal_loss(logits, quality, self.focal_loss_gamma).sum() / normalizer,
            "loss_fcos_loc": QUALITY_BOX_WEIGHT * box_loss / normalizer,
        }

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Returns the detections of each image; see Detectron2's. Without a centerness a class's score is all."""
        if self.class_loss == "focal":
            return super().forward_inference(images, features, predictions)
        anchors = self.anchor_generator(features)
        logits, deltas = self.by_anchor(predictions)
        return [
            self.inference_single_image(anchors, [x[i].sigmoid() for x in logits], [x[i] for x in deltas], size)
            for i, size in enumerate(images.image_sizes)
        ]
