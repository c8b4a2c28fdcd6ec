"""
Objects that a detector can learn: those that its config's anchors, or points, reach after the config's resize.

Shape shorthand:
    N: objects
    L: levels of the pyramid that the head reads
    A: anchors at a location
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode

__all__ = ["Matcher", "resize"]

_OBJECTS_AT_ONCE = 2000


@dataclasses.dataclass(frozen=True)
class _Level:
    """A pyramid level: its stride, and the (width, height) of its anchors at each location, (A, 2); both in pixels."""

    stride: int
    shapes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Matcher:
    """
    The places that a detector predicts boxes from, and how near an object has to be to one.

    Attributes:
        levels: the pyramid levels, the finest first.
        offset: position of the first location, in strides.
        threshold: IoU below which an anchor is background for an object, unless no other anchor overlaps the object
            more; None for a detector of points (FCOS).
        radius: largest distance of a point from an object's centre, in strides.
        candidates: number of points of each level that an object considers (ATSS); 0 for FCOS's own rule.
    """

    levels: tuple[_Level, ...]
    offset: float
    threshold: float | None
    radius: float = 0.0
    candidates: int = 0

    @classmethod
    def from_config(cls, cfg: CfgNode, *, scale: float = 1.0, ratios: Sequence[float] | None = None) -> Matcher | None:
        """
        Reads a config.

        Args:
            cfg: the config.
            scale: factor of the anchors' sizes, to try other sizes.
            ratios: heights by widths of the anchors; None for the config's.

        Returns:
            the matcher; None for an architecture without boxes, or if the strides of its features are not known.
        """
        model = cfg.MODEL
        name = model.META_ARCHITECTURE.removeprefix("Quant")
        if name not in ("RetinaNet", "FCOS", "GeneralizedRCNN", "ProposalNetwork"):
            return None
        if name != "FCOS" and model.ANCHOR_GENERATOR.NAME != "DefaultAnchorGenerator":
            return None
        node = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}.get(name, "RPN")
        strides = [_stride(feature) for feature in model[node].IN_FEATURES]
        if None in strides:
            return None
        if name == "FCOS":
            is_atss = model.FCOS.ASSIGNMENT == "atss"
            side = model.FCOS.ATSS_SIDE if is_atss else 1
            levels = tuple(_Level(stride, np.full((1, 2), side * stride)) for stride in strides if stride)
            candidates = model.FCOS.ATSS_CANDIDATES if is_atss else 0
            return cls(levels, 0.5, None, model.FCOS.CENTER_SAMPLING_RADIUS, candidates)
        anchors = model.ANCHOR_GENERATOR
        sizes = _per_level(anchors.SIZES, len(strides))
        all_ratios = [list(ratios)] * len(strides) if ratios else _per_level(anchors.ASPECT_RATIOS, len(strides))
        levels = tuple(
            _Level(stride, _anchor_shapes([scale * size for size in level_sizes], level_ratios))
            for stride, level_sizes, level_ratios in zip(strides, sizes, all_ratios, strict=True)
            if stride
        )
        return cls(levels, anchors.OFFSET, model[node].IOU_THRESHOLDS[0])

    def is_matched(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """
        Tells which objects the detector can learn.

        Args:
            boxes: x, y, width, height in pixels of the network's input: (N, 4).
            sizes: width and height of their images: (N, 2).

        Returns:
            whether an anchor overlaps the object by the threshold, or the object gets a point: (N,).
        """
        if self.threshold is not None:
            return self.best_overlap(boxes, sizes) >= self.threshold
        if not self.candidates:
            return self._has_point(boxes, sizes)
        parts = [slice(first, first + _OBJECTS_AT_ONCE) for first in range(0, len(boxes), _OBJECTS_AT_ONCE)]
        found = [self._has_chosen_point(boxes[part], sizes[part]) for part in parts]
        return np.concatenate([np.zeros(0, dtype=bool), *found])

    def best_overlap(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Returns the largest IoU of each object with an anchor: (N,)."""
        best = np.zeros(len(boxes))
        centers = boxes[:, :2] + boxes[:, 2:] / 2
        for level in self.levels:
            # Among anchors of one shape, the nearest overlaps most; columns and rows can be chosen independently.
            cells = np.clip(np.round(centers / level.stride - self.offset), 0, np.ceil(sizes / level.stride) - 1)
            away = np.abs((cells + self.offset) * level.stride - centers)
            for shape in level.shapes:
                inner = np.minimum((shape + boxes[:, 2:]) / 2 - away, np.minimum(shape, boxes[:, 2:])).clip(0)
                shared = inner.prod(axis=1)
                best = np.maximum(best, shared / (shape.prod() + boxes[:, 2:].prod(axis=1) - shared))
        return best

    def _has_point(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Returns whether an object that is alone in its image gets a point of FCOS, as Detectron2 has it: (N,)."""
        found = np.zeros(len(boxes), dtype=bool)
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        reach = math.ceil(self.radius)
        for index, level in enumerate(self.levels):
            stride = level.stride
            nearest = np.round((low + high) / 2 / stride - self.offset)
            for dx in range(-reach, reach + 1):
                for dy in range(-reach, reach + 1):
                    cells = nearest + (dx, dy)
                    points = (cells + self.offset) * stride
                    far = np.abs(points - (low + high) / 2).max(axis=1)
                    sides = np.concatenate([points - low, high - points], axis=1)
                    longest = sides.max(axis=1)
                    fits = (far < self.radius * stride) & (sides.min(axis=1) > 0)
                    fits &= ((cells >= 0) & (cells < np.ceil(sizes / stride))).all(axis=1)
                    # The finest level gets all smaller objects, the coarsest all larger ones.
                    fits &= (longest > (4 * stride if index else 0)) & (
                        (longest < 8 * stride) if index + 1 < len(self.levels) else True
                    )
                    found |= fits
        return found

    def _has_chosen_point(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Returns whether an object alone in its image gets a point of ATSS (``aqdet.modeling.assignment``): (N,)."""
        low, high = boxes[:, None, :2], boxes[:, None, :2] + boxes[:, None, 2:]
        overlaps, inside = [], []
        for level in self.levels:
            cells, exist = self._cells_around((low + high)[:, 0] / 2 / level.stride, np.ceil(sizes / level.stride))
            points = (cells + self.offset) * level.stride
            away = np.where(exist, ((points - (low + high) / 2) ** 2).sum(axis=2), np.inf)
            nearest = np.argsort(away, axis=1, kind="stable")[:, : self.candidates]
            points = np.take_along_axis(points, nearest[:, :, None], axis=1)
            half = level.shapes[0] / 2
            shared = (np.minimum(points + half, high) - np.maximum(points - half, low)).clip(0).prod(axis=2)
            union = level.shapes[0].prod() + boxes[:, None, 2:].prod(axis=2) - shared
            overlaps.append(np.where(np.take_along_axis(exist, nearest, axis=1), shared / union, np.nan))
            inside.append(np.concatenate([points - low, high - points], axis=2).min(axis=2) > 0)
        overlap = np.concatenate(overlaps, axis=1)
        number = (~np.isnan(overlap)).sum(axis=1)
        below = overlap - np.nanmax(overlap, axis=1, keepdims=True)
        mean = np.nanmean(below, axis=1, keepdims=True)
        variance = np.nansum((below - mean) ** 2, axis=1) / (number - 1).clip(1)
        enough = below >= mean + np.sqrt(variance)[:, None]  # candidates outside the grid do not exist
        return (enough & np.concatenate(inside, axis=1)).any(axis=1)

    def _cells_around(self, centers: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns cells of a level with the nearest ``candidates`` among them, row by row, and whether each exists.

        Args:
            centers: x and y of objects in strides: (N, 2).
            grid: number of columns and rows: (N, 2).
        """
        width = self.candidates + 1
        first = np.round(centers - self.offset) - width // 2
        first = np.clip(first, 0, (grid - width).clip(0))
        row, column = (axis.reshape(-1) for axis in np.mgrid[:width, :width])
        cells = first[:, None, :] + np.stack([column, row], axis=1)
        return cells, (cells < grid[:, None, :]).all(axis=2)


def resize(boxes: np.ndarray, sizes: np.ndarray, shortest: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Applies the rule of Detectron2's ``ResizeShortestEdge``.

    Args:
        boxes: x, y, width, height: (N, 4).
        sizes: width and height of their images: (N, 2).
        shortest: length that the shorter side becomes; 0 leaves images as they are.
        longest: upper limit of the longer side; it comes before `shortest`.

    Returns:
        boxes and sizes in pixels of the network's input.
    """
    if not shortest:
        return boxes, sizes
    scale = shortest / sizes.min(axis=1)
    scale = np.minimum(scale, longest / sizes.max(axis=1))
    resized = np.floor(sizes * scale[:, None] + 0.5).clip(1)
    factors = resized / sizes
    return boxes * np.concatenate([factors, factors], axis=1), resized


def _stride(feature: str) -> int | None:
    """Returns the stride of a feature by its name, 8 for ``p3`` and 16 for ``res4``; None for other names."""
    found = re.fullmatch(r"(p|res)([1-9])", feature)
    return None if found is None else 2 ** int(found[2])


def _per_level(values: Sequence, num_levels: int) -> list[list[float]]:
    """Returns SIZES or ASPECT_RATIOS of each level by Detectron2's rule: a list a level, or one list for all."""
    if not isinstance(values[0], list | tuple):
        return [list(values)] * num_levels
    if len(values) == 1:
        return [list(values[0])] * num_levels
    if len(values) != num_levels:
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS need one list, or {num_levels} as there are levels, got "
            f"{len(values)}"
        )
    return [list(level) for level in values]


def _anchor_shapes(sizes: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    shapes = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for size in sizes for ratio in ratios]
    return np.array(shapes, dtype=np.float64).reshape(-1, 2)
