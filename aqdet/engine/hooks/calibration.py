"""Training hooks."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.layers import CycleBatchNormList
from detectron2.utils.events import EventStorage
from torch import nn

from ...checkpoint import AqdetCheckpointer
from ...modeling.scaffold import aligning, waiting_adaptors, without_scaffold
from ...quantization import calibrate, quantizers
from ...quantization.calibration import run_on_all_ranks
from ...quantization.observer import check_method
from ..forward_state import average_over_processes, broadcast_from_main

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Restores buffers (BN statistics), loss normalizers, BN list positions and random states afterwards.

    Quantizers are left alone.
    """
    owned = {id(buffer) for _, quantizer in quantizers(model) for buffer in quantizer.buffers()}
    buffers = [(b, b.clone()) for b in model.buffers() if id(b) not in owned]
    attributes = []
    for module in model.modules():
        if isinstance(module, CycleBatchNormList):
            attributes.append((module, "_pos", module._pos))
        attributes.append((module, "loss_normalizer", vars(module).get("loss_normalizer")))
    random_states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        for module, name, value in attributes:
            if value is not None:
                setattr(module, name, value)
            else:
                vars(module).pop(name, None)


class CalibrationHook(HookBase):
    """Before training: gives uncalibrated quantizers their first ranges, from training batches.

    The model runs in training mode, so that the ranges are those of the batch statistics that training sees,
    and everything but the quantizers is restored afterwards. Adaptors of an auxiliary path whose head is a
    copy of the detector's are aligned by the same batches, and averaged over processes. Where nothing is pending,
    as after a resume, nothing happens.

    Args:
        build_loader: makes a data loader of its own, so that training sees the data it would have seen.
        num_batches, method: ``MODEL.QUANT.CALIBRATION``.

    Raises:
        ValueError: if one of them is not valid, before training rather than in it.
    """

    def __init__(self, build_loader: Callable[[], Iterable[Any]], num_batches: int, method: str) -> None:
        check_method(method)
        if num_batches < 1:
            raise ValueError(f"MODEL.QUANT.CALIBRATION.NUM_BATCHES must be at least 1, got {num_batches}")
        self._build_loader = build_loader
        self._num_batches = num_batches
        self._method = method

    def before_train(self) -> None:
        """Runs once."""
        model = self.trainer.model
        states = [q.is_calibrated or not q.enabled for _, q in quantizers(model)]
        adaptors = waiting_adaptors(model)
        if all(states) and not adaptors:
            if states:
                logger.info("All %d quantizers are calibrated already", len(states))
            return

        def run() -> None:
            with aligning(model):
                for batch in itertools.islice(self._build_loader(), self._num_batches):
                    model(batch)

        with torch.no_grad(), EventStorage(0), leaving_no_trace(model):
            if all(states):
                run_on_all_ranks(run)
            else:
                calibrate(model, run, method=self._method)
            average_over_processes(parameter for adaptor in adaptors for parameter in adaptor.parameters())


class StrippedEvalHook(EvalHook):
    """Evaluation of the detector alone: every ``eval_period`` iterations and after the last one.

    The auxiliary path is taken out of the model during evaluation and put back after. All processes evaluate
    the main process's BN statistics, which are those in the checkpoint. If evaluation fails, what was trained
    is saved first.

    Args:
        eval_period, eval_function: see Detectron2's.
        checkpointer: saves ``model_<iteration>.pth``.
    """

    def __init__(
        self, eval_period: int, eval_function: Callable[[], dict[str, Any]], checkpointer: AqdetCheckpointer
    ) -> None:
        super().__init__(eval_period, eval_function)
        self._checkpointer = checkpointer

    def _do_eval(self) -> None:
        trainer = self.trainer
        broadcast_from_main(trainer.model.buffers())
        try:
            with without_scaffold(trainer.model):
                super()._do_eval()
        except Exception:
            if trainer.iter < trainer.max_iter:  # else model_final.pth exists
                self._checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
            raise

    def after_train(self) -> None:
        """Evaluates if training came to its end."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class StrippedCheckpointHook(HookBase):
    """Once, after the last iteration: writes ``model_final_stripped.pth`` beside ``model_final.pth``."""

    def __init__(self, checkpointer: AqdetCheckpointer) -> None:
        self._checkpointer = checkpointer

    def after_train(self) -> None:
        """Writes the file if training came to its end."""
        if self.trainer.iter >= self.trainer.max_iter:
            if self.trainer.max_iter == 0:
                self._save_without_a_step()
            self._checkpointer.save_stripped("model_final_stripped")

    def _save_without_a_step(self) -> None:
        """Writes ``model_final.pth``, which else follows the last step; a resume begins with iteration 0."""
        self.trainer.iter = -1
        try:
            self._checkpointer.save("model_final", iteration=-1)
        finally:
            self.trainer.iter = 0
