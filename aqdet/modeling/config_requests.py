"""Config keys that the training around a model has to act on, and a warning if it does not.

A training script that is not aqdet's, such as Detectron2's own, does not know of these keys.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch
from detectron2.config import CfgNode
from torch import nn

from ..utils.distributed import unwrap

logger = logging.getLogger(__name__)

OPTIMIZER_KEYS = ("MODEL.QUANT.SCALE_LR", "SOLVER.OPTIMIZER")
CHECKPOINTER_KEYS = ("MODEL.AUX.INIT", "CHECKPOINT.ALLOW_KEYS")
HOOK_KEYS = ("SOLVER.EMA_DECAY", "SOLVER.FREEZE_BN_ITER", "MODEL.QUANT.OSCILLATION", "MODEL.DISTILL")


class Requests:
    """The keys of a config that the training has to act on, until something does.

    Whatever acts on a key acknowledges it. The model calls :meth:`remind` at its first training step, which warns of
    the others once.

    Args:
        wanted: key -> phrase that says what acts on it.
    """

    def __init__(self, wanted: Mapping[str, str]) -> None:
        self._open = dict(wanted)
        self._reminded = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Requests:
        """Collects the keys of a config that differ from what Detectron2's training does by itself."""
        model, solver = cfg.MODEL, cfg.SOLVER
        oscillation = model.QUANT.OSCILLATION
        optimizer = "aqdet.engine.build_optimizer"
        wanted = {
            "MODEL.QUANT.SCALE_LR": (
                model.QUANT.ENABLED,
                f"scales step by a share of their size, without weight decay: {optimizer}",
            ),
            "SOLVER.OPTIMIZER": (solver.OPTIMIZER != "SGD", f"{solver.OPTIMIZER}: {optimizer}"),
            "SOLVER.EMA_DECAY": (solver.EMA_DECAY, "a moving average of the weights is evaluated and saved"),
            "SOLVER.FREEZE_BN_ITER": (solver.FREEZE_BN_ITER != -1, "BN statistics are frozen"),
            "SOLVER.DETERMINISTIC": (solver.DETERMINISTIC, "aqdet.engine.launch.make_deterministic"),
            "MODEL.QUANT.OSCILLATION": (
                model.QUANT.ENABLED and (oscillation.TRACK or oscillation.DAMPENING or oscillation.FREEZE_THRESHOLD),
                "oscillating weights are tracked, dampened or frozen",
            ),
            "MODEL.DISTILL": (model.DISTILL.ENABLED, "the teacher is loaded"),
            "MODEL.AUX.INIT": (
                model.AUX.ENABLED and model.AUX.INIT == "head",
                "the auxiliary path starts from the detector's head: aqdet.engine.build_checkpointer",
            ),
            "CHECKPOINT.ALLOW_KEYS": (cfg.CHECKPOINT.ALLOW_KEYS, "aqdet.engine.build_checkpointer"),
            "TEST.COCO_EVAL": (cfg.TEST.COCO_EVAL != "pycocotools", "aqdet.evaluation.COCOEvaluator"),
        }
        return cls({key: words for key, (is_wanted, words) in wanted.items() if is_wanted})

    @property
    def open(self) -> Collection[str]:
        """The keys that nothing has acknowledged."""
        return self._open.keys()

    def acknowledge(self, *keys: str) -> None:
        """Notes that something acts on these keys."""
        for key in keys:
            self._open.pop(key, None)

    def remind(self) -> None:
        """Warns once of the keys that nothing acts on."""
        if self._reminded:
            return
        self._reminded = True
        if torch.are_deterministic_algorithms_enabled():
            self.acknowledge("SOLVER.DETERMINISTIC")
        if self._open:
            logger.warning(
                "This training does not do what its config asks for: %s. aqdet.prepare(cfg, model, batches) does it "
                "for a loop of your own, aqdet.prepare_trainer(trainer) for a DefaultTrainer, and "
                "aqdet.engine.Trainer has it all",
                "; ".join(f"{key} ({words})" for key, words in self._open.items()),
            )


def acknowledge(model: nn.Module, *keys: str) -> None:
    """Notes on a model, wrapped or not, that something acts on these keys of its config."""
    requests = getattr(unwrap(model), "requests", None)
    if isinstance(requests, Requests):
        requests.acknowledge(*keys)
