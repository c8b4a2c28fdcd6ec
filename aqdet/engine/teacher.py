"""The teacher of a distillation, from its checkpoint."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..checkpoint import AqdetCheckpointer
from ..config import detector_only
from ..modeling.scaffold.distillation import Distillation

_ROLE = "the checkpoint of this detector in full precision"


def build_distillation(cfg: CfgNode) -> Distillation:
    """The teacher by ``MODEL.DISTILL``: the config's detector with nothing quantized and nothing beside it.

    Raises:
        ValueError: in one line that names the key, if its checkpoint is missing, does not fit or lacks a part.
    """
    node = cfg.MODEL.DISTILL
    if not node.WEIGHTS:
        raise ValueError(f"MODEL.DISTILL.WEIGHTS is empty, and MODEL.DISTILL.ENABLED is True: name {_ROLE}")
    teacher_cfg = detector_only(cfg)
    teacher_cfg.MODEL.QUANT.ENABLED = False
    teacher = build_model(teacher_cfg)
    state = {key: value for key, value in teacher.state_dict().items() if value.is_floating_point()}
    for value in state.values():
        value.fill_(torch.nan)  # what the file lacks, as that of a backbone alone does, stays so
    try:
        AqdetCheckpointer(teacher, allow_pickle=cfg.CHECKPOINT.ALLOW_PICKLE).load(node.WEIGHTS)
    except FileNotFoundError as error:
        raise ValueError(f"MODEL.DISTILL.WEIGHTS must be {_ROLE}: {node.WEIGHTS!r} does not exist") from error
    except ValueError as error:
        raise ValueError(f"MODEL.DISTILL.WEIGHTS must be {_ROLE}: {error}") from error
    lacking = [key for key, value in state.items() if value.isnan().any()]
    if lacking:
        raise ValueError(
            f"MODEL.DISTILL.WEIGHTS must be {_ROLE}: {node.WEIGHTS!r} lacks {len(lacking)} of its keys, {lacking[0]} "
            "among them"
        )
    return Distillation(teacher, feature_weight=node.FEATURE_WEIGHT, logit_weight=node.LOGIT_WEIGHT)
