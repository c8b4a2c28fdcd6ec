"""The trainer."""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from torch import nn

from ..checkpoint import AqdetCheckpointer
from ..evaluation import COCOEvaluator
from ..modeling.auxiliary import detached_auxiliary
from .hooks import CalibrationHook, StrippedCheckpointHook, StrippedEvalHook
from .solver import build_optimizer

logger = logging.getLogger(__name__)


def fit_to_machine(cfg: CfgNode) -> None:
    """Changes what this machine cannot do, each change logged: device, and SyncBN on a CPU."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is %s but there is no CUDA device: using cpu", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        for name in ("RESNETS", "FPN", "RETINANET", "AUX"):
            if cfg.MODEL[name].NORM == "SyncBN":
                logger.warning("MODEL.%s.NORM: SyncBN does not run on a CPU: using BN", name)
                cfg.MODEL[name].NORM = "BN"


def build_checkpointer(cfg: CfgNode, model: nn.Module, **checkpointables: Any) -> AqdetCheckpointer:
    """The checkpointer of a config."""
    return AqdetCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        allow_keys=cfg.CHECKPOINT.ALLOW_KEYS,
        aux_init=cfg.MODEL.AUX.INIT,
        **checkpointables,
    )


class Trainer(DefaultTrainer):
    """Detectron2's default trainer with calibration, stripped evaluation and safe checkpoints."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.checkpointer = build_checkpointer(cfg, self.model, trainer=weakref.proxy(self))
        # The base class has built its hooks around its own checkpointer by now.
        self._hooks.clear()
        self.register_hooks(self.build_hooks())

    @property
    def model(self) -> nn.Module:
        """The model being trained, in its DDP wrapper where there is one."""
        return self._trainer.model

    @model.setter
    def model(self, value: nn.Module) -> None:
        """Detectron2 0.6 copies the inner trainer's attributes; the model stays there."""

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, with ours in these places.

        Calibration comes first, before anything reads the model. Our evaluation takes the place of
        Detectron2's, which is after the checkpoint, so that a failing evaluation loses nothing. The stripped
        file is written last of the checkpoints, when the whole one exists.
        """
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        calibration = cfg.MODEL.QUANT.CALIBRATION
        hooks: list[HookBase] = [
            CalibrationHook(lambda: self.build_train_loader(cfg), calibration.NUM_BATCHES, calibration.METHOD)
        ]
        for hook in super().build_hooks():
            if isinstance(hook, EvalHook):
                if comm.is_main_process():
                    hooks.append(StrippedCheckpointHook(self.checkpointer))
                hook = StrippedEvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate)
            if hook is not None:
                hooks.append(hook)
        return hooks

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def resume_or_load(self, resume: bool = True) -> None:
        """See Detectron2's; warns if quantized training is about to start from random weights."""
        super().resume_or_load(resume)
        resumed = resume and self.checkpointer.has_checkpoint()
        if self.cfg.MODEL.QUANT.ENABLED and not self.cfg.MODEL.WEIGHTS and not resumed:
            logger.warning(
                "QUANTIZED TRAINING STARTS FROM RANDOM WEIGHTS: MODEL.WEIGHTS is empty. Train the full-"
                "precision detector first and start from its model_final.pth"
            )

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks and optimizer; the last is left out by Detectron2 0.6."""
        state = super().state_dict()
        state.setdefault("_trainer", self._trainer.state_dict())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`aqdet.engine.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO AP by pycocotools."""
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluates the detector alone, without its auxiliary path."""
        with detached_auxiliary(model):
            return super().test(cfg, model, evaluators)
