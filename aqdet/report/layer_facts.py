"""The layers of a run's detector: its plan, and histograms of the values that its quantizers read."""

from __future__ import annotations

import dataclasses
import logging
import math
import os

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from ..analysis.histograms import SiteHistogram, activation_histograms, weight_histograms
from ..analysis.plan import PlanRow, make_plan
from ..checkpoint import load_detector
from ..config import detector_only
from ..quantization import quantizers
from .run_folder import Run

logger = logging.getLogger(__name__)

_STRIDE = 32
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""The errors that reading a damaged image raises."""


@dataclasses.dataclass
class LayerFacts:
    """The layers of a run's detector.

    Attributes:
        rows: The detector's plan for an image of ``size`` (height, width), without the auxiliary path.
        size: Height and width in pixels.
        weights, activations: Histograms by the name of the quantizer.
        num_images: The number of test images that gave the activations.
    """

    rows: list[PlanRow] = dataclasses.field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    weights: dict[str, SiteHistogram] = dataclasses.field(default_factory=dict)
    activations: dict[str, SiteHistogram] = dataclasses.field(default_factory=dict)
    num_images: int = 0


def collect_layer_facts(run: Run, num_images: int) -> LayerFacts:
    """Builds a run's detector from its checkpoint and looks at its layers; the run notes what is not available.

    Args:
        run: The run, whose test sets are registered.
        num_images: How many images of the first test set, evenly spaced, the activations are observed on.
    """
    facts = LayerFacts()
    if run.cfg is None:
        return facts
    logger.info("%s: looking at the layers", run.name)
    cfg = detector_only(run.cfg)
    try:
        model = build_model(cfg)
    except (ValueError, KeyError) as error:
        run.note(f"no plan and histograms, the config makes no detector: {error}")
        return facts
    if hasattr(model, "head_in_features"):
        facts.size = plan_size(cfg)
        facts.rows = make_plan(model, facts.size)
    else:
        run.note(f"no plan: it is for aqdet's detectors, this is a {cfg.MODEL.META_ARCHITECTURE}")
    if not any(True for _ in quantizers(model)):
        run.note("no histograms: the detector is in full precision and has no quantizers")
    elif (model := _load(run, cfg)) is not None:
        facts.weights = weight_histograms(model)
        _observe(run, cfg, model, facts, num_images)
    return facts


def plan_size(cfg: CfgNode) -> tuple[int, int]:
    """Returns the shortest and the longest side at test time, rounded up to multiples of 32 pixels."""
    shortest, longest = cfg.INPUT.MIN_SIZE_TEST or 640, cfg.INPUT.MAX_SIZE_TEST
    return tuple(math.ceil(side / _STRIDE) * _STRIDE for side in (shortest, max(shortest, longest)))  # type: ignore


def _load(run: Run, cfg: CfgNode) -> nn.Module | None:
    """Loads the detector of a run; returns None, with a note, if there is no usable checkpoint."""
    weights = run.weights()
    if weights is None:
        run.note("no histograms: there is no checkpoint in the folder")
        return None
    try:
        return load_detector(cfg, str(weights))
    except ValueError as error:
        run.note(f"no histograms: {error}")
        return None


def _observe(run: Run, cfg: CfgNode, model: nn.Module, facts: LayerFacts, num_images: int) -> None:
    """Runs the detector on test images and keeps the histograms of its activations."""
    assert run.test_cfg is not None
    tests = run.test_cfg.DATASETS.TEST
    names = [name for name in tests if os.path.isfile(MetadataCatalog.get(name).get("json_file", ""))]
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
        facts.activations = activation_histograms(model, forward)
    except UNREADABLE as error:
        run.note(f"no histograms of activations: {' '.join(str(error).split())}")
        return
    facts.num_images = len(chosen)
    unseen = [name for name, q in quantizers(model) if q.spec.role == "input" and name not in facts.activations]
    if unseen:
        run.note(f"{len(unseen)} activation quantizers saw nothing, {unseen[0]} among them")
