"""Preparation of a quantized training in a custom loop, or by another trainer."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PreciseBN
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ..checkpoint import AqdetCheckpointer, build_checkpointer, check_calibrated
from ..modeling.architecture import check_architecture
from ..modeling.config_requests import HOOK_KEYS, acknowledge
from ..modeling.exportable import export_obstacles
from ..modeling.scaffold import without_scaffold
from ..utils.distributed import unwrap
from ..utils.exact_products import exact_products
from .hooks.calibration import CalibrationHook
from .hooks.freeze_bn import FreezeBNHook
from .hooks.oscillation import build_oscillation_hook
from .hooks.precise_bn import PreciseBNHook
from .hooks.stripped_checkpoint import StrippedCheckpointHook
from .hooks.stripped_evaluation import StrippedEvalHook
from .hooks.weight_average import WeightAverageHook
from .solver import build_optimizer
from .teacher import build_distillation

logger = logging.getLogger(__name__)


class Preparation(TrainerBase):
    """A model that is ready for the first step of a custom loop, with its optimizer and checkpointer.

    Attributes:
        model: The prepared model, in training mode.
        optimizer: The optimizer, see :func:`aqdet.engine.build_optimizer`.
        checkpointer: Loads strictly and safely; saves the model, the optimizer and the hooks.
        start_iter: The iteration to begin with, above 0 after a resume.
        max_iter: ``SOLVER.MAX_ITER``.
    """

    def __init__(self, model: nn.Module, max_iter: int) -> None:
        super().__init__()
        self.model = model
        self.max_iter = max_iter
        self.optimizer: torch.optim.Optimizer
        self.checkpointer: AqdetCheckpointer
        self._average: WeightAverageHook | None = None

    @contextlib.contextmanager
    def step(self, iteration: int) -> Iterator[EventStorage]:
        """Encloses one iteration: forward, backward and the optimizer's step.

        Within the block, Detectron2's event storage is at the iteration. The hooks that the config asks for run before
        and after it: moving average, oscillation, frozen BN.
        """
        self.iter = self.storage.iter = iteration
        with self.storage:
            self.before_step()
            yield self.storage
            self.after_step()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Yields the detector alone, without its auxiliary path, in evaluation mode; restores the model afterwards.

        With ``SOLVER.EMA_DECAY`` the detector has the averaged weights. Float32 products are not in TF32.
        """
        was_training = self.model.training
        averaged = contextlib.nullcontext() if self._average is None else self._average.applied()
        with averaged, without_scaffold(self.model), exact_products():
            self.model.eval()
            try:
                yield self.model
            finally:
                self.model.train(was_training)

    def save(self, name: str) -> None:
        """Writes ``name.pth`` into ``OUTPUT_DIR``, from which ``prepare(..., resume=True)`` goes on."""
        self.checkpointer.save(name, iteration=self.iter)

    def save_stripped(self, name: str = "model_final_stripped") -> None:
        """Writes the detector alone as ``name.pth`` into ``OUTPUT_DIR``."""
        with contextlib.nullcontext() if self._average is None else self._average.applied():
            self.checkpointer.save_stripped(name)


def prepare(
    cfg: CfgNode,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weights: str | None = None,
    resume: bool = False,
) -> Preparation:
    """Prepares a model for a custom training loop.

    It loads the weights, starts the auxiliary path, attaches the teacher, calibrates the quantizers and builds the
    optimizer::

        prepared = aqdet.prepare(cfg, model, loader)
        for iteration, batch in zip(range(prepared.start_iter, prepared.max_iter), loader):
            with prepared.step(iteration):
                losses = sum(model(batch).values())
                prepared.optimizer.zero_grad()
                losses.backward()
                prepared.optimizer.step()
        with prepared.evaluating() as detector:
            inference_on_dataset(detector, test_loader, evaluator)
        prepared.save_stripped()

    The loop has to schedule the learning rate.

    Args:
        cfg: The config that the model was built from.
        model: The result of Detectron2's ``build_model``, on its device; it may be in a
            ``DistributedDataParallel`` or compiled by ``torch.compile``.
        batches: Training batches; calibration reads ``MODEL.QUANT.CALIBRATION.NUM_BATCHES`` of them from an iterator
            of its own.
        weights: The checkpoint to start from, ``""`` for the model as it is; by default ``MODEL.WEIGHTS``.
        resume: Whether to go on from the last checkpoint in ``OUTPUT_DIR``, if there is one.

    Raises:
        FileNotFoundError, ValueError: In one line, if the config or the checkpoint cannot be used.
    """
    _check(cfg)
    bare = unwrap(model)
    prepared = Preparation(model, cfg.SOLVER.MAX_ITER)
    prepared._average = _prepare_model(cfg, bare, prepared)
    prepared.optimizer = build_optimizer(cfg, bare)
    prepared.checkpointer = build_checkpointer(cfg, bare, optimizer=prepared.optimizer, loop=weakref.proxy(prepared))
    path = prepared.checkpointer.file_to_resume() if resume else ""
    if path:
        prepared.checkpointer.resume(path)
        prepared.start_iter = prepared.iter + 1
    else:
        weights = cfg.MODEL.WEIGHTS if weights is None else weights
        if weights:
            prepared.checkpointer.load(weights, checkpointables=[])
    model.train()
    prepared.iter = prepared.start_iter
    prepared.storage = EventStorage(prepared.start_iter)
    calibration = cfg.MODEL.QUANT.CALIBRATION
    first = CalibrationHook(lambda: _read_apart(batches), calibration.NUM_BATCHES, calibration.METHOD)
    first.trainer = weakref.proxy(prepared)
    first.before_train()
    check_calibrated(bare, "prepare")
    with prepared.storage:
        prepared.before_train()
    return prepared


