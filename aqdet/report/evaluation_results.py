"""The evaluations of runs: metrics from files, and COCO's evaluation of the detections that were written."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data import register_declared
from ..evaluation.coco import COCO_LIMIT, LIMIT_KEY
from ..utils.files import from_json
from .detections import average_precision, evaluate, load_truth
from .run_folder import Run

logger = logging.getLogger(__name__)

RESULTS = "coco_instances_results.json"


@dataclasses.dataclass
class TestSet:
    """A dataset that at least one run was to be tested on; lists have an entry for each run.

    Attributes:
        name: The name that it is registered by.
        truth: Its annotations, None if no run's config leads to them.
        image_root: The folder of its images.
        metrics: AP and so on in percent, from each run's ``metrics.json`` of the evaluation; None without one.
        evaluations: COCO's evaluation of each run's detections; None without one.
    """

    name: str
    truth: COCO | None
    image_root: str
    metrics: list[dict[str, float | None] | None]
    evaluations: list[COCOeval | None]

    def class_name(self, category_id: int) -> str:
        """Returns the name of a category of the dataset."""
        assert self.truth is not None
        return str(self.truth.cats[category_id]["name"])


def collect_test_sets(runs: Sequence[Run]) -> list[TestSet]:
    """Collects the test sets of all runs, in order of first mention, with what each run achieved there."""
    sets: dict[str, TestSet] = {}
    for index, run in enumerate(runs):
        usable = _usable_test_sets(run)
        for name in run.test_cfg.DATASETS.TEST if run.test_cfg is not None else ("",):
            if name not in sets:
                nothing: list[Any] = [None] * len(runs)
                sets[name] = TestSet(name, None, "", nothing[:], nothing[:])
            found = sets[name]
            folder = run.evaluation_folder(name)
            found.metrics[index] = _read_metrics(run, folder)
            if name in usable:
                _evaluate(run, index, found, folder)
    return list(sets.values())


def limit_of(metrics: Mapping[str, float | None] | None) -> int:
    """Returns how many detections of an image count in the metrics of an evaluation."""
    return int((metrics or {}).get(LIMIT_KEY) or COCO_LIMIT)


def _usable_test_sets(run: Run) -> tuple[str, ...]:
    """Returns the run's test sets, registered and on disk; none, with a note, if they are not there."""
    cfg = run.test_cfg
    if cfg is None:
        return ()
    try:
        register_declared(cfg, train=False)
        for name in cfg.DATASETS.TEST:
            if not os.path.isfile(MetadataCatalog.get(name).get("json_file", "")):
                DatasetCatalog.get(name)  # The embedded dataset is drawn on first use.
    except (ValueError, OSError) as error:
        run.note(
            f"no pictures and curves of detection, the test data cannot be used: {error} (start the report in the "
            "folder where the training was started, or say where the data is by --opts DATASETS.DECLARED ...)"
        )
        return ()
    return tuple(cfg.DATASETS.TEST)


def _read_metrics(run: Run, folder: Path) -> dict[str, float | None] | None:
    path = folder / "metrics.json"
    try:
        values = from_json(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        run.note(f"not evaluated: {path} is missing (tools/train_net.py --eval-only writes it)")
        return None
    except (OSError, ValueError) as error:
        run.note(f"no AP: {path} cannot be read: {error}")
        return None
    flat: dict[str, object] = {}
    for key, value in values.items():
        # Another task than boxes, as that of masks, has its metrics under its name.
        flat |= {f"{key} {name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    numbers = {key: v for key, v in flat.items() if isinstance(v, int | float) and math.isfinite(v)}
    return {key: numbers.get(key) for key in flat}


def _evaluate(run: Run, index: int, found: TestSet, folder: Path) -> None:
    """Evaluates the detections of a run again, for what ``metrics.json`` does not hold."""
    if not (folder / RESULTS).is_file():
        run.note(f"no curves and pictures of detection: {folder / RESULTS} is missing")
        return
    logger.info("%s: matching detections with %s", run.name, found.name)
    metadata = MetadataCatalog.get(found.name)
    if metadata.get("evaluator_type") == "lvis":
        run.note(f"no curves and pictures of detection: they are COCO's, and {found.name} is evaluated as LVIS is")
        return
    if found.truth is None:
        found.truth = load_truth(metadata.json_file, found.name)
        found.image_root = metadata.image_root
    try:
        evaluation = evaluate(found.truth, folder / RESULTS, limit_of(found.metrics[index]))
    except ValueError as error:
        run.note(f"no curves and pictures of detection: {error}")
        return
    found.evaluations[index] = evaluation
    noted = (found.metrics[index] or {}).get("AP")
    computed = average_precision(evaluation)
    if noted is not None and math.isfinite(computed) and abs(noted - computed) > 1e-6:
        run.note(
            f"{folder / RESULTS} has AP {computed:.3f} but metrics.json says {noted:.3f}: they are of different "
            "evaluations, or the annotations have changed since"
        )
