"""Evaluation through an exported folder, of the very files that ship."""

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

from ..runtime import Description, Detections, Detector

logger = logging.getLogger(__name__)


class ExportedDetector(nn.Module):
    """An exported detector with the inputs and outputs of a Detectron2 model in evaluation.

    Only ``file_name`` of an input is used: the runtime decodes, resizes and pads the image itself.

    Args:
        detector: an exported detector that is loaded.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Maps N inputs to N ``{"instances": ...}`` with ``pred_boxes``, ``scores`` and ``pred_classes``.

        ``pred_masks`` is there too where the detector finds masks.
        """
        images = [entry["file_name"] for entry in batched_inputs]
        found = self.detector.detect(images)
        return [
            {"instances": to_instances(detections, (entry["height"], entry["width"]))}
            for detections, entry in zip(found, batched_inputs, strict=True)
        ]


def to_instances(detections: Detections, image_size: tuple[int, int]) -> Instances:
    """Converts detections in an image of ``(height, width)`` into Detectron2's ``Instances``."""
    found = Instances(
        image_size,
        pred_boxes=Boxes(torch.from_numpy(detections.boxes)),
        scores=torch.from_numpy(detections.scores),
        pred_classes=torch.from_numpy(detections.classes),
    )
    if detections.masks is not None:
        found.pred_masks = torch.from_numpy(detections.masks)
    return found


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
    for key, has in (
        ("INPUT.FORMAT", ships.channels),
        ("INPUT.MIN_SIZE_TEST", ships.min_size),
        ("INPUT.MAX_SIZE_TEST", ships.max_size),
        *_thresholds(ships),
        ("TEST.DETECTIONS_PER_IMAGE", ships.max_detections),
    ):
        asked = cfg
        for name in key.split("."):
            asked = asked[name]
        if asked != has:
            logger.warning("%s is %r, but %s was exported with %r: using that", key, asked, folder, has)
    return ExportedDetector(detector)


def _thresholds(ships: Description) -> list[tuple[str, Any]]:
    """Returns the config keys of the thresholds of decoding, each with the value that ships."""
    if ships.regions is not None:
        return [
            ("MODEL.RPN.PRE_NMS_TOPK_TEST", ships.topk_candidates),
            ("MODEL.RPN.POST_NMS_TOPK_TEST", ships.regions.max_proposals),
            ("MODEL.RPN.NMS_THRESH", ships.regions.proposal_nms_threshold),
            ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", ships.score_threshold),
            ("MODEL.ROI_HEADS.NMS_THRESH_TEST", ships.nms_threshold),
        ]
    node = f"MODEL.{ships.architecture.upper()}"
    return [
        (f"{node}.SCORE_THRESH_TEST", ships.score_threshold),
        (f"{node}.TOPK_CANDIDATES_TEST", ships.topk_candidates),
        (f"{node}.NMS_THRESH_TEST", ships.nms_threshold),
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
