"""The scaling of a config for COCO or ImageNet down to minutes on a processor, the same for all of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from detectron2.config import CfgNode

from aqdet.config import load_config

CLASSIFIER = "QuantClassifier"
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("ImageNet", "COCO-Detection", "COCO-InstanceSegmentation")
NUM_CLASSES = 6
MIN_WARMUP = 10
"""Iterations in which a learning rate rises, at least, or an eighth: a hundredth of a short run would be none."""
PYRAMID_CHANNELS, ANCHOR_FACTOR = 64, 0.5
"""Channels of a pyramid of 256, and the factor of anchors: drawn objects are 16 to 112 pixels large."""


@dataclasses.dataclass(frozen=True)
class Form:
    """The size that a stage of a recipe is scaled down to.

    Attributes:
        iterations: The length of the stage.
        images: The images of an iteration.
        side: The shorter side of the images in evaluation, or of a classifier's crop, in pixels.
        depth: The depth of the ResNet; 0 leaves it as it is.
    """

    iterations: int
    images: int
    side: int
    depth: int


@dataclasses.dataclass(frozen=True)
class Solver:
    """An optimizer with its settings, as they are in a rehearsal.

    Attributes:
        optimizer: ``SOLVER.OPTIMIZER``.
        rate: ``SOLVER.BASE_LR``.
        decay: ``SOLVER.WEIGHT_DECAY``.
    """

    optimizer: str
    rate: float
    decay: float

    def __str__(self) -> str:
        return f"{self.optimizer} {self.rate:.3g}"

    def overrides(self) -> list[str]:
        """Returns its ``KEY VALUE`` pairs."""
        keys = ("OPTIMIZER", "BASE_LR", "WEIGHT_DECAY")
        values = (self.optimizer, f"{self.rate:.6g}", f"{self.decay:g}")
        return [word for pair in zip(keys, values, strict=True) for word in (f"SOLVER.{pair[0]}", pair[1])]


@dataclasses.dataclass(frozen=True)
class Family:
    """A low-precision config and the full-precision one whose checkpoint it starts from.

    Attributes:
        full: The path of the full-precision config.
        low: The path of the low-precision config.
    """

    full: Path
    low: Path

    @property
    def name(self) -> str:
        """The low-precision config with its folder, as configs are named on a command line."""
        return f"{self.low.parent.name}/{self.low.stem}"


def families() -> list[Family]:
    """Returns the families of configs/COCO-* and configs/ImageNet; each detector's with the path comes first.

    Raises:
        ValueError: If a low-precision config starts from what no config of these folders leaves.
    """
    paths = [p for folder in FOLDERS for p in sorted((ROOT / "configs" / folder).glob("*.yaml"))]
    configs = {path: load_config(path) for path in paths if not path.name.startswith("Base")}
    by_output = {cfg.OUTPUT_DIR: path for path, cfg in configs.items()}
    found = []
    for path, cfg in configs.items():
        if cfg.MODEL.QUANT.ENABLED:
            source = by_output.get(cfg.MODEL.WEIGHTS.rpartition("/")[0])
            if source is None:
                raise ValueError(f"{path}: MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r} is left by no config of {FOLDERS}")
            found.append(Family(source, path))
    return sorted(
        found, key=lambda family: (FOLDERS.index(family.low.parent.name), not family.low.stem.endswith("_aux"))
    )


def own_solver(cfg: CfgNode, form: Form) -> Solver:
    """Returns a config's own solver at the batch of a rehearsal.

    SGD's learning rate is proportional to the batch (1706.02677), AdamW's to its square root (2205.10287).
    """
    solver = cfg.SOLVER
    share = form.images / solver.IMS_PER_BATCH
    factor = share if solver.OPTIMIZER == "SGD" else math.sqrt(share)
    return Solver(solver.OPTIMIZER, solver.BASE_LR * factor, solver.WEIGHT_DECAY)


def scaled(cfg: CfgNode, form: Form) -> list[str]:
    """Returns ``KEY VALUE ...`` that scale a config down to a form; data, weights and solver are apart.

    All numbers of iterations get one factor, all sizes of images another. Detectors get narrow heads, a classifier has
    nothing to narrow. Norms, augmentation, losses, quantizers, the auxiliary path and the shape of the schedule stay.
    """
    model, solver = cfg.MODEL, cfg.SOLVER
    length = form.iterations / solver.MAX_ITER
    found: dict[str, object] = {
        "MODEL.DEVICE": "cpu",
        "SOLVER.IMS_PER_BATCH": form.images,
        "SOLVER.MAX_ITER": form.iterations,
        "SOLVER.STEPS": tuple(round(step * length) for step in solver.STEPS if step < solver.MAX_ITER),
        "SOLVER.WARMUP_ITERS": max(round(solver.WARMUP_ITERS * length), min(MIN_WARMUP, form.iterations // 8)),
        "SOLVER.CHECKPOINT_PERIOD": max(form.iterations // 2, 1),
        "TEST.EVAL_PERIOD": 0,
        "DATALOADER.NUM_WORKERS": 0,
    }
    if form.depth:
        found |= {"MODEL.RESNETS.DEPTH": form.depth, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if form.depth < 50 else 256}
    if model.META_ARCHITECTURE == CLASSIFIER:
        size = form.side / cfg.INPUT.CLASSIFIER.CROP_SIZE
        found |= {"INPUT.CLASSIFIER.CROP_SIZE": form.side, "INPUT.MIN_SIZE_TEST": round(cfg.INPUT.MIN_SIZE_TEST * size)}
        found["MODEL.CLASSIFIER.NUM_CLASSES"] = NUM_CLASSES
    else:
        found |= _detector(cfg, form.side / cfg.INPUT.MIN_SIZE_TEST)
    return [str(word) for pair in found.items() for word in pair]


def _detector(cfg: CfgNode, size: float) -> dict[str, object]:
    model, inputs = cfg.MODEL, cfg.INPUT
    width = PYRAMID_CHANNELS / model.FPN.OUT_CHANNELS
    found: dict[str, object] = {
        "INPUT.MIN_SIZE_TRAIN": tuple(round(side * size) for side in inputs.MIN_SIZE_TRAIN),
        "INPUT.MIN_SIZE_TEST": round(inputs.MIN_SIZE_TEST * size),
        "INPUT.MAX_SIZE_TRAIN": round(inputs.MAX_SIZE_TRAIN * size),
        "INPUT.MAX_SIZE_TEST": round(inputs.MAX_SIZE_TEST * size),
        "MODEL.FPN.OUT_CHANNELS": PYRAMID_CHANNELS,
        "MODEL.ANCHOR_GENERATOR.SIZES": [
            [side * ANCHOR_FACTOR for side in level] for level in model.ANCHOR_GENERATOR.SIZES
        ],
        "MODEL.RETINANET.NUM_CLASSES": NUM_CLASSES,
        "MODEL.RETINANET.NUM_CONVS": model.RETINANET.NUM_CONVS // 2,
        "MODEL.FCOS.NUM_CLASSES": NUM_CLASSES,
        "MODEL.FCOS.NUM_CONVS": model.FCOS.NUM_CONVS // 2,
        # Short runs end with low scores, and a high threshold would cut the curve that AP is the area of.
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.05,
        "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": round(model.ROI_HEADS.BATCH_SIZE_PER_IMAGE * width / 2),
        "MODEL.ROI_BOX_HEAD.FC_DIM": round(model.ROI_BOX_HEAD.FC_DIM * width),
        "MODEL.ROI_MASK_HEAD.CONV_DIM": round(model.ROI_MASK_HEAD.CONV_DIM * width),
        "MODEL.ROI_MASK_HEAD.NUM_CONV": model.ROI_MASK_HEAD.NUM_CONV // 2,
    }
    for key in ("PRE_NMS_TOPK_TRAIN", "PRE_NMS_TOPK_TEST", "POST_NMS_TOPK_TRAIN", "POST_NMS_TOPK_TEST"):
        found[f"MODEL.RPN.{key}"] = model.RPN[key] // 5
    return found
