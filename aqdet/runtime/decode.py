"""Decoding of the network's outputs to detections, as Detectron2's RetinaNet and FCOS do at inference.

Shapes: A anchors at a location, K classes, a level of ``h x w`` locations, R detections. Boxes are
``(x1, y1, x2, y2)`` in pixels, float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from .folder import FCOS, Description, Level


@dataclasses.dataclass(frozen=True)
class Detections:
    """The objects found in one image, by descending score.

    Attributes:
        boxes: ``(R, 4)`` float32, in pixels of the original image.
        scores: ``(R,)`` float32.
        classes: ``(R,)`` int64, indices of the detector's ``classes``.
        masks: ``(R, H, W)`` bool, over the original image; None from a detector that finds none.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: np.ndarray) -> Detections:
        """Returns the detections at indices, or those that a mask selects."""
        return self.select(index)

    def select(self, index: np.ndarray) -> Detections:
        """Returns the detections at indices, or where a mask holds."""
        masks = None if self.masks is None else self.masks[index]
        return Detections(self.boxes[index], self.scores[index], self.classes[index], masks)


def decode(
    outputs: Sequence[Sequence[np.ndarray]],
    size: tuple[int, int],
    original_size: tuple[int, int],
    description: Description,
) -> Detections:
    """Decodes the outputs of one image.

    It deviates from Detectron2 in that non-maximum suppression is exactly class by class. For few boxes, torchvision
    shifts the classes apart instead, which rounds coordinates.

    Args:
        outputs: The float32 outputs of each level: logits ``(A * K, h, w)``, deltas ``(A * 4, h, w)`` and, for an FCOS
            with centerness, ``(1, h, w)``.
        size: ``(height, width)`` of the resized image, without padding.
        original_size: ``(height, width)`` that boxes are scaled and clipped to.
        description: The description of the detector.
    """
    found = [
        _decode_level(of_level, level, description) for of_level, level in zip(outputs, description.levels, strict=True)
    ]
    candidates = Detections(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
    kept = candidates.select(suppress(candidates, description.nms_threshold, description.max_detections))
    height, width = original_size
    boxes = kept.boxes.copy()
    boxes[:, 0::2] *= width / size[1]
    boxes[:, 1::2] *= height / size[0]
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    nonempty = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return Detections(boxes, kept.scores, kept.classes).select(nonempty)


def _decode_level(
    outputs: Sequence[np.ndarray], level: Level, description: Description
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns boxes, scores and classes of a level's best candidates above the score threshold.

    A score is the sigmoid of a logit; with centerness, it is the root of both sigmoids' product (2006.09214, eq. 4).
    """
    logits, deltas, *centerness = outputs
    num_classes, num_anchors = len(description.classes), len(level.anchors)
    _, height, width = logits.shape
    threshold = description.score_threshold
    # The sigmoid of millions of logits would cost more than the rest: it is computed only for those that may pass.
    lowest = threshold * abs(threshold) if centerness else threshold
    logit = math.log(lowest / (1 - lowest)) - 1e-3 if 0 < lowest < 1 else math.copysign(math.inf, lowest - 1)
    index = np.flatnonzero(logits > logit)
    scores = sigmoid(logits.reshape(-1)[index])
    if centerness:
        scores = np.sqrt(scores * sigmoid(centerness[0].reshape(-1)[index % (height * width)]))
    above = scores > threshold
    index, scores = index[above], scores[above]
    channel, y, x = np.unravel_index(index, logits.shape)
    anchor, cls = np.divmod(channel, num_classes)
    # Equal scores keep the order of Detectron2's flattened predictions: location, anchor, class.
    order = np.lexsort((((y * width + x) * num_anchors + anchor) * num_classes + cls, -scores))
    order = order[: description.topk_candidates]
    scores, anchor, cls, y, x = scores[order], anchor[order], cls[order], y[order], x[order]
    picked = deltas.reshape(num_anchors, 4, height, width)[anchor, :, y, x]
    anchors = anchors_at(level, description.anchor_offset, anchor, y, x)
    if description.architecture == FCOS:
        return _apply_distances(picked, anchors), scores, cls
    return apply_deltas(picked, anchors, description.box_weights, description.scale_clamp), scores, cls


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Returns 1 / (1 + exp(-x)), float32."""
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is the limit
        return 1 / (1 + exp(-x))


def exp(x: np.ndarray) -> np.ndarray:
    """Returns the exponential of float32 values, rounded once from float64.

    NumPy's exponential of float32 differs in the last bit between processors, and so would scores and boxes.
    """
    return np.exp(x.astype(np.float64)).astype(np.float32)


def anchors_at(level: Level, offset: float, anchor: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns the boxes ``(R, 4)`` of anchors at locations."""
    half = np.array(level.anchors) / 2
    cell = np.concatenate([-half, half], axis=1).astype(np.float32)
    shift = (np.stack([x, y, x, y], axis=1) * level.stride + offset * level.stride).astype(np.float32)
    return shift + cell[anchor]


def apply_deltas(deltas: np.ndarray, anchors: np.ndarray, weights: Sequence[float], scale_clamp: float) -> np.ndarray:
    """Returns the boxes ``(R, 4)`` of deltas ``(R, 4)`` on anchors, as Detectron2's ``Box2BoxTransform`` does."""
    size = anchors[:, 2:] - anchors[:, :2]
    centre = anchors[:, :2] + np.float32(0.5) * size
    deltas = deltas / np.array(weights, np.float32)
    centre = deltas[:, :2] * size + centre
    half = np.float32(0.5) * (exp(np.minimum(deltas[:, 2:], np.float32(scale_clamp))) * size)
    return np.concatenate([centre - half, centre + half], axis=1)


def _apply_distances(distances: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Returns the boxes ``(R, 4)`` of distances to four sides in anchor sizes (``Box2BoxTransformLinear``)."""
    distances = np.maximum(distances, 0) * (anchors[:, 2:3] - anchors[:, :1])
    centre = np.float32(0.5) * (anchors[:, :2] + anchors[:, 2:])
    return np.concatenate([centre - distances[:, :2], centre + distances[:, 2:]], axis=1)


def suppress(candidates: Detections, threshold: float, limit: int) -> np.ndarray:
    """Returns the indices of at most ``limit`` boxes after class-wise non-maximum suppression, the best scores first.

    A box is suppressed if its intersection over union with a better one of its class is greater than ``threshold``.
    """
    order = np.argsort(-candidates.scores, kind="stable")
    boxes, classes = candidates.boxes[order], candidates.classes[order]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[int] = []
    while len(order) and len(kept) < limit:
        kept.append(int(order[0]))
        corner = np.maximum(boxes[:, :2], boxes[0, :2])
        sides = np.maximum(np.minimum(boxes[:, 2:], boxes[0, 2:]) - corner, 0)
        shared = sides[:, 0] * sides[:, 1]
        with np.errstate(invalid="ignore"):  # 0 / 0 for empty boxes means no overlap
            overlap = shared / (areas + areas[0] - shared)
        left = (classes != classes[0]) | ~(overlap > np.float64(threshold))
        left[0] = False
        order, boxes, classes, areas = order[left], boxes[left], classes[left], areas[left]
    return np.array(kept, np.int64)
