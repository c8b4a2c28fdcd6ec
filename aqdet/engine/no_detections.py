"""The likely causes if a training ends with a detector that finds nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode

from ..data.registry import NUM_CLASSES_NODES


def describe_nothing_found(cfg: CfgNode, results: Mapping[str, Any]) -> str:
    """Lists the likely causes of an AP of 0: no detection above the threshold, or none that is right.

    Args:
        cfg: The config of the training.
        results: The result of ``Trainer.test``: metrics by task, or these by dataset.

    Returns:
        One line with the likely causes, the likeliest first; "" if something was found.
    """
    node = NUM_CLASSES_NODES.get(cfg.MODEL.META_ARCHITECTURE.removeprefix("Quant"))
    if node is None or "SCORE_THRESH_TEST" not in cfg.MODEL[node]:
        return ""
    for name, values in _box_metrics(cfg, results):
        if values.get("AP") != 0:
            continue
        scores = _scores(cfg, name)
        threshold = f"MODEL.{node}.SCORE_THRESH_TEST {cfg.MODEL[node].SCORE_THRESH_TEST:g}"
        if scores:
            what = f"AP is 0 on {name}, with {len(scores)} detections, whose best score is {max(scores):.3f}"
        else:
            what = f"no detection on {name} has a score above {threshold}"
        causes = [
            *_causes_in_training(cfg),
            *_causes_in_matching(cfg, node),
            f"the classes of {name} are not in the order of the training's, or MODEL.{node}.NUM_CLASSES is another",
            f"{threshold} is too high for so short a training",
        ]
        return f"{what}. Likely causes, in this order: " + "; ".join(f"({i}) {c}" for i, c in enumerate(causes, 1))
    return ""


def _box_metrics(cfg: CfgNode, results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if "bbox" in results:
        yield cfg.DATASETS.TEST[0], results["bbox"]
    for name, of_dataset in results.items():
        if isinstance(of_dataset, Mapping) and "bbox" in of_dataset:
            yield name, of_dataset["bbox"]


def _scores(cfg: CfgNode, name: str) -> list[float]:
    """Returns the scores of all detections on a dataset, which the evaluator has written."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference", name if len(cfg.DATASETS.TEST) > 1 else "")
    try:
        with open(os.path.join(folder, "coco_instances_results.json"), encoding="utf-8") as file:
            return [detection["score"] for detection in json.load(file)]
    except OSError:
        return []


def _causes_in_training(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    if solver.MAX_ITER == 0:
        yield "nothing was trained (SOLVER.MAX_ITER 0): MODEL.WEIGHTS must be of a trained detector"
    elif cfg.MODEL.QUANT.ENABLED:
        yield (
            f"SOLVER.BASE_LR {solver.BASE_LR:g} is too high where quantization sets in: try a third of it, or a longer "
            f"SOLVER.WARMUP_ITERS ({solver.WARMUP_ITERS})"
            + ("" if cfg.MODEL.WEIGHTS else ", and start from full precision (MODEL.WEIGHTS is empty)")
        )
    else:
        yield (
            f"SOLVER.BASE_LR {solver.BASE_LR:g} is too high, or SOLVER.MAX_ITER {solver.MAX_ITER} too short"
            + ("" if cfg.MODEL.WEIGHTS else " for random weights (MODEL.WEIGHTS is empty)")
        )


def _causes_in_matching(cfg: CfgNode, node: str) -> Iterator[str]:
    if node in ("RETINANET", "ROI_HEADS"):
        yield (
            f"MODEL.ANCHOR_GENERATOR.SIZES {cfg.MODEL.ANCHOR_GENERATOR.SIZES} do not match the objects in images of "
            f"INPUT.MIN_SIZE_TRAIN {tuple(cfg.INPUT.MIN_SIZE_TRAIN)}"
        )
    else:
        yield f"the objects are too small in images of INPUT.MIN_SIZE_TRAIN {tuple(cfg.INPUT.MIN_SIZE_TRAIN)}"
