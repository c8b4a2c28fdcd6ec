"""COCO AP that always ends in a number and a file."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection

from detectron2 import evaluation
from detectron2.utils import comm
from pycocotools.coco import COCO

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# Of object areas in pixels, as COCO has them.
SIZE_BANDS = {"APs": (0, 32**2), "APm": (32**2, 96**2), "APl": (96**2, math.inf)}


def fill_in(truth: COCO, name: str) -> None:
    """Fields that training does without and pycocotools does not, in place: no crowd, the box's area.

    Args:
        truth: annotations.
        name: of the dataset, for the warning.
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
    """Detectron2's COCO box evaluation with pycocotools.

    AP, AP50 and AP75 are always numbers: a detector that finds nothing, or data without boxes, is 0. So is
    a size band or a class that has objects of which none is found; one without objects is NaN, null in the
    file. Results are also written to ``metrics.json``.

    Args:
        dataset_name: a registered dataset.
        output_dir: folder of ``metrics.json`` and Detectron2's own files.
    """

    def __init__(self, dataset_name: str, *, output_dir: str) -> None:
        super().__init__(dataset_name, ("bbox",), output_dir=output_dir, use_fast_impl=False)
        fill_in(self._coco_api, self._metadata.name)

    def evaluate(self, img_ids: Collection[int] | None = None) -> dict[str, dict[str, float]]:
        """``{"bbox": {"AP": ..., ...}}`` in percent on the main process, ``{}`` on the others."""
        results = super().evaluate(img_ids)
        if not comm.is_main_process():
            return {}
        values = self._complete(results.get("bbox") or {}, img_ids)
        os.makedirs(self._output_dir, exist_ok=True)
        path = os.path.join(self._output_dir, "metrics.json")
        finite = {key: v if math.isfinite(v) else None for key, v in values.items()}
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(finite, file, indent=1)
        os.replace(path + ".part", path)
        return {"bbox": values}

    def _complete(self, found: dict[str, float], img_ids: Collection[int] | None) -> dict[str, float]:
        """All metrics: Detectron2's, with 0 for what it leaves out although there are objects."""
        objects = [
            a
            for a in self._coco_api.dataset.get("annotations", ())
            if not a.get("iscrowd") and (img_ids is None or a["image_id"] in img_ids)
        ]
        exists = {key: True for key in METRICS}
        for key, (low, high) in SIZE_BANDS.items():
            exists[key] = any(low <= a["area"] <= high for a in objects)
        names = self._metadata.get("thing_classes") or []
        ids = sorted(self._coco_api.getCatIds())
        used = {a["category_id"] for a in objects}
        for name, category in zip(names, ids, strict=True):
            exists[f"AP-{name}"] = category in used
        if len(names) == 1 and "AP" in found:
            found = {**found, f"AP-{names[0]}": found["AP"]}
        values = dict(found)
        for key, any_object in exists.items():
            if not math.isfinite(values.get(key, math.nan)):
                values[key] = 0.0 if any_object else math.nan
        return values
