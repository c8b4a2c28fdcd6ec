"""Distillation from the full-precision detector: one of the rivals that the auxiliary path is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TERMS = ("FEATURE_WEIGHT", "LOGIT_WEIGHT", "BOX_WEIGHT")
BOXES = 1
"""Index of the box deltas among a head's predictions, which are no logits."""
DEAD = 1e-6
"""Mean square, relative to the largest level's, below which a teacher's level has no size of its own."""


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Computes ``|s - t|^2 / |t|^2``, averaged over the levels: 0-dim; 0 where they agree, 1 for a student of zeros.

    The hint of FitNets (1412.6550). Deviations: relative to the size of the teacher's feature, so that no level
    and no detector needs a factor of its own, and without a regressor, since both have the same channels. A level
    that is (nearly) dead in the teacher is not blown up: its mean square counts as at least ``DEAD`` of the largest.

    Args:
        student, teacher: one ``(N, C, H, W)`` for each level.
    """
    sizes = [t.float().square().sum() for t in teacher]
    largest = torch.stack([size / t.numel() for size, t in zip(sizes, teacher, strict=True)]).amax()
    losses = []
    for s, t, size in zip(student, teacher, sizes, strict=True):
        floor = (DEAD * t.numel() * largest).clamp(min=torch.finfo(torch.float32).tiny)
        losses.append((s.float() - t.float()).square().sum() / torch.maximum(size, floor))
    return torch.stack(losses).mean()


def logit_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Computes the divergence of the teacher's probabilities from the student's, summed over all predictions: 0-dim.

    Knowledge distillation (1503.02531) at temperature 1 for detectors, whose classes are independent: each logit
    is a probability of its own, and ``w KL(p_t || p_s)`` is summed. Its gradient is ``w (p_s - p_t)``.

    Args:
        student, teacher: logits, one ``(N, R, K)`` for each level of R anchors.
        weights: factors w, one ``(N, R, 1)`` for each level.
    """
    total = torch.zeros((), device=student[0].device)
    for s, t, weight in zip(student, teacher, weights, strict=True):
        s, t = s.float(), t.float()
        target = t.sigmoid()
        divergence = F.binary_cross_entropy_with_logits(s, target, reduction="none")
        divergence = divergence - F.binary_cross_entropy_with_logits(t, target, reduction="none")
        total = total + (weight * divergence).sum()
    return total


def box_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Computes the distance of the box deltas from the teacher's, ``w |s - t|`` summed over all predictions: 0-dim.

    As a teacher's boxes are regressed to by Chen et al. (NIPS 2017, "Learning Efficient Object Detection Models with
    Knowledge Distillation"). Deviations: L1 as the detectors' own loss has it, at every anchor by its weight, and
    without a bound by the distance of the teacher from the ground truth.

    Args:
        student, teacher: deltas, one ``(N, R, 4)`` for each level of R anchors.
        weights: factors w, one ``(N, R, 1)`` for each level.
    """
    distances = [(w * (s.float() - t.float()).abs()).sum() for s, t, w in zip(student, teacher, weights, strict=True)]
    return torch.stack(distances).sum()


class Distillation:
    """A teacher and the losses that draw a dense detector to it.

    Not a module: the teacher is in no state dict, optimizer or list of modules of the detector that holds this.

    Args:
        teacher: detector of the student's structure, all in full precision, which is put in evaluation mode without
            gradients: a :class:`~aqdet.modeling.meta_arch.dense.LowPrecisionDense`.
        feature_weight, logit_weight, box_weight: factors of the losses, 0 for none.

    Raises:
        ValueError: for a negative weight, or if all are 0.
    """

    def __init__(
        self, teacher: nn.Module, *, feature_weight: float, logit_weight: float, box_weight: float = 0.0
    ) -> None:
        weights = feature_weight, logit_weight, box_weight
        for key, weight in zip(TERMS, weights, strict=True):
            if not weight >= 0:
                raise ValueError(f"MODEL.DISTILL.{key} must not be negative, got {weight}")
        if not any(weights):
            raise ValueError(f"MODEL.DISTILL.ENABLED is True, but {', '.join(TERMS)} are all 0")
        self.teacher: Any = teacher.eval().requires_grad_(False)
        self.feature_weight = feature_weight
        self.logit_weight = logit_weight
        self.box_weight = box_weight

    def losses(
        self, images: Tensor, features: Sequence[Tensor], predictions: Sequence[Sequence[Tensor]], normalizer: float
    ) -> dict[str, Tensor]:
        """Computes the losses of a training step, for the terms that have a weight.

        Args:
            images: normalized batch, ``(N, 3, H, W)``.
            features: features of the student, one ``(N, C, H, W)`` for each level.
            predictions: predictions of the student's head by anchor, ``(N, R, K)`` for each level: class logits,
                box deltas and, for FCOS, centerness logits.
            normalizer: divisor of the student's own losses, for the sums over predictions.

        Returns:
            ``"distill_loss_features"``, ``"distill_loss_logits"``, ``"distill_loss_boxes"``. An anchor counts as much
            as the teacher is sure of an object there, by its largest class probability: background would have most
            of the gradient otherwise, as in any dense detector, and boxes and a centerness mean nothing there.
        """
        needs_head = self.logit_weight or self.box_weight
        with torch.no_grad():
            levels = self.teacher.backbone(images)
            levels = [levels[name] for name in self.teacher.head_in_features]
            targets = self.teacher.by_anchor(self.teacher.head(levels)) if needs_head else []
        losses = {}
        if self.feature_weight:
            losses["distill_loss_features"] = self.feature_weight * feature_loss(features, levels)
        sure = [level.sigmoid().amax(dim=2, keepdim=True) for level in targets[0]] if needs_head else []
        if self.logit_weight:
            logits = [index for index in range(len(targets)) if index != BOXES]
            total = torch.stack([logit_loss(predictions[index], targets[index], sure) for index in logits]).sum()
            losses["distill_loss_logits"] = self.logit_weight * total / normalizer
        if self.box_weight:
            total = box_loss(predictions[BOXES], targets[BOXES], sure)
            losses["distill_loss_boxes"] = self.box_weight * total / normalizer
        return losses
