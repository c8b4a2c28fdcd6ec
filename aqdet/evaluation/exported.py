"""Evaluation through an exported folder: what is measured is what ships."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import nn

from ..runtime import Detections, Detector

logger = logging.getLogger(__name__)


class ExportedDetector(nn.Module):
    """An exported detector that takes and gives what a Detectron2 model does in evaluation.

    Only ``file_name`` of an input is used: the runtime decodes, resizes and pads the image itself.

    Args:
        detector: from :class:`aqdet.runtime.Detector`.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Maps N inputs to N ``{"instances": ...}`` with ``pred_boxes``, ``scores`` and ``pred_classes``."""
        images = [entry["file_name"] for entry in batched_inputs]
        found = self.detector.detect(images)
        return [
            {"instances": to_instances(detections, (entry["height"], entry["width"]))}
            for detections, entry in zip(found, batched_inputs, strict=True)
        ]


def to_instances(detections: Detections, image_size: tuple[int, int]) -> Instances:
    """Converts detections in an image of ``(height, width)`` into Detectron2's ``Instances``."""
    return Instances(
        image_size,
        pred_boxes=Boxes(torch.from_numpy(detections.boxes)),
        scores=torch.from_numpy(detections.scores),
        pred_classes=torch.from_numpy(detections.classes),
    )


def load_exported(cfg: CfgNode, folder: str | os.PathLike[str]) -> ExportedDetector:
    """Loads an exported folder to evaluate it on a config's ``DATASETS.TEST``.

    Input size, thresholds and the like are those of the folder; a config that says otherwise is told so.

    Raises:
        FileNotFoundError, ValueError: see :class:`aqdet.runtime.Detector`; ValueError also if a dataset has
            other classes than the folder.
    """
    detector = Detector(folder, threads=torch.get_num_threads())
    unnamed = tuple(f"class_{index}" for index in range(len(detector.classes)))
    for name in cfg.DATASETS.TEST:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is None or (detector.classes == unnamed and len(classes) == len(unnamed)):
            logger.warning("Only the number of classes of %s and %s is compared: one does not name them", folder, name)
        elif tuple(classes) != detector.classes:
            raise ValueError(
                f"{os.fspath(folder)} detects the classes {_listed(detector.classes)}, but {name} of DATASETS.TEST has "
                f"{_listed(classes)}: it was exported from another model"
            )
    ships = detector.description
    section = ships.architecture.upper()
    node = cfg.MODEL[section]
    for key, asked, has in (
        ("INPUT.FORMAT", cfg.INPUT.FORMAT, ships.channels),
        ("INPUT.MIN_SIZE_TEST", cfg.INPUT.MIN_SIZE_TEST, ships.min_size),
        ("INPUT.MAX_SIZE_TEST", cfg.INPUT.MAX_SIZE_TEST, ships.max_size),
        (f"MODEL.{section}.SCORE_THRESH_TEST", node.SCORE_THRESH_TEST, ships.score_threshold),
        (f"MODEL.{section}.TOPK_CANDIDATES_TEST", node.TOPK_CANDIDATES_TEST, ships.topk_candidates),
        (f"MODEL.{section}.NMS_THRESH_TEST", node.NMS_THRESH_TEST, ships.nms_threshold),
        ("TEST.DETECTIONS_PER_IMAGE", cfg.TEST.DETECTIONS_PER_IMAGE, ships.max_detections),
    ):
        if asked != has:
            logger.warning("%s is %r, but %s was exported with %r: using that", key, asked, folder, has)
    return ExportedDetector(detector)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
