"""COCO's evaluation beyond AP: curves of precision over recall, and the outcome of each detection and object."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..evaluation import fill_in
from ..evaluation.coco import COCO_LIMIT, max_dets_limits

FOUND, FALSE, MISSED = "found", "false", "missed"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A detection that is right or wrong, or an object that was missed.

    Attributes:
        kind: :data:`FOUND`, :data:`FALSE` or :data:`MISSED`.
        box: x, y, width and height in pixels of the image as annotated.
        category_id: The category's id in the dataset.
        score: The detection's score; None for a missed object.
        segmentation: Polygons or RLE where masks were evaluated too; None elsewhere.
    """

    kind: str
    box: tuple[float, float, float, float]
    category_id: int
    score: float | None = None
    segmentation: Any = None


def f1(outcomes: Sequence[Outcome]) -> float:
    """Returns ``2 found / (2 found + false + missed)``; 1 where there is nothing and nothing is found."""
    found = sum(outcome.kind == FOUND for outcome in outcomes)
    return 2 * found / (len(outcomes) + found) if outcomes else 1.0


def load_truth(json_file: str | os.PathLike[str], name: str) -> COCO:
    """Loads ground truth with the fields that pycocotools needs; ``name`` is the dataset's, for messages."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(os.fspath(json_file))
    fill_in(truth, name)
    return truth


def evaluate(truth: COCO, results_file: str | os.PathLike[str], max_dets_per_image: int = COCO_LIMIT) -> COCOeval:
    """Runs COCO's box evaluation of a ``coco_instances_results.json``.

    Args:
        truth: The ground truth, see :func:`load_truth`.
        results_file: The file of the detections.
        max_dets_per_image: How many detections of an image and class count, the best first.

    Returns:
        The evaluation, accumulated, with its arrays.

    Raises:
        ValueError: In one line, if the file is no list of detections in images of the dataset.
    """
    try:
        with open(results_file, encoding="utf-8") as file:
            results = json.load(file)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, _as_detections(truth, results), "bbox")
            evaluation.params.maxDets = max_dets_limits(max_dets_per_image)
            evaluation.evaluate()
            evaluation.accumulate()
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{os.fspath(results_file)}: no detections of this dataset: {reason}") from error
    return evaluation


def _as_detections(truth: COCO, results: list[dict]) -> COCO:
    if not isinstance(results, list):
        raise TypeError(f"it holds a {type(results).__name__}, not a list")
    if results:
        return truth.loadRes(results)
    # loadRes does not take an empty list.
    nothing = COCO()
    nothing.dataset = {**truth.dataset, "annotations": []}
    nothing.createIndex()
    return nothing


def average_precision(evaluation: COCOeval) -> float:
    """Returns COCO AP in percent, of objects of all areas; NaN without objects."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    known = precision[precision > -1]
    return 100 * float(known.mean()) if known.size else math.nan


def precision_recall(
    evaluation: COCOeval, iou: float, category_id: int | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns precision over recall, as COCO interpolates it, for objects of all areas.

    Args:
        evaluation: An accumulated evaluation.
        iou: One of COCO's thresholds, 0.5, 0.55, ... 0.95.
        category_id: The id of one class; None for the mean over the classes that have objects.

    Returns:
        Recall and precision, both ``(101,)`` in [0, 1]; None if there are no objects.
    """
    params = evaluation.params
    index = int(np.argmin(np.abs(np.asarray(params.iouThrs) - iou)))
    precision = evaluation.eval["precision"][index, :, :, 0, -1]
    if category_id is not None:
        precision = precision[:, [list(params.catIds).index(category_id)]]
    precision = precision[:, (precision > -1).all(axis=0)]
    if precision.shape[1] == 0:
        return None
    return np.asarray(params.recThrs), precision.mean(axis=1)


def has_masks(evaluation: COCOeval) -> bool:
    """Returns whether the detections that were evaluated have masks; boxes alone are given a polygon by pycocotools."""
    return any(isinstance(found.get("segmentation"), dict) for found in evaluation.cocoDt.anns.values())


def image_outcomes(evaluation: COCOeval, min_score: float) -> dict[int, list[Outcome]]:
    """Returns the outcomes of objects, and of detections with at least ``min_score``, in each image.

    A detection is right if COCO's matching gives it an object of its class at an IoU of 0.5. Matching goes
    by falling score, so that leaving out low scores changes no other match. Crowd regions, and detections
    matched to them, count as neither. Masks are shown, and not compared.

    Returns:
        Image id -> outcomes, for every image of the dataset.
    """
    truth, found = evaluation.cocoGt, evaluation.cocoDt
    outcomes: dict[int, list[Outcome]] = {image_id: [] for image_id in truth.getImgIds()}
    field = "segmentation" if has_masks(evaluation) else ""
    for entry in evaluation.evalImgs:
        if entry is None or entry["aRng"] != evaluation.params.areaRng[0]:
            continue
        rows = outcomes[entry["image_id"]]
        category_id = entry["category_id"]
        scores = dict(zip(entry["dtIds"], entry["dtScores"], strict=True))
        shown = [score >= min_score for score in entry["dtScores"]]
        for index, key in enumerate(entry["dtIds"]):
            if shown[index] and not entry["dtIgnore"][0, index]:
                kind = FOUND if entry["dtMatches"][0, index] > 0 else FALSE
                mine = found.anns[key]
                rows.append(Outcome(kind, tuple(mine["bbox"]), category_id, scores[key], mine.get(field)))
        for index, key in enumerate(entry["gtIds"]):
            match = entry["gtMatches"][0, index]
            if not entry["gtIgnore"][index] and not (match > 0 and scores[match] >= min_score):
                missed = truth.anns[key]
                rows.append(Outcome(MISSED, tuple(missed["bbox"]), category_id, None, missed.get(field)))
    return outcomes


def rank_images(runs: Sequence[Mapping[int, Sequence[Outcome]]]) -> list[tuple[int, float]]:
    """Returns image ids with their mean F1 over runs, the worst first; images of one score by id.

    Args:
        runs: Outcomes by image of each run, see :func:`image_outcomes`, all of the same dataset.
    """
    scores = {image_id: float(np.mean([f1(run[image_id]) for run in runs])) for image_id in runs[0]}
    return sorted(scores.items(), key=lambda item: (item[1], item[0]))
