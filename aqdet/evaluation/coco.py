"""COCO AP that always ends in a number and a file."""

from __future__ import annotations

import collections
import importlib.util
import logging
import math
import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from detectron2 import evaluation
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from ..utils.files import write_json

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# Of object areas in pixels, as COCO has them.
SIZE_BANDS = {"APs": (0, 32**2), "APm": (32**2, 96**2), "APl": (96**2, math.inf)}
COCO_EVALS = ("pycocotools", "faster-coco-eval")
COCO_LIMIT, KEYPOINT_LIMIT = 100, 20
"""Detections of an image that count, the best first, in COCO's own evaluation."""
TASKS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
"""Kinds of evaluation, and what they are of."""
LIMIT_KEY = "max_dets_per_image"
"""Name of another limit in ``metrics.json``."""


def check_coco_eval(name: str) -> None:
    """Checks that an implementation of COCO's evaluation exists and is installed.

    Raises:
        ValueError: in one line, naming ``TEST.COCO_EVAL``.
    """
    if name not in COCO_EVALS:
        raise ValueError(f"TEST.COCO_EVAL must be one of {', '.join(COCO_EVALS)}, got {name!r}")
    if name == "faster-coco-eval" and importlib.util.find_spec("faster_coco_eval") is None:
        raise ValueError(f"TEST.COCO_EVAL: {name!r} is not installed: pip install faster-coco-eval, or use pycocotools")


def max_dets_limits(max_dets_per_image: int) -> list[int]:
    """Returns COCO's three limits of detections of an image, ascending; AP is that of the last one."""
    return [min(limit, max_dets_per_image) for limit in (1, 10, max_dets_per_image)]


def fill_in(truth: COCO, name: str) -> None:
    """Adds fields that pycocotools needs and training does not, in place: ``iscrowd`` 0, and the box's area.

    Args:
        truth: annotations.
        name: the dataset's name, for the warning.
    """
    counts = {"iscrowd": 0, "area": 0}
    for annotation in truth.dataset.get("annotations", ()):
        _, _, width, height = annotation["bbox"]
        for field, value in (("iscrowd", 0), ("area", width * height)):
            counts[field] += field not in annotation
            annotation.setdefault(field, value)
    for field, count in counts.items():
        if count:
            source = "taken as 0" if field == "iscrowd" else "taken from the box"
            logger.warning("%d annotations of %s lack %r: %s", count, name, field, source)


