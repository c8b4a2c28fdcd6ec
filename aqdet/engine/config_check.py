"""Checks of a config against the machine and against the registries, before anything is built."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from ..modeling.architecture import check_architecture
from ..modeling.backbone import feature_names
from ..modeling.meta_arch.classifier import FEATURE, QuantClassifier
from ..modeling.meta_arch.dense import LowPrecisionDense
from ..modeling.meta_arch.rcnn import QuantGeneralizedRCNN, check_two_stage

logger = logging.getLogger(__name__)

SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
DENSE = ("RETINANET", "FCOS")
# Names that Detectron2 0.6 and main both know.
NORMS = ("BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


def fit_to_machine(cfg: CfgNode) -> None:
    """Changes and logs the keys that this machine cannot follow: device, SyncBN and mixed precision on a CPU."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is %s but there is no CUDA device: using cpu", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        if cfg.SOLVER.AMP.ENABLED:
            logger.warning("SOLVER.AMP.ENABLED: mixed precision is for CUDA devices: training in float32")
            cfg.SOLVER.AMP.ENABLED = False
        for name, node in _nodes_with_norm(cfg):
            if node.NORM == "SyncBN":
                logger.warning("MODEL.%s.NORM: SyncBN does not run on a CPU: using BN", name)
                node.NORM = "BN"


def check_config(cfg: CfgNode) -> None:
    """Checks values that Detectron2 accepts silently, or refuses without naming the key.

    Raises:
        ValueError: In one line, naming the key, the value and the valid ones.
    """
    _check_numbers(cfg)
    _check_test(cfg)
    if re.fullmatch(r"cpu|cuda(:\d+)?", cfg.MODEL.DEVICE) is None:
        raise ValueError(f"MODEL.DEVICE must be cpu, cuda or cuda:N, got {cfg.MODEL.DEVICE!r}")
    for key, value, registry in (
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
    ):
        if value not in registry:
            names = ", ".join(sorted(name for name, _ in registry))
            raise ValueError(f"{key} must be one of {names}, got {value!r}")
    if cfg.SOLVER.LR_SCHEDULER_NAME not in SCHEDULERS:
        raise ValueError(
            f"SOLVER.LR_SCHEDULER_NAME must be one of {', '.join(SCHEDULERS)}, got {cfg.SOLVER.LR_SCHEDULER_NAME!r}"
        )
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    check_architecture(cfg)
    _check_input(cfg)
    if issubclass(architecture, QuantGeneralizedRCNN):
        check_two_stage(cfg)
    elif not issubclass(architecture, LowPrecisionDense):
        dense = ", ".join(sorted(name for name, known in META_ARCH_REGISTRY if issubclass(known, LowPrecisionDense)))
        for key in ("EXTRA_LOSS", "DISTILL"):
            if cfg.MODEL[key].ENABLED:
                raise ValueError(
                    f"MODEL.{key}.ENABLED is True, which MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} does "
                    f"not have: use one of {dense}"
                )
    for name, node in _nodes_with_norm(cfg):
        try:
            get_norm(node.NORM, 32)
        except KeyError as error:
            raise ValueError(
                f"MODEL.{name}.NORM must be one of {', '.join(NORMS)} or '' for none, got {node.NORM!r}"
            ) from error
    _check_anchors(cfg)
    _check_features(cfg, architecture)
    _check_group_norm(cfg, architecture)
    if issubclass(architecture, QuantClassifier):
        if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
            raise ValueError(
                "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler counts classes of boxes, which image folders do "
                "not have: use TrainingSampler"
            )
        if cfg.INPUT.CROP.ENABLED:
            logger.warning("INPUT.CROP is for boxes, and left out: INPUT.CLASSIFIER says how images are cropped")


