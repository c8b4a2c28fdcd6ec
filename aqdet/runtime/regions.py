"""The second stage of a two-stage detector, as Detectron2's Faster and Mask R-CNN have it at inference.

The network's first graph gives the predictions of the region proposal network and the pyramid's codes. Proposals are
made of the former; the graphs of the heads pool them from the latter. Shapes: R regions, K classes, S the side of a
mask. Boxes are ``(x1, y1, x2, y2)`` in pixels of the network's input, float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime

from .decode import Detections, anchors_at, apply_deltas, exp, sigmoid, suppress
from .folder import Description, Regions

MASK_THRESHOLD = 0.5
"""Probability from which a pixel is of the object."""
_OFFSET = 1e-8  # Detectron2's, so that a region without area has a level


class RegionHeads:
    """The heads for regions of one exported detector.

    Args:
        description: The detector's description, with ``regions``.
        box: The session of the graph of classes and boxes.
        mask: The session of the graph of masks; None for a detector without masks.
    """

    def __init__(
        self, description: Description, box: onnxruntime.InferenceSession, mask: onnxruntime.InferenceSession | None
    ) -> None:
        assert description.regions is not None
        self._description = description
        self._regions: Regions = description.regions
        self._box, self._mask = box, mask

    def detect(
        self,
        predictions: Sequence[Sequence[np.ndarray]],
        codes: Sequence[np.ndarray],
        size: tuple[int, int],
        original_size: tuple[int, int],
    ) -> Detections:
        """Detects objects in one image.

        Args:
            predictions: The outputs of each level, float32: logits ``(A, h, w)`` and deltas ``(A * 4, h, w)``.
            codes: The codes of each level that regions are pooled from, ``(C, h, w)`` uint8.
            size: The ``(height, width)`` of the resized image, without padding.
            original_size: The ``(height, width)`` that boxes and masks are scaled to.
        """
        found = self._classify(propose(predictions, size, self._description), codes, size)
        probabilities = self._mask_probabilities(found, codes)
        height, width = original_size
        boxes = found.boxes.copy()
        boxes[:, 0::2] *= np.float32(width / size[1])
        boxes[:, 1::2] *= np.float32(height / size[0])
        boxes = _clip(boxes, original_size)
        kept = _has_area(boxes)
        masks = None
        if probabilities is not None:
            masks = paste(probabilities[kept], boxes[kept], original_size)
        return Detections(boxes[kept], found.scores[kept], found.classes[kept], masks)

    def _classify(self, proposals: np.ndarray, codes: Sequence[np.ndarray], size: tuple[int, int]) -> Detections:
        """Returns detections in pixels of the network's input, the surest first."""
        num_classes, regions, description = len(self._description.classes), self._regions, self._description
        if not len(proposals):
            return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
        logits, deltas = self._run(self._box, (regions.box_logits, regions.box_deltas), proposals, codes)
        scores = softmax(logits.reshape(len(proposals), num_classes + 1))[:, :-1]
        region, cls = np.nonzero(scores > description.score_threshold)
        which = np.zeros_like(cls) if regions.class_agnostic_boxes else cls
        boxes = apply_deltas(
            deltas.reshape(len(proposals), -1, 4)[region, which],
            proposals[region],
            regions.box_weights,
            description.scale_clamp,
        )
        candidates = Detections(_clip(boxes, size), scores[region, cls], cls)
        return candidates.select(suppress(candidates, description.nms_threshold, description.max_detections))

    def _mask_probabilities(self, found: Detections, codes: Sequence[np.ndarray]) -> np.ndarray | None:
        """Returns ``(R, S, S)``, of each detection's class; None without masks."""
        if self._mask is None:
            return None
        if not len(found):
            return np.zeros((0, 1, 1), np.float32)
        (logits,) = self._run(self._mask, (self._regions.mask_logits,), found.boxes, codes)
        channel = np.zeros_like(found.classes) if logits.shape[1] == 1 else found.classes
        return sigmoid(logits[np.arange(len(found)), channel])

    def _run(
        self,
        session: onnxruntime.InferenceSession,
        outputs: Sequence[str],
        boxes: np.ndarray,
        codes: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        """Runs a head on regions of one image; each is pooled from the level of its size."""
        levels = assign_levels(boxes, self._regions)
        feeds = {}
        for index, (level, of_level) in enumerate(zip(self._regions.pyramid, codes, strict=True)):
            chosen = boxes[levels == index]
            feeds[f"codes_{level.name}"] = of_level[None]
            feeds[f"rois_{level.name}"] = chosen
            feeds[f"image_of_{level.name}"] = np.zeros(len(chosen), np.int64)
        order = np.argsort(np.argsort(levels, kind="stable"), kind="stable")
        return [value[order] for value in session.run(list(outputs), feeds)]


def propose(predictions: Sequence[Sequence[np.ndarray]], size: tuple[int, int], description: Description) -> np.ndarray:
    """Returns the regions that the proposal network finds in one image, ``(R, 4)``, the surest first.

    Args:
        predictions: See :meth:`RegionHeads.detect`.
        size: The ``(height, width)`` of the resized image.
        description: The detector's description.
    """
    regions = description.regions
    assert regions is not None
    found = []
    for number, ((logits, deltas), level) in enumerate(zip(predictions, description.levels, strict=True)):
        num_anchors, height, width = logits.shape
        flat = logits.transpose(1, 2, 0).reshape(-1)  # Detectron2's order: location, anchor
        best = np.argsort(-flat, kind="stable")[: description.topk_candidates]
        place, anchor = np.divmod(best, num_anchors)
        y, x = np.divmod(place, width)
        picked = deltas.reshape(num_anchors, 4, height, width)[anchor, :, y, x]
        anchors = anchors_at(level, description.anchor_offset, anchor, y, x)
        boxes = _clip(apply_deltas(picked, anchors, description.box_weights, description.scale_clamp), size)
        found.append((boxes, flat[best], np.full(len(best), number)))
    candidates = Detections(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
    candidates = candidates.select(_has_area(candidates.boxes, regions.min_box_size))
    kept = suppress(candidates, regions.proposal_nms_threshold, regions.max_proposals)
    return candidates.boxes[kept]


def assign_levels(boxes: np.ndarray, regions: Regions) -> np.ndarray:
    """Returns the index of the pyramid's level that each region is pooled from, ``(R,)`` (1612.03144, equation 1)."""
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    levels = np.floor(
        regions.canonical_level + np.log2(sides / np.float32(regions.canonical_size) + np.float32(_OFFSET))
    )
    first = int(np.log2(regions.pyramid[0].stride))
    return np.clip(levels, first, first + len(regions.pyramid) - 1).astype(np.int64) - first


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities along the last axis, float32."""
    powers = exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def paste(probabilities: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns masks in an image, ``(R, H, W)`` bool.

    Pixels read the mask of their box at their centres, bilinearly, and 0 outside of it.

    Args:
        probabilities: The probabilities over each box, ``(R, S, S)``.
        boxes: The boxes, ``(R, 4)`` in pixels of the image.
        size: The ``(height, width)`` of the image.
    """
    masks = np.zeros((len(boxes), *size), bool)
    for mask, probability, box in zip(masks, probabilities, boxes, strict=True):
        starts = np.maximum(np.floor(box[:2]).astype(np.int64) - 1, 0)
        ends = np.minimum(np.ceil(box[2:]).astype(np.int64) + 1, size[::-1])
        columns, rows = (
            _interpolation(start, end, low, high, probability.shape[-1])
            for start, end, low, high in zip(starts, ends, box[:2], box[2:], strict=True)
        )
        mask[starts[1] : ends[1], starts[0] : ends[0]] = rows @ probability @ columns.T >= MASK_THRESHOLD
    return masks


def _interpolation(start: int, end: int, low: float, high: float, side: int) -> np.ndarray:
    """Weights ``(end - start, side)`` of a mask's cells, which lie from ``low`` to ``high``, at pixels' centres."""
    place = (np.arange(start, end, dtype=np.float32) + np.float32(0.5) - low) / (high - low) * side - np.float32(0.5)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(side, dtype=np.float32)), 0).astype(np.float32)


def _clip(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    return np.clip(boxes, 0, np.array([width, height, width, height], np.float32))


def _has_area(boxes: np.ndarray, least: float = 0.0) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0] > least) & (boxes[:, 3] - boxes[:, 1] > least)