class COCOEvaluator(evaluation.COCOEvaluator):
    """Detectron2's COCO evaluation of boxes, masks and keypoints, by pycocotools or faster-coco-eval.

    Keypoints are evaluated by pycocotools, whose limit for them is 20 detections of an image and which has no band of
    small objects for them.

    A crowd region is COCO's: it is not to be found, and detections that lie in it are neither right nor wrong.
    A declared dataset's ``ignore`` regions are crowd regions (:mod:`aqdet.data.check.findings`).

    AP, AP50 and AP75 are always numbers: a detector that finds nothing, or data without boxes, is 0. So is
    a size band or a class that has objects of which none is found; one without objects is NaN, null in the
    file. Results are also written to ``metrics.json``, with the limit of detections if it is not COCO's.

    Args:
        dataset_name: a registered dataset.
        output_dir: folder of ``metrics.json`` and Detectron2's own files.
        coco_eval: ``"pycocotools"`` or ``"faster-coco-eval"``, which agree to 1e-9.
        max_dets_per_image: how many detections of an image and class count, the best first. Figures with another
            limit than COCO's 100 are not comparable with published ones.
        masks: whether masks are evaluated too, as task ``"segm"``; not where the dataset has objects without one.
        keypoint_sigmas: a standard deviation for each keypoint, as a share of an object's size, in which distances are
            measured (1405.0312's dataset has them for people). With them keypoints are evaluated too, as task
            ``"keypoints"``, unless the dataset has objects without keypoints or with another number of them.
    """

    metrics: tuple[str, ...] = METRICS

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str,
        coco_eval: str = "pycocotools",
        max_dets_per_image: int = COCO_LIMIT,
        masks: bool = False,
        keypoint_sigmas: Sequence[float] = (),
    ) -> None:
        check_coco_eval(coco_eval)
        tasks = ("bbox", *["segm"] * masks, *["keypoints"] * bool(keypoint_sigmas))
        super().__init__(
            dataset_name, tasks, output_dir=output_dir, use_fast_impl=False, kpt_oks_sigmas=list(keypoint_sigmas)
        )
        self._coco_eval = coco_eval
        self._max_dets_per_image = max_dets_limits(max_dets_per_image)
        self._per_class: dict[str, dict[str, dict[str, float]]] = {}  # by task and class
        fill_in(self._coco_api, self._metadata.name)
        self._warn_of_crowded_images()
        annotations = self._coco_api.dataset.get("annotations", ())
        without = {
            "segm": sum(not a.get("segmentation") for a in annotations),
            "keypoints": sum(len(a.get("keypoints") or ()) != 3 * len(keypoint_sigmas) for a in annotations),
        }
        for task, lack in (("segm", "no segmentation"), ("keypoints", f"not {len(keypoint_sigmas)} keypoints")):
            if task in tasks and without[task]:
                logger.warning(
                    "%d annotations of %s have %s: %s are not evaluated",
                    without[task],
                    self._metadata.name,
                    lack,
                    TASKS[task],
                )
        self._tasks = tuple(task for task in tasks if not without.get(task))

    @property
    def limit(self) -> int:
        """Largest number of detections of an image that count."""
        return self._max_dets_per_image[-1]

    def _warn_of_crowded_images(self) -> None:
        annotations = self._coco_api.dataset.get("annotations", ())
        objects = collections.Counter(a["image_id"] for a in annotations if not a.get("iscrowd"))
        crowded = [count for count in objects.values() if count > self.limit]
        if crowded:
            logger.warning(
                "%d images of %s have more objects than the %d detections of an image that count, one of them %d: "
                "no detector finds them all; TEST.DETECTIONS_PER_IMAGE raises the limit",
                len(crowded),
                self._metadata.name,
                self.limit,
                max(crowded),
            )

    def reset(self) -> None:
        """Forgets all detections."""
        super().reset()
        self._per_class = {}

    def evaluate(self, img_ids: Collection[int] | None = None) -> dict[str, dict[str, float]]:
        """Returns ``{"bbox": {"AP": ..., ...}, "segm": ...}`` in percent on the main process, ``{}`` on the others.

        The file holds the metrics of boxes and, under ``"segm"``, those of masks.
        """
        results = super().evaluate(img_ids)
        if not comm.is_main_process():
            return {}
        objects = [
            a
            for a in self._coco_api.dataset.get("annotations", ())
            if not a.get("iscrowd") and (img_ids is None or a["image_id"] in img_ids)
        ]
        counts = collections.Counter(a["category_id"] for a in objects)
        completed = {task: self._complete(results.get(task) or {}, objects) for task in self._tasks}
        completed.get("keypoints", {}).pop("APs", None)
        for task, values in completed.items():
            logger.info(
                "AP of %s by class of %s, of the best %d detections of an image:\n%s",
                TASKS[task],
                self._metadata.name,
                KEYPOINT_LIMIT if task == "keypoints" else self.limit,
                self._class_table(task, values, counts),
            )
        limit = {LIMIT_KEY: self.limit} if self.limit != COCO_LIMIT else {}
        others = {task: values for task, values in completed.items() if task != "bbox"}
        write_json(os.path.join(self._output_dir, "metrics.json"), {**completed["bbox"], **limit, **others})
        return completed

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Collection[int] | None = None) -> None:
        """Writes the detections with the dataset's class ids and evaluates each task, by the chosen implementation."""
        originals = self._metadata.get("thing_dataset_id_to_contiguous_id") or {}
        original = {index: key for key, index in originals.items()}
        found = [result for prediction in predictions for result in prediction["instances"]]
        if original:
            for result in found:
                result["category_id"] = original[result["category_id"]]
        write_json(os.path.join(self._output_dir, "coco_instances_results.json"), found, indent=None)
        if not self._do_evaluation:
            logger.info("%s has no annotations to evaluate with", self._metadata.name)
            return
        logger.info(
            "Evaluating %d detections with %s, the best %d of an image", len(found), self._coco_eval, self.limit
        )
        for task in self._tasks:
            # An evaluation adds fields, and takes a detection's area from its box where it has one.
            of_task = [{k: v for k, v in r.items() if task != "segm" or k != "bbox"} for r in found]
            evaluated = self._evaluated(of_task, img_ids, task) if of_task else None
            self._results[task] = self._derive_coco_results(evaluated, task)
            if evaluated is not None:
                self._results[task].update(self._class_values(evaluated, task))

    def _evaluated(self, found: list[dict[str, Any]], img_ids: Collection[int] | None, task: str) -> Any:
        """Runs the evaluation of :meth:`_evaluation` on the given images, and returns it."""
        evaluated = self._evaluation(found, task)
        if img_ids is not None:
            evaluated.params.imgIds = list(img_ids)
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
        return evaluated

    def _evaluation(self, found: list[dict[str, Any]], task: str) -> Any:
        """Makes COCO's evaluation of these detections, without running it."""
        if self._coco_eval == "faster-coco-eval" and task != "keypoints":
            import faster_coco_eval

            ground_truth = faster_coco_eval.COCO(self._coco_api.dataset)
            evaluated = faster_coco_eval.COCOeval_faster(
                ground_truth, ground_truth.loadRes(found), task, print_function=print
            )
        else:
            # COCO's own summary is for its own limit.
            is_usual = self.limit == COCO_LIMIT or task == "keypoints"
            implementation = COCOeval if is_usual else COCOevalMaxDets
            evaluated = implementation(self._coco_api, self._coco_api.loadRes(found), task)
        if task == "keypoints":
            evaluated.params.kpt_oks_sigmas = np.array(self._kpt_oks_sigmas)
        else:
            evaluated.params.maxDets = list(self._max_dets_per_image)
        return evaluated

    def _class_values(self, evaluated: Any, task: str) -> dict[str, float]:
        """Returns ``AP-name`` of each class, in percent, and keeps AP50 and AP75 for the table."""
        # (IoU thresholds 0.5, 0.55 ... 0.95, recalls, classes, size bands, limits of detections an image)
        precision = evaluated.eval["precision"][:, :, :, 0, -1]
        values = {}
        for index, name in enumerate(self._metadata.get("thing_classes") or []):
            values[f"AP-{name}"] = _percent(precision[:, :, index])
            table = self._per_class.setdefault(task, {})
            table[name] = {"AP50": _percent(precision[0, :, index]), "AP75": _percent(precision[5, :, index])}
        return values

    def _class_table(self, task: str, values: dict[str, float], objects: collections.Counter[int]) -> str:
        """Returns a table with a row for each class: name, id in the dataset, objects to find, AP, AP50, AP75."""
        rows = []
        for name, category in zip(self._metadata.get("thing_classes") or [], self._category_ids(), strict=True):
            others = self._per_class.get(task, {}).get(name, {})
            nothing_found = 0.0 if objects[category] else math.nan
            cells = [values[f"AP-{name}"], others.get("AP50", nothing_found), others.get("AP75", nothing_found)]
            shown = [f"{cell:.2f}" if math.isfinite(cell) else "-" for cell in cells]
            rows.append([name, category, objects[category], *shown])
        return tabulate(rows, ["class", "id", "objects", "AP", "AP50", "AP75"], disable_numparse=True)

    def _category_ids(self) -> list[int]:
        return sorted(self._coco_api.getCatIds())

    def _complete(self, found: dict[str, float], objects: list[dict[str, Any]]) -> dict[str, float]:
        """Completes the metrics: one that is missing is 0 if there are objects for it, and else NaN."""
        exists = {key: True for key in self.metrics}
        for key, (low, high) in SIZE_BANDS.items():
            exists[key] = any(low <= a["area"] <= high for a in objects)
        used = {a["category_id"] for a in objects}
        for name, category in zip(self._metadata.get("thing_classes") or [], self._category_ids(), strict=True):
            exists[f"AP-{name}"] = category in used
        values = dict(found)
        for key, any_object in exists.items():
            if not math.isfinite(values.get(key, math.nan)):
                values[key] = 0.0 if any_object else math.nan
        return values


def _percent(precision: np.ndarray) -> float:
    """Returns the mean in percent of the precisions that exist; NaN if none does."""
    known = precision[precision > -1]
    return float(known.mean() * 100) if known.size else math.nan