def _check_anchors(cfg: CfgNode) -> None:
    """Checks anchors, where the detector has any, and the overlaps from which they are objects."""
    if cfg.MODEL.META_ARCHITECTURE.removeprefix("Quant") not in ("RetinaNet", "GeneralizedRCNN"):
        return
    generator = cfg.MODEL.ANCHOR_GENERATOR
    for key in ("SIZES", "ASPECT_RATIOS"):
        levels = generator[key]
        if levels and not any(isinstance(level, list | tuple) for level in levels):
            levels = [levels]  # one list for all levels, as Detectron2 has it, too
        if (
            not levels
            or not all(isinstance(level, list | tuple) and level for level in levels)
            or not all(value > 0 for level in levels for value in level)
        ):
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.{key} must have a list of numbers above 0 for each level, or one for all, got "
                f"{list(levels)}"
            )
    for name in ("RETINANET", "RPN", "ROI_HEADS"):
        node = cfg.MODEL[name]
        thresholds, labels = list(node.IOU_THRESHOLDS), list(node.IOU_LABELS)
        if thresholds != sorted(thresholds) or len(labels) != len(thresholds) + 1:
            raise ValueError(
                f"MODEL.{name}.IOU_THRESHOLDS must rise, with one more IOU_LABELS, got {thresholds} and {labels}"
            )


def _check_group_norm(cfg: CfgNode, architecture: type) -> None:
    """Checks that group norms fit: to the pyramid's channels, or to their own channels in heads for regions."""
    nodes = {"FPN": "FPN.OUT_CHANNELS"}
    if issubclass(architecture, LowPrecisionDense):
        nodes |= {architecture.node: "FPN.OUT_CHANNELS", "AUX": "FPN.OUT_CHANNELS"}
    elif issubclass(architecture, QuantGeneralizedRCNN):
        nodes |= {"AUX": "FPN.OUT_CHANNELS"}
        if cfg.MODEL.ROI_BOX_HEAD.NUM_CONV:
            nodes["ROI_BOX_HEAD"] = "ROI_BOX_HEAD.CONV_DIM"
        if cfg.MODEL.MASK_ON:
            nodes["ROI_MASK_HEAD"] = "ROI_MASK_HEAD.CONV_DIM"
    for name, key in nodes.items():
        node, _, field = key.partition(".")
        if cfg.MODEL[name].NORM == "GN" and cfg.MODEL[node][field] % 32:
            raise ValueError(
                f"MODEL.{name}.NORM GN has 32 groups, which MODEL.{key} {cfg.MODEL[node][field]} is no "
                "multiple of: change one of them"
            )


def _check_input(cfg: CfgNode) -> None:
    for key, valid in (("FORMAT", ("BGR", "RGB")), ("RANDOM_FLIP", ("none", "horizontal", "vertical"))):
        if cfg.INPUT[key] not in valid:
            raise ValueError(f"INPUT.{key} must be {' or '.join(valid)}, got {cfg.INPUT[key]!r}")
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        values = cfg.MODEL[key]
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise ValueError(f"MODEL.{key} must have a number for each of 3 channels, got {list(values)}")
    if not all(value > 0 for value in cfg.MODEL.PIXEL_STD):
        raise ValueError(f"MODEL.PIXEL_STD must be above 0, got {list(cfg.MODEL.PIXEL_STD)}")


def _check_test(cfg: CfgNode) -> None:
    if cfg.TEST.DETECTIONS_PER_IMAGE < 1:
        raise ValueError(f"TEST.DETECTIONS_PER_IMAGE must be at least 1, got {cfg.TEST.DETECTIONS_PER_IMAGE}")
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED must be False: test-time augmentation is not done, and Detectron2's is for two-stage "
            "detectors in its own tools/train_net.py"
        )


