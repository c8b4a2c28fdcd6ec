"""The trainer."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import weakref
from collections.abc import Iterator
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


def build_checkpointer(cfg: CfgNode, model: nn.Module, **checkpointables: Any) -> AqdetCheckpointer:
    """The checkpointer of a config."""
    return AqdetCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        allow_keys=cfg.CHECKPOINT.ALLOW_KEYS,
        aux_init=cfg.MODEL.AUX.INIT,
        **checkpointables,
    )


@contextlib.contextmanager
def _usable(key: str, names: Any) -> Iterator[None]:
    """Detectron2 asserts that data is usable: a user error that lacks the config key."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(f"{key} {tuple(names)}: {error or 'no data'}") from error


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
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Detectron2's.

        Raises:
            ValueError: naming ``DATASETS.TRAIN``, if it is empty, has no boxes, or does not suit the batch size.
        """
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty: name a dataset to train on")
        with _usable("DATASETS.TRAIN", cfg.DATASETS.TRAIN):
            return super().build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's.

        Raises:
            ValueError: naming ``DATASETS.TEST``, if the dataset has no images.
        """
        with _usable("DATASETS.TEST", (dataset_name,)):
            return super().build_test_loader(cfg, dataset_name)

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
