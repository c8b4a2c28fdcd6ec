"""COCO AP that always ends in a number and a file."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from detectron2 import evaluation
from detectron2.utils import comm

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class COCOEvaluator(evaluation.COCOEvaluator):
    """Detectron2's COCO box evaluation with pycocotools.

    A detector that finds nothing, or data without boxes, is AP 0. A size band or a class that has no
    objects is NaN, null in the file. Results are also written to ``metrics.json``.

    Args:
        dataset_name: a registered dataset.
        output_dir: folder of ``metrics.json`` and Detectron2's own files.
    """

    def __init__(self, dataset_name: str, *, output_dir: str) -> None:
        super().__init__(dataset_name, ("bbox",), output_dir=output_dir, use_fast_impl=False)

    def evaluate(self, img_ids: Any = None) -> dict[str, dict[str, float]]:
        """``{"bbox": {"AP": ..., ...}}`` in percent on the main process, ``{}`` on the others."""
        results = super().evaluate(img_ids)
        if not comm.is_main_process():
            return {}
        names = self._metadata.get("thing_classes") or []
        values = dict(results.get("bbox") or {})
        for key in (*METRICS, *(f"AP-{name}" for name in names)):
            values.setdefault(key, math.nan)
        for key in ("AP", "AP50", "AP75"):
            if not values[key] >= 0:
                values[key] = 0.0
        os.makedirs(self._output_dir, exist_ok=True)
        path = os.path.join(self._output_dir, "metrics.json")
        finite = {key: v if math.isfinite(v) else None for key, v in values.items()}
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(finite, file, indent=1)
        os.replace(path + ".part", path)
        return {"bbox": values}