def _read_apart(batches: Any) -> Iterable[Any]:
    """Returns batches that can be left half-read without a trace in the loop's own.

    Detectron2's loader keeps the images of the batch that it last gave until the next one is asked for. In 0.6, a loop
    that begins after another iterator was left finds a bucket that is fuller than a batch, and never gets one.
    """
    if type(batches) is AspectRatioGroupedDataset:
        return AspectRatioGroupedDataset(batches.dataset, batches.batch_size)
    return batches


def prepare_trainer(trainer: DefaultTrainer) -> None:
    """Makes a built ``DefaultTrainer``, or a subclass of it, train as :class:`aqdet.engine.Trainer` does.

    Call it between the constructor and ``resume_or_load``. It replaces optimizer, schedule and checkpointer; if the
    trainer's class overrides how the first two are built, its own are built again. Quantizers are calibrated before
    training, and the detector is evaluated alone. Random numbers and the order of images stay Detectron2's, so that a
    resumed training does not repeat the same numbers.

    Raises:
        ValueError: In one line, if the config cannot be used.
    """
    cfg = trainer.cfg
    _check(cfg)
    model = unwrap(trainer.model)
    average = _prepare_model(cfg, model, None)
    ours = _hooks(cfg, model, average)
    inner = trainer._trainer
    if type(trainer).build_optimizer.__func__ is DefaultTrainer.build_optimizer.__func__:  # type: ignore[attr-defined]
        inner.optimizer = build_optimizer(cfg, model)
        trainer.scheduler = trainer.build_lr_scheduler(cfg, inner.optimizer)
    trainer.checkpointer = build_checkpointer(cfg, model, trainer=weakref.proxy(trainer))
    calibration = cfg.MODEL.QUANT.CALIBRATION
    first = CalibrationHook(lambda: trainer.build_train_loader(cfg), calibration.NUM_BATCHES, calibration.METHOD)
    theirs: list[HookBase] = []

    def evaluate() -> dict[str, Any]:
        with contextlib.nullcontext() if average is None else average.applied():
            trainer._last_eval_results = trainer.test(cfg, trainer.model)
        return trainer._last_eval_results

    for hook in trainer._hooks:
        if type(hook) is EvalHook:
            if comm.is_main_process():
                theirs.append(StrippedCheckpointHook(trainer.checkpointer))
            theirs.append(StrippedEvalHook(cfg.TEST.EVAL_PERIOD, evaluate, trainer.checkpointer))
        elif type(hook) is PreciseBN:
            build_loader = functools.partial(trainer.build_train_loader, cfg)
            theirs.append(PreciseBNHook(cfg.TEST.EVAL_PERIOD, build_loader, cfg.TEST.PRECISE_BN.NUM_ITER, average))
        else:
            if isinstance(hook, PeriodicCheckpointer):
                hook.checkpointer = trainer.checkpointer
            theirs.append(hook)
    trainer._hooks = []
    trainer.register_hooks([first, *ours, *theirs])


def _check(cfg: CfgNode) -> None:
    check_architecture(cfg)
    if cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY:
        for obstacle in export_obstacles(cfg):
            logger.warning("What is trained here cannot be exported: %s", obstacle)


def _prepare_model(cfg: CfgNode, model: nn.Module, host: TrainerBase | None) -> WeightAverageHook | None:
    """Attaches the teacher, registers hooks with ``host`` if there is one, and returns the moving average's hook."""
    if cfg.MODEL.DISTILL.ENABLED:
        model.distillation = build_distillation(cfg)  # type: ignore[assignment]
    acknowledge(model, *HOOK_KEYS)
    average = WeightAverageHook(cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
    if host is not None:
        host.register_hooks(_hooks(cfg, model, average))
    return average


def _hooks(cfg: CfgNode, model: nn.Module, average: WeightAverageHook | None) -> list[HookBase]:
    """Returns the hooks of a config in the order of :class:`aqdet.engine.Trainer`."""
    frozen = FreezeBNHook(cfg.SOLVER.FREEZE_BN_ITER) if cfg.SOLVER.FREEZE_BN_ITER != -1 else None
    hooks = [frozen, build_oscillation_hook(cfg, model), average]
    return [hook for hook in hooks if hook is not None]
