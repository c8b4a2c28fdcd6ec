"""Everything that a report shows, from the files of runs, their data, and their detectors."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from ..analysis.histograms import SiteHistogram, activation_histograms, weight_histograms
from ..analysis.plan import PlanRow, make_plan
from ..checkpoint import load_detector
from ..config import detector_only
from ..data import register_declared
from ..evaluation.coco import COCO_LIMIT, LIMIT_KEY
from ..quantization import quantizers
from .detections import average_precision, evaluate, load_truth
from .run_folder import Run

logger = logging.getLogger(__name__)

RESULTS = "coco_instances_results.json"
_STRIDE = 32
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What reading a damaged image raises."""


@dataclasses.dataclass
class TestSet:
    """A dataset that at least one run was to be tested on; lists have an entry for each run.

    Attributes:
        name: as registered. truth: its annotations, None if no run's config leads to them.
        image_root: folder of its images.
        metrics: AP and so on in percent, from each run's ``metrics.json`` of the evaluation; None without one.
        evaluations: COCO evaluation of each run's detections; None without one.
    """

    name: str
    truth: COCO | None
    image_root: str
    metrics: list[dict[str, float | None] | None]
    evaluations: list[COCOeval | None]

    def class_name(self, category_id: int) -> str:
        """Of a category of the dataset."""
        assert self.truth is not None
        return str(self.truth.cats[category_id]["name"])


@dataclasses.dataclass
class Inside:
    """What a run's detector looks like inside.

    Attributes:
        rows: its plan for an image of ``size`` (height, width), without the auxiliary path.
        weights, activations: histograms by path of the quantizer.
        num_images: how many test images the activations are of.
    """

    rows: list[PlanRow] = dataclasses.field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    weights: dict[str, SiteHistogram] = dataclasses.field(default_factory=dict)
    activations: dict[str, SiteHistogram] = dataclasses.field(default_factory=dict)
    num_images: int = 0


def _usable_test_sets(run: Run) -> tuple[str, ...]:
    """Names of the run's test sets, registered and on disk; none, with a note, if they are not there."""
    if run.cfg is None:
        return ()
    try:
        register_declared(run.cfg, train=False)
        for name in run.cfg.DATASETS.TEST:
            if not os.path.isfile(MetadataCatalog.get(name).get("json_file", "")):
                DatasetCatalog.get(name)  # The embedded dataset is drawn on first use.
    except (ValueError, OSError) as error:
        run.note(
            f"no pictures and curves of detection, the test data cannot be used: {error} (start the report in the "
            "folder where the training was started, or say where the data is by --opts DATASETS.DECLARED ...)"
        )
        return ()
    return tuple(run.cfg.DATASETS.TEST)


def collect_test_sets(runs: Sequence[Run]) -> list[TestSet]:
    """The test sets of all runs, in order of first mention, with what each run achieved there."""
    sets: dict[str, TestSet] = {}
    for index, run in enumerate(runs):
        usable = _usable_test_sets(run)
        for name in run.cfg.DATASETS.TEST if run.cfg is not None else ("",):
            if name not in sets:
                nothing: list[Any] = [None] * len(runs)
                sets[name] = TestSet(name, None, "", nothing[:], nothing[:])
            found = sets[name]
            folder = run.evaluation_folder(name)
            found.metrics[index] = _read_metrics(run, folder)
            if name in usable:
                _evaluate(run, index, found, folder)
    return list(sets.values())


def _read_metrics(run: Run, folder: Path) -> dict[str, float | None] | None:
    path = folder / "metrics.json"
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        run.note(f"not evaluated: {path} is missing (tools/train_net.py --eval-only writes it)")
        return None
    except (OSError, ValueError) as error:
        run.note(f"no AP: {path} cannot be read: {error}")
        return None
    numbers = {key: v for key, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
    return {key: numbers.get(key) for key in values}


def limit_of(metrics: Mapping[str, float | None] | None) -> int:
    """How many detections of an image count in the metrics of an evaluation."""
    return int((metrics or {}).get(LIMIT_KEY) or COCO_LIMIT)


def _evaluate(run: Run, index: int, found: TestSet, folder: Path) -> None:
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


def look_inside(run: Run, num_images: int) -> Inside:
    """Builds a run's detector from its checkpoint and looks at its layers; what cannot be had is noted.

    Args:
        run: its test sets are registered.
        num_images: of the first test set, evenly spaced, to observe activations.
    """
    inside = Inside()
    if run.cfg is None:
        return inside
    logger.info("%s: looking at the layers", run.name)
    cfg = detector_only(run.cfg)
    try:
        model = build_model(cfg)
    except (ValueError, KeyError) as error:
        run.note(f"no plan and histograms, the config makes no detector: {error}")
        return inside
    if hasattr(model, "head_in_features"):
        inside.size = plan_size(cfg)
        inside.rows = make_plan(model, inside.size)
    else:
        run.note(f"no plan: it is for dense detectors, this is a {cfg.MODEL.META_ARCHITECTURE}")
    if not any(True for _ in quantizers(model)):
        run.note("no histograms: the detector is in full precision and has no quantizers")
    elif (model := _load(run, cfg)) is not None:
        inside.weights = weight_histograms(model)
        _observe(run, cfg, model, inside, num_images)
    return inside


def _load(run: Run, cfg: CfgNode) -> nn.Module | None:
    """Loads the detector of a run; None, with a note, if there is no checkpoint that serves."""
    weights = run.weights()
    if weights is None:
        run.note("no histograms: there is no checkpoint in the folder")
        return None
    try:
        return load_detector(cfg, str(weights))
    except ValueError as error:
        run.note(f"no histograms: {error}")
        return None


def plan_size(cfg: CfgNode) -> tuple[int, int]:
    """Shortest and longest side at test time, rounded up to multiples of 32 pixels."""
    shortest, longest = cfg.INPUT.MIN_SIZE_TEST or 640, cfg.INPUT.MAX_SIZE_TEST
    return tuple(math.ceil(side / _STRIDE) * _STRIDE for side in (shortest, max(shortest, longest)))  # type: ignore


def _observe(run: Run, cfg: CfgNode, model: nn.Module, inside: Inside, num_images: int) -> None:
    names = [name for name in cfg.DATASETS.TEST if os.path.isfile(MetadataCatalog.get(name).get("json_file", ""))]
    if not names or num_images == 0:
        run.note("no histograms of activations: there are no test images to run")
        return
    records = DatasetCatalog.get(names[0])
    chosen = np.linspace(0, len(records) - 1, min(num_images, len(records))).round().astype(int)
    mapper = DatasetMapper(cfg, False)

    def forward() -> None:
        for index in chosen:
            with torch.no_grad():
                model([mapper(records[index])])

    try:
        inside.activations = activation_histograms(model, forward)
    except UNREADABLE as error:
        run.note(f"no histograms of activations: {' '.join(str(error).split())}")
        return
    inside.num_images = len(chosen)
    unseen = [name for name, q in quantizers(model) if q.spec.role == "input" and name not in inside.activations]
    if unseen:
        run.note(f"{len(unseen)} activation quantizers saw nothing, {unseen[0]} among them")
