"""The bootstrap over images: how far AP, and the difference between two runs, depend on the images that were chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

DRAWS = 300
INTERVAL = (5.0, 95.0)
"""Percentiles between which 90 % of the draws lie."""
_MIN_DRAWS = 2


@dataclasses.dataclass(frozen=True)
class ClassMatches:
    """Detections of one class in all images, by falling score, as COCO matched them with objects of all areas.

    Attributes:
        image: index of each detection's image, ``(D,)``.
        right: whether it is matched, ``(T, D)`` for the IoU thresholds.
        wrong: whether it is neither matched nor to be ignored, ``(T, D)``.
        objects: number of the class's objects in each image, ``(I,)``.
    """

    image: NDArray[np.intp]
    right: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    objects: NDArray[np.intp]


def matches_of(evaluation: COCOeval) -> list[ClassMatches]:
    """Returns the matches of each class that has objects."""
    params = evaluation.params
    num_images, num_areas, limit = len(params.imgIds), len(params.areaRng), params.maxDets[-1]
    found = []
    for index in range(len(params.catIds)):
        first = index * num_areas * num_images
        entries = [(i, e) for i, e in enumerate(evaluation.evalImgs[first : first + num_images]) if e is not None]
        objects = np.zeros(num_images, np.intp)
        for i, entry in entries:
            objects[i] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
        if not objects.any():
            continue
        scores = np.concatenate([np.asarray(entry["dtScores"], float)[:limit] for _, entry in entries])
        order = np.argsort(-scores, kind="mergesort")  # COCO's own order of equal scores
        image = np.concatenate([np.full(len(entry["dtScores"][:limit]), i, np.intp) for i, entry in entries])[order]
        matched, ignored = (
            np.concatenate([np.asarray(entry[key])[:, :limit] != 0 for _, entry in entries], axis=1)[:, order]
            for key in ("dtMatches", "dtIgnore")
        )
        found.append(ClassMatches(image, matched & ~ignored, ~matched & ~ignored, objects))
    return found


def weighted_average_precision(
    classes: Sequence[ClassMatches], weights: NDArray[np.intp], recalls: NDArray[np.float64]
) -> float:
    """Computes COCO AP in percent of a set that has each image as often as ``weights`` says; NaN without objects.

    Args:
        classes: The matches of each class.
        weights: How often each image is there, ``(I,)``.
        recalls: The recalls at which precision is read, ``(R,)``, rising.
    """
    means = []
    for found in classes:
        total = int(found.objects @ weights)
        if not total:
            continue
        times = weights[found.image]
        right, wrong = (np.cumsum(hits * times, axis=1) for hits in (found.right, found.wrong))
        precision = right / np.maximum(right + wrong, 1)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = right / total
        for row, reached in zip(best, recall, strict=True):
            places = np.searchsorted(reached, recalls, side="left")
            means.append(row[places[places < row.size]].sum() / recalls.size)
    return 100 * float(np.mean(means)) if means else math.nan


def resampled_ap(evaluations: Sequence[COCOeval], *, draws: int = DRAWS, seed: int = 0) -> NDArray[np.float64]:
    """Computes AP over images drawn with replacement, as many as there are (Efron's bootstrap, 1979).

    Each draw has the same images for all evaluations, so that differences between rows are paired. A draw has fewer
    different images than the set, and more AP on average: the range is not centred on the set's AP.

    Args:
        evaluations: Accumulated evaluations of detections in the same images.
        draws: The number of draws.
        seed: The seed of the draws.

    Returns:
        AP in percent, ``(evaluations, draws)``; a draw without objects is NaN.

    Raises:
        ValueError: If the evaluations are not of the same images.
    """
    images = [list(evaluation.params.imgIds) for evaluation in evaluations]
    if any(ids != images[0] for ids in images):
        raise ValueError("evaluations of different images cannot be compared by drawing images")
    count = len(images[0])
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    rows = []
    for evaluation in evaluations:
        classes = matches_of(evaluation)
        recalls = np.asarray(evaluation.params.recThrs, float)
        rows.append([weighted_average_precision(classes, drawn, recalls) for drawn in weights])
    return np.asarray(rows, float)


def interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """Returns the ends between which 90 % of the finite draws lie; None if there are fewer than two of them."""
    known = values[np.isfinite(values)]
    if known.size < _MIN_DRAWS:
        return None
    low, high = np.percentile(known, INTERVAL)
    return float(low), float(high)
