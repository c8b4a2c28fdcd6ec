"""The evaluator of a dataset, by its ``evaluator_type``."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils import comm
from pycocotools.cocoeval import Params

from ..data.registry import EVALUATOR_TYPE
from ..utils.files import write_json
from .classification import TopKEvaluator
from .coco import COCOEvaluator
from .lvis import LVISEvaluator, check_lvis_eval

logger = logging.getLogger(__name__)

SUPPORTED = (EVALUATOR_TYPE, "cityscapes_instance", "coco", "coco_panoptic_seg", "lvis", "pascal_voc")
"""Values of ``evaluator_type`` that have an evaluator."""
BOXES_ONLY = ("coco_panoptic_seg",)
"""Those of which only the boxes are evaluated."""
REFUSED = {
    "ade20k_panoptic_seg": "panoptic segmentation",
    "cityscapes_panoptic_seg": "panoptic segmentation",
    "cityscapes_sem_seg": "semantic segmentation",
    "sem_seg": "semantic segmentation",
}
"""Detectron2's others, and what they are for."""


def check_evaluator(cfg: CfgNode, dataset_name: str) -> None:
    """Checks that a dataset can be evaluated, before a training that would end with it.

    Args:
        cfg: config of the detector.
        dataset_name: one of ``DATASETS.TEST``.

    Raises:
        ValueError: in one line, naming the dataset and its ``evaluator_type``, if there is no evaluator for it, a
            package that it needs is not installed, it is for masks and the detector has none, or keypoints have no
            sigmas.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    said = f"DATASETS.TEST {dataset_name!r} has evaluator_type {kind!r}"
    if kind in REFUSED:
        raise ValueError(f"{said}, which is for {REFUSED[kind]}: supported are {', '.join(SUPPORTED)}")
    if kind is not None and kind not in SUPPORTED:
        raise ValueError(f"{said}: supported are {', '.join(SUPPORTED)}")
    keypoint_sigmas(cfg)
    if kind == "lvis":
        try:
            check_lvis_eval()
        except ValueError as error:
            raise ValueError(f"{said}: {error}") from error
    if kind == "cityscapes_instance":
        if not finds_masks(cfg):
            raise ValueError(
                f"{said}, which is for masks, and MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} finds none"
            )
        if importlib.util.find_spec("cityscapesscripts") is None:
            raise ValueError(f"{said}: cityscapesscripts is not installed: pip install cityscapesscripts")


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """Builds the evaluator of a dataset by its ``evaluator_type``, as Detectron2's ``tools/train_net.py`` does.

    A dataset without one is evaluated as COCO's, which its records are converted to. All evaluators write
    ``metrics.json``.

    Args:
        cfg: config of the detector.
        dataset_name: one of ``DATASETS.TEST``.
        output_dir: folder of the results.

    Raises:
        ValueError: see :func:`check_evaluator`.
    """
    check_evaluator(cfg, dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == EVALUATOR_TYPE:
        return TopKEvaluator(output_dir=output_dir)
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir, max_dets_per_image=limit)
    if kind == "pascal_voc":
        return RecordedEvaluator(PascalVOCDetectionEvaluator(dataset_name), output_dir=output_dir)
    if kind == "cityscapes_instance":
        return RecordedEvaluator(CityscapesInstanceEvaluator(dataset_name), output_dir=output_dir)
    if kind in BOXES_ONLY:
        logger.info("Of %s (%s) the boxes are evaluated, as COCO's", dataset_name, kind)
    return COCOEvaluator(
        dataset_name,
        output_dir=output_dir,
        coco_eval=cfg.TEST.COCO_EVAL,
        max_dets_per_image=limit,
        masks=finds_masks(cfg) and kind not in BOXES_ONLY,
        keypoint_sigmas=keypoint_sigmas(cfg) if kind not in BOXES_ONLY else (),
    )


def is_two_stage(cfg: CfgNode) -> bool:
    """Returns whether the detector of a config is a two-stage one."""
    return issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), GeneralizedRCNN)


def finds_masks(cfg: CfgNode) -> bool:
    """Returns whether the detector of a config finds masks."""
    return is_two_stage(cfg) and cfg.MODEL.MASK_ON


def keypoint_sigmas(cfg: CfgNode) -> tuple[float, ...]:
    """Returns a sigma for each keypoint that the detector of a config finds, COCO's by default; none without keypoints.

    Raises:
        ValueError: in one line, if ``TEST.KEYPOINT_OKS_SIGMAS`` has not one for each, or is empty and the keypoints are
            not COCO's 17.
    """
    if not (is_two_stage(cfg) and cfg.MODEL.KEYPOINT_ON):
        return ()
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    sigmas = tuple(float(sigma) for sigma in cfg.TEST.KEYPOINT_OKS_SIGMAS or Params("keypoints").kpt_oks_sigmas)
    if len(sigmas) != number or not all(sigma > 0 for sigma in sigmas):
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS must have a positive value for each of the {number} keypoints of "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, got {list(cfg.TEST.KEYPOINT_OKS_SIGMAS)} (empty is COCO's 17)"
        )
    return sigmas


class RecordedEvaluator(DatasetEvaluator):
    """An evaluator of Detectron2 whose results are also written to ``metrics.json``.

    Args:
        evaluator: gives ``{task: {metric: value}}``.
        output_dir: folder of the file, which holds the metrics of the first task, and those of each other task
            under its name.
    """

    def __init__(self, evaluator: DatasetEvaluator, *, output_dir: str) -> None:
        self._evaluator = evaluator
        self._output_dir = output_dir

    def reset(self) -> None:
        """Forgets all images."""
        self._evaluator.reset()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """See Detectron2's."""
        self._evaluator.process(inputs, outputs)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Returns the evaluator's results on the main process, ``{}`` on the others."""
        results = self._evaluator.evaluate()
        if not comm.is_main_process() or not results:
            return {}
        results = {task: {key: float(value) for key, value in values.items()} for task, values in results.items()}
        first, *others = results
        content = {**results[first], **{task: results[task] for task in others}}
        write_json(os.path.join(self._output_dir, "metrics.json"), content)
        return results
