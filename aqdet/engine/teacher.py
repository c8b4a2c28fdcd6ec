"""The teacher of a distillation, from its checkpoint."""

from __future__ import annotations

from detectron2.config import CfgNode

from ..checkpoint import load_detector
from ..modeling.scaffold import Distillation
from .layout import laid_out

_ROLE = "the checkpoint of this detector in full precision"


def build_distillation(cfg: CfgNode) -> Distillation:
    """Builds the teacher of ``MODEL.DISTILL``: the config's detector without quantizers and auxiliary path.

    Raises:
        ValueError: In one line that names the key, if its checkpoint is missing, does not fit or lacks a part.
    """
    node = cfg.MODEL.DISTILL
    if not node.WEIGHTS:
        raise ValueError(f"MODEL.DISTILL.WEIGHTS is empty, and MODEL.DISTILL.ENABLED is True: name {_ROLE}")
    try:
        teacher = load_detector(cfg, node.WEIGHTS, quantized=False, whole=True, key="MODEL.DISTILL.WEIGHTS")
    except FileNotFoundError as error:
        raise ValueError(f"MODEL.DISTILL.WEIGHTS must be {_ROLE}: {node.WEIGHTS!r} does not exist") from error
    except ValueError as error:
        raise ValueError(f"MODEL.DISTILL.WEIGHTS must be {_ROLE}: {error}") from error
    return Distillation(
        laid_out(teacher, cfg),
        feature_weight=node.FEATURE_WEIGHT,
        logit_weight=node.LOGIT_WEIGHT,
        box_weight=node.BOX_WEIGHT,
    )
