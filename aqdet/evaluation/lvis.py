"""AP of LVIS."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from .coco import METRICS, COCOEvaluator

LVIS_LIMIT = 300
"""Detections of an image that count, the best first, in LVIS's own evaluation."""
FREQUENCIES = {"APr": "r", "APc": "c", "APf": "f"}
"""Metrics of rare, common and frequent classes, and the ``frequency`` of these in an annotation file."""


def check_lvis_eval() -> None:
    """Checks that the package that evaluates LVIS is installed.

    Raises:
        ValueError: in one line, naming the package.
    """
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise ValueError("LVIS is evaluated by faster-coco-eval, which is not installed: pip install faster-coco-eval")


class LVISEvaluator(COCOEvaluator):
    """Box evaluation of LVIS (1908.03195), whose images are annotated for some of the classes only.

    A detection counts as wrong only where the class is known to be absent from the image or annotated in it to
    completeness; elsewhere it is ignored. faster-coco-eval has that; LVIS's own package does not run with NumPy 1.24
    and later. APr, APc and APf are of rare, common and frequent classes.

    Args:
        dataset_name: a registered dataset with an annotation file of LVIS.
        output_dir: see :class:`COCOEvaluator`.
        max_dets_per_image: how many detections of an image and class count; LVIS's own limit is 300.

    Raises:
        ValueError: if faster-coco-eval is not installed, or the annotation file lacks a field of LVIS.
    """

    metrics = (*METRICS, *FREQUENCIES)

    def __init__(self, dataset_name: str, *, output_dir: str, max_dets_per_image: int = LVIS_LIMIT) -> None:
        check_lvis_eval()
        super().__init__(
            dataset_name, output_dir=output_dir, coco_eval="faster-coco-eval", max_dets_per_image=max_dets_per_image
        )
        content = self._coco_api.dataset
        for part, fields in (
            ("images", ("neg_category_ids", "not_exhaustive_category_ids")),
            ("categories", ("frequency",)),
        ):
            for entry in content.get(part, ()):
                missing = [field for field in fields if field not in entry]
                if missing:
                    raise ValueError(
                        f"{self._metadata.json_file}: {missing[0]!r} is missing from {part}, as LVIS has it"
                    )

    def _evaluation(self, found: list[dict[str, Any]], task: str) -> Any:
        """Makes LVIS's evaluation of these detections, without running it."""
        import faster_coco_eval

        truth = faster_coco_eval.COCO(self._coco_api.dataset)
        evaluated = faster_coco_eval.COCOeval_faster(
            truth, truth.loadRes(found), task, print_function=print, lvis_style=True
        )
        evaluated.params.maxDets = [self.limit]
        return evaluated

    def _class_values(self, evaluated: Any, task: str) -> dict[str, float]:
        """Returns ``AP-name`` of each class and AP by frequency, in percent."""
        values = super()._class_values(evaluated, task)
        for key in FREQUENCIES:
            value = evaluated.stats_as_dict[key]
            if value >= 0:
                values[key] = 100 * value
        return values

    def _complete(self, found: dict[str, float], objects: list[dict[str, Any]]) -> dict[str, float]:
        """Completes the metrics as for COCO; those by frequency, too."""
        values = super()._complete(found, objects)
        used = {a["category_id"] for a in objects}
        frequencies = {c["frequency"] for c in self._coco_api.dataset["categories"] if c["id"] in used}
        for key, frequency in FREQUENCIES.items():
            if key not in found:
                values[key] = 0.0 if frequency in frequencies else math.nan
        return values