def _check_numbers(cfg: CfgNode) -> None:
    if cfg.SOLVER.MAX_ITER < 0:
        raise ValueError(
            f"SOLVER.MAX_ITER must not be negative, got {cfg.SOLVER.MAX_ITER} (0 calibrates and evaluates)"
        )
    solver, sizes = cfg.SOLVER, cfg.INPUT
    for key, number, low in (
        ("SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH, 1),
        ("SOLVER.CHECKPOINT_PERIOD", solver.CHECKPOINT_PERIOD, 1),
        ("DATALOADER.NUM_WORKERS", cfg.DATALOADER.NUM_WORKERS, 0),
        ("MODEL.FPN.OUT_CHANNELS", cfg.MODEL.FPN.OUT_CHANNELS, 1),
        # A size of 0 leaves the image as it is.
        *(("INPUT.MIN_SIZE_TRAIN", size, 0) for size in sizes.MIN_SIZE_TRAIN),
        ("INPUT.MAX_SIZE_TRAIN", sizes.MAX_SIZE_TRAIN, 1),
        ("INPUT.MIN_SIZE_TEST", sizes.MIN_SIZE_TEST, 0),
        ("INPUT.MAX_SIZE_TEST", sizes.MAX_SIZE_TEST, 1),
    ):
        if number < low:
            raise ValueError(f"{key} must be at least {low}, got {number}")
    if not sizes.MIN_SIZE_TRAIN:
        raise ValueError("INPUT.MIN_SIZE_TRAIN must have a size, got ()")
    if not 0 <= solver.BASE_LR < math.inf:
        raise ValueError(f"SOLVER.BASE_LR must be a number of at least 0, got {solver.BASE_LR}")
    if cfg.SEED >= 2**32:
        raise ValueError(f"SEED must be below 2 ** 32, got {cfg.SEED}; a negative one draws another each time")
    model = cfg.MODEL
    if not 0 <= model.BACKBONE.FREEZE_AT <= 5:
        raise ValueError(
            "MODEL.BACKBONE.FREEZE_AT must be from 0, nothing, to 5, stem and all stages, got "
            f"{model.BACKBONE.FREEZE_AT}"
        )
    for key, value in (
        ("QUANT.SCALE_LR", model.QUANT.SCALE_LR),
        ("QUANT.INPUT.SCALE_LR_FACTOR", model.QUANT.INPUT.SCALE_LR_FACTOR),
        ("QUANT.PACT_ALPHA_DECAY", model.QUANT.PACT_ALPHA_DECAY),
        ("CLASSIFIER.NUM_CLASSES", model.CLASSIFIER.NUM_CLASSES),
        *((f"{node}.NUM_CLASSES", model[node].NUM_CLASSES) for node in (*DENSE, "ROI_HEADS")),
    ):
        if not value >= 0:
            raise ValueError(f"MODEL.{key} must not be negative, got {value}")
    if not model.FCOS.CENTER_SAMPLING_RADIUS > 0:
        raise ValueError(
            f"MODEL.FCOS.CENTER_SAMPLING_RADIUS must be above 0, got {model.FCOS.CENTER_SAMPLING_RADIUS}: no point "
            "would be positive; a large one takes every point inside a box"
        )
    for node in DENSE:
        if not 0 < model[node].PRIOR_PROB < 1:
            raise ValueError(f"MODEL.{node}.PRIOR_PROB must be between 0 and 1, got {model[node].PRIOR_PROB}")
        if model[node].NUM_CONVS < 1:
            raise ValueError(f"MODEL.{node}.NUM_CONVS must be at least 1, got {model[node].NUM_CONVS}")


def _check_features(cfg: CfgNode, architecture: type) -> None:
    """Checks that the pyramid reads features of the ResNet, and the head features of the pyramid."""
    name = cfg.MODEL.BACKBONE.NAME
    given = feature_names(cfg)
    if given is None:
        return
    nodes = [architecture.node] if issubclass(architecture, LowPrecisionDense) else []
    if issubclass(architecture, QuantGeneralizedRCNN):
        nodes = ["RPN", "ROI_HEADS"]
    for node in nodes:
        key, wanted = f"MODEL.{node}.IN_FEATURES", list(cfg.MODEL[node].IN_FEATURES)
        unknown = [feature for feature in wanted if feature not in given]
        if unknown or not wanted:
            raise ValueError(f"{key} must be of {', '.join(given)}, which {name} gives, got {wanted}")
    if issubclass(architecture, QuantClassifier) and FEATURE not in given:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {name} does not give {FEATURE!r}, which QuantClassifier reads: use "
            f"build_quant_classifier_backbone with {FEATURE!r} in MODEL.RESNETS.OUT_FEATURES"
        )


def _nodes_with_norm(cfg: CfgNode) -> Iterator[tuple[str, CfgNode]]:
    for name, node in cfg.MODEL.items():
        if isinstance(node, CfgNode) and isinstance(node.get("NORM"), str):
            yield name, node
