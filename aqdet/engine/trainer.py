"""The trainer."""

from __future__ import annotations

import functools
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
from ..quantization import quantizers
from .hooks import CalibrationHook, StrippedCheckpointHook, StrippedEvalHook
from .solver import build_optimizer

logger = logging.getLogger(__name__)


def fit_to_machine(cfg: CfgNode) -> None:
    """Changes what this machine cannot do, each change logged: device, and SyncBN on a CPU."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is %s but there is no CUDA device: using cpu", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        for name, node in cfg.MODEL.items():
            if isinstance(node, CfgNode) and node.get("NORM") == "SyncBN":
                logger.warning("MODEL.%s.NORM: SyncBN does not run on a CPU: using BN", name)
                node.NORM = "BN"


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

    model: nn.Module

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, with ours in these places; the last thing that its constructor calls.

        Our checkpointer takes the place of Detectron2's first, because the hooks are built around it.
        Calibration comes first, before anything reads the model. Our evaluation takes the place of
        Detectron2's, which is after the checkpoint, so that a failing evaluation loses nothing. The stripped
        file is written last of the checkpoints, when the whole one exists.
        """
        self.checkpointer = build_checkpointer(self.cfg, self.model, trainer=weakref.proxy(self))
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        calibration = cfg.MODEL.QUANT.CALIBRATION
        build_loader = functools.partial(self.build_train_loader, cfg)
        hooks: list[HookBase] = [CalibrationHook(build_loader, calibration.NUM_BATCHES, calibration.METHOD)]
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
        """COCO AP by pycocotools, into ``OUTPUT_DIR/inference``, each of several sets into a folder there."""
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            output_dir = os.path.join(output_dir, dataset_name)
        return COCOEvaluator(dataset_name, output_dir=output_dir)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluates the detector alone, without its auxiliary path.

        Raises:
            ValueError: if quantizers were never calibrated, as after loading a float checkpoint.
        """
        pending = [name for name, q in quantizers(model) if q.enabled and not q.is_calibrated]
        if pending:
            raise ValueError(
                f"{len(pending)} quantizers are not calibrated, {pending[0]} among them: MODEL.WEIGHTS must "
                "be a checkpoint of quantized training, or MODEL.QUANT.ENABLED False"
            )
        with detached_auxiliary(model):
            return super().test(cfg, model, evaluators)
