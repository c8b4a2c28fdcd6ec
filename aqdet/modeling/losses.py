"""Losses of dense detectors that Detectron2 does not have.

Shape legend: N images, R points of all levels together, K classes, P positive points.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 0.01
"""Smallest score and overlap in the task correlation, whose gradient would grow without bound towards 0."""


def quality_focal_loss(logits: Tensor, quality: Tensor, exponent: float) -> Tensor:
    """Computes the quality focal loss of each prediction, of the shape of ``logits``.

    From 2006.04388: with p the predicted probability, ``|q - p| ** exponent`` times the cross entropy of p for the
    target q. It is 0 at p = q, and at targets of 0 and 1 it is the focal loss without alpha.

    Args:
        logits: class logits, ``(N, R, K)``.
        quality: targets from 0 to 1, of that shape: the overlap of the predicted box with its object at the object's
            class, and 0 elsewhere.
        exponent: 2 in the paper.
    """
    distance = (quality - logits.sigmoid()).abs()
    return distance.pow(exponent) * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


def harmonious_iou_loss(overlap: Tensor) -> Tensor:
    """Computes ``1.5 (1 - u) (1 + u) ** 0.8`` of overlaps u, ``(P,)``: the harmonious IoU loss of HQOD (2408.02561).

    Its slope falls from -0.3 at u = 0 to -2.6 at u = 1: boxes that are nearly right are pulled most.
    """
    return 1.5 * (1 - overlap) * (1 + overlap).pow(0.8)


def task_correlation_loss(score: Tensor, overlap: Tensor) -> Tensor:
    """Computes the task-correlated loss of HQOD (2408.02561), ``(P,)``: small where score and overlap are both high.

    ``(1 + |p - u|) (exp(-c) - exp(-1))`` with ``c = p ** u * u ** p``; the first factor is a weight, which no gradient
    passes. Deviation: p and u count as at least :data:`FLOOR`.

    Args:
        score: predicted probability p of the object's class, ``(P,)``.
        overlap: u of the predicted box with its object, ``(P,)``.
    """
    weight = 1 + (score - overlap).abs().detach()
    score, overlap = score.clamp(min=FLOOR), overlap.clamp(min=FLOOR)
    correlation = score.pow(overlap) * overlap.pow(score)
    return weight * (torch.exp(-correlation) - math.exp(-1))
