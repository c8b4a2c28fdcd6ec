"""Losses of several heads of a dense detector on one set of targets.

The values are those of Detectron2's ``losses`` for each head. Detectron2 selects by masks, whose number of elements a
GPU's host has to wait for, in every head and once more in backward. Here the places are found once, for all heads.

Shape legend: N images, R anchors of an image over all levels, P positive ones of the batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.structures import Boxes
from fvcore.nn import smooth_l1_loss
from torch import Tensor

IOU_EPS = 1e-7


def _area(sides: Tensor) -> Tensor:
    width, height = sides.unbind(dim=1)
    return width * height


def giou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """Computes fvcore's ``giou_loss`` of boxes ``(P, 4)``, ``(P,)``, by operations that do not wait for a GPU.

    Values and gradients are the same to the bit. Boxes that are not finite have no finite loss, and no assertion.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    other_low, other_high = others[:, :2], others[:, 2:]
    sides = torch.minimum(high, other_high) - torch.maximum(low, other_low)
    overlap = torch.where((sides > 0).all(dim=1), _area(sides), 0.0)
    union = _area(high - low) + _area(other_high - other_low) - overlap
    enclosing = _area(torch.maximum(high, other_high) - torch.minimum(low, other_low))
    return 1 - (overlap / (union + IOU_EPS) - (enclosing - union) / (enclosing + IOU_EPS))


IOU_LOSSES: dict[str, Any] = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


def places(mask: Tensor) -> Tensor:
    """Returns the flat indices at which a mask ``(N, R)`` is set; this waits for a GPU."""
    return mask.flatten().nonzero().squeeze(1)


def at(index: Tensor, values: Tensor) -> Tensor:
    """Selects from ``(N, R, ...)`` by indices from :func:`places`."""
    return values.flatten(0, 1).index_select(0, index)


def by_level(index: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Selects from predictions ``(N, R_l, K)`` of each level by indices from :func:`places`: ``(P, K)``."""
    return at(index, torch.cat(list(levels), dim=1))


def positive_places(labels: Tensor, num_classes: int) -> Tensor:
    """Returns the indices of the anchors with an object: ``(P,)`` of labels ``(N, R)``."""
    return places((labels >= 0) & (labels != num_classes))


def positive_anchors(anchors: Sequence[Boxes], index: Tensor) -> Tensor:
    """Returns the boxes of anchors, which are the same in every image, ``(P, 4)``."""
    boxes = Boxes.cat(list(anchors)).tensor
    return boxes.index_select(0, index % len(boxes))


def box_losses(
    anchors: Tensor, gt_boxes: Tensor, deltas: Sequence[Tensor], transform: Any, kind: str, beta: float = 0.0
) -> list[Tensor]:
    """Computes the sum of the box losses of each head, 0-dim, each of which reaches its own head alone.

    Args:
        anchors, gt_boxes: the positive anchors and the boxes of their objects, ``(P, 4)``.
        deltas: predictions of each head at these, ``(P, 4)``.
        transform: Detectron2's, between boxes and deltas.
        kind: ``"smooth_l1"`` or one of :data:`IOU_LOSSES`.
        beta: the parameter of ``"smooth_l1"``.
    """
    if kind == "smooth_l1":
        target = transform.get_deltas(anchors, gt_boxes)
        return [smooth_l1_loss(predicted, target, beta=beta, reduction="sum") for predicted in deltas]
    boxes = [transform.apply_deltas(predicted, anchors) for predicted in deltas]
    return [IOU_LOSSES[kind](found, gt_boxes).sum() for found in boxes]
