"""The trainer."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import IterationTimer, LRScheduler, PeriodicCheckpointer, PeriodicWriter
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..checkpoint import AqdetCheckpointer, build_checkpointer, check_calibrated
from ..data import build_mapper
from ..data.loader import OtherLoader, TrainLoader, as_train_loader, build_train_loader, seed_generators, start_worker
from ..evaluation import build_evaluator, check_evaluator
from ..modeling.config_requests import HOOK_KEYS, acknowledge
from ..modeling.exportable import export_obstacles
from ..modeling.scaffold import without_scaffold
from ..utils.console import signal_of
from ..utils.distributed import distribute, unwrap
from ..utils.exact_products import exact_products
from .checked_trainer import CheckedAMPTrainer, CheckedTrainer, NonFiniteLoss
from .diagnosis import describe_single_value, explain_non_finite
from .forward_state import ForwardState, loss_normalizers, set_loss_normalizers
from .hooks.calibration import CalibrationHook
from .hooks.freeze_bn import FreezeBNHook
from .hooks.interrupt import Interrupted, InterruptHook
from .hooks.metrics import MetricsHook
from .hooks.oscillation import build_oscillation_hook
from .hooks.precise_bn import PreciseBNHook
from .hooks.quantizer_watch import QuantizerWatchHook
from .hooks.stripped_checkpoint import StrippedCheckpointHook
from .hooks.stripped_evaluation import StrippedEvalHook
from .hooks.weight_average import WeightAverageHook
from .layout import laid_out
from .no_detections import describe_nothing_found
from .output_folder import evaluation_noted, holding, write_config
from .run_log import errors_in_one_line
from .solver import build_optimizer
from .teacher import build_distillation
from .writers import MetricsWriter, TensorboardWriter

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _usable(key: str, names: Any, hint: str = "") -> Iterator[None]:
    """Turns Detectron2's assertion that data can be used into an error that names the config key."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(f"{key} {tuple(names)}: {error or 'no data'}{hint}") from error


class Trainer(DefaultTrainer):
    """Detectron2's default trainer with calibration, stripped evaluation and exact resume.

    Every iteration depends on the model's and the optimizer's state, the seed and the iteration's number alone:
    :class:`~aqdet.data.loader.TrainLoader` chooses its images so, and the generators of all other random numbers are
    seeded so. A run that was killed and resumed therefore ends like one that was not; on a CPU, to the bit.
    """

    iter: int
    model: nn.Module
    data_loader: TrainLoader | OtherLoader
    checkpointer: AqdetCheckpointer

    def __init__(self, cfg: CfgNode) -> None:
        # Not DefaultTrainer's, which builds its own checkpointer and, in 0.6, cannot distribute on CPUs.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        for name in cfg.DATASETS.TEST:
            check_evaluator(cfg, name)
        for obstacle in export_obstacles(cfg):
            logger.warning("What is trained here cannot be exported: %s", obstacle)
        model = self.build_model(cfg)
        acknowledge(model, *HOOK_KEYS, "TEST.COCO_EVAL")
        if cfg.MODEL.DISTILL.ENABLED:
            model.distillation = build_distillation(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = as_train_loader(self.build_train_loader(cfg), cfg)
        trainer_class = CheckedAMPTrainer if cfg.SOLVER.AMP.ENABLED else CheckedTrainer
        self._trainer = trainer_class(distribute(laid_out(model, cfg)), data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = build_checkpointer(cfg, model, trainer=weakref.proxy(self))
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._resumed_from: str | None = None  # the checkpoint that last_checkpoint named when a run was resumed
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Builds the list of hooks in the order in which they run; the constructor calls it last.

        Calibration comes first, before anything reads the model. The oscillation hook, which may set weights,
        comes before the one that averages them, and both come before BN statistics are estimated. Evaluation and the
        writers come before the checkpoint, which then holds the state after the whole iteration: a run that is
        killed anywhere repeats the iterations after the checkpoint, and nothing else. The stripped file is
        written after ``model_final.pth`` and before the last evaluation, which might fail. Signals are answered last.
        """
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0

        def build_loader() -> TrainLoader | OtherLoader:
            loader = as_train_loader(self.build_train_loader(cfg), cfg)
            loader.seed = self.data_loader.seed  # the resumed run's seed, if the config has none
            return loader

        is_main = comm.is_main_process()
        period, calibration = cfg.TEST.EVAL_PERIOD, cfg.MODEL.QUANT.CALIBRATION
        precise = cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model)
        self._average = WeightAverageHook(cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
        self._metrics = MetricsWriter(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")) if is_main else None
        hooks = [
            CalibrationHook(build_loader, calibration.NUM_BATCHES, calibration.METHOD),
            FreezeBNHook(cfg.SOLVER.FREEZE_BN_ITER, self.max_iter) if cfg.SOLVER.FREEZE_BN_ITER != -1 else None,
            build_oscillation_hook(cfg, self.model),
            self._average,
            IterationTimer(),
            LRScheduler(),
            PreciseBNHook(period, build_loader, cfg.TEST.PRECISE_BN.NUM_ITER, self._average) if precise else None,
            StrippedCheckpointHook(self.checkpointer) if is_main else None,
            StrippedEvalHook(period, self._evaluate, self.checkpointer),
            PeriodicWriter(self.build_writers()) if is_main else None,
            QuantizerWatchHook() if is_main else None,
            MetricsHook(self._metrics),
            PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD) if is_main else None,
            InterruptHook(self.checkpointer),
        ]
        return [hook for hook in hooks if hook is not None]

    def build_writers(self) -> list[EventWriter]:
        """Builds Detectron2's writers; a resumed run goes on with its ``metrics.json``."""
        assert self._metrics is not None
        return [CommonMetricPrinter(self.max_iter), self._metrics, TensorboardWriter(self.cfg.OUTPUT_DIR)]

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Reserves ``OUTPUT_DIR`` for this training within a block: locks it, writes the config, renames old notes.

        :meth:`train` does this by itself. A caller that has more to write when the training starts calls :meth:`train`
        within such a block. Nothing is written before, so that a command that is refused leaves nothing behind.

        Raises:
            ValueError: In one line, if another training runs there, or has gone on since this one was resumed.
        """
        with holding(self.cfg.OUTPUT_DIR) as is_outermost:
            if is_outermost:
                self._take_over()
            yield

    def _take_over(self) -> None:
        changed = False
        if comm.is_main_process():
            if self._resumed_from is None:
                self.checkpointer.forget_last_checkpoint()
            else:
                changed = self._resumed_from != self.checkpointer.get_checkpoint_file()
            if not changed:
                write_config(self.cfg)
        if any(comm.all_gather(changed)):
            raise ValueError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR!r}: another training has gone on from {self._resumed_from} since it "
                "was loaded: start with --resume again"
            )

    def train(self) -> Any:
        """Trains from :attr:`start_iter` to ``SOLVER.MAX_ITER``, as Detectron2's trainer does, and evaluates.

        With ``SOLVER.MAX_ITER 0`` it calibrates the quantizers, evaluates the detector and saves it, which is
        post-training quantization.

        Raises:
            Interrupted: If Ctrl-C stops it outside of an iteration that could be saved.
            OSError: In one line that names the file, if it cannot be written; a resume continues from the last
                checkpoint.
            ValueError: Naming the layer, if a batch norm gets one value a channel; see also :meth:`started`.
        """
        self.data_loader.start = self.start_iter
        model = unwrap(self.model)
        self._forward_state = ForwardState(model)
        self._outer_error = sys.exception()
        if self.max_iter == 0:
            logger.info(
                "SOLVER.MAX_ITER is 0: no step is trained. %s, and the detector is evaluated and saved",
                "Quantizers are calibrated (post-training quantization)"
                if self.cfg.MODEL.QUANT.ENABLED
                else "Nothing is quantized",
            )
        with self.started(), errors_in_one_line(OSError, NonFiniteLoss):
            try:
                return super().train()
            except KeyboardInterrupt as interrupt:
                is_done = self.iter >= self.max_iter
                can_resume = self.checkpointer.has_checkpoint()
                signum = signal_of(interrupt)
                raise Interrupted(signum, self.iter - 1, saved=is_done, can_resume=can_resume) from None
            except ValueError as error:
                if single := describe_single_value(model, error):
                    raise ValueError(single) from error
                raise

    def run_step(self) -> None:
        """Runs one iteration, with random numbers of its own.

        TorchScript optimizes Detectron2's scripted losses after their first call in a process, and then computes
        gradients in another order. That is turned off where a resume is to be exact; on CPUs it costs nothing.

        Raises:
            NonFiniteLoss: In one line that names the origin, after the state from before the iteration was saved.
        """
        seed_generators(self.data_loader.seed, self.iter, comm.get_rank())
        exact = self.cfg.SOLVER.DETERMINISTIC or self.cfg.MODEL.DEVICE == "cpu"
        before = self._forward_state.get()
        try:
            with torch.jit.optimized_execution(not exact):
                super().run_step()
        except FloatingPointError as error:
            if not isinstance(error, NonFiniteLoss) and comm.get_world_size() > 1:
                # Detectron2's RPN raises its own, in one process: the others are not here to look for the origin.
                raise NonFiniteLoss(f"not finite in iteration {self.iter}: {error}") from None
            self._forward_state.set(before)
            saved = self._save_from_before(unwrap(self.model))
            raise NonFiniteLoss(explain_non_finite(self, str(error)) + saved) from None

    def _save_from_before(self, model: nn.Module) -> str:
        if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
            return "; the weights were not finite before it either: continue from an earlier checkpoint"
        if self.iter == 0:
            return "; it is the first iteration, nothing from before is saved"
        self.iter -= 1
        try:
            self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
        finally:
            self.iter += 1
        return f"; the state from before is in {self.checkpointer.get_checkpoint_file()}"

    def after_train(self) -> None:
        """Calls the hooks' ``after_train``; their errors do not hide the one that ends the training.

        The hooks see the number of finished iterations, also if the run was resumed after its last one or has failed.
        """
        self.iter = min(self.iter, self.max_iter)
        if sys.exception() is self._outer_error:
            super().after_train()
            return
        self.iter = self.storage.iter = min(self.iter, self.max_iter - 1)
        for hook in self._hooks:
            try:
                hook.after_train()
            except Exception as error:
                logger.warning("%s, after the training has failed: %s", type(hook).__name__, error)

    def _evaluate(self) -> dict[str, Any]:
        is_last = self.iter >= self.max_iter
        facts = {"training": self.cfg.OUTPUT_DIR, "iterations": self.iter if is_last else self.iter + 1}
        weights = os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth") if is_last else None
        averaged = contextlib.nullcontext() if self._average is None else self._average.applied()
        with evaluation_noted(self.cfg, weights=weights, **facts), averaged:
            self._last_eval_results = self.test(self.cfg, self.model)
        if is_last and comm.is_main_process():
            found = describe_nothing_found(self.cfg, self._last_eval_results)
            if found:
                logger.warning("%s", found)
        return self._last_eval_results

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads as Detectron2's trainer does, and warns if quantized training would start from random weights.

        Either all processes continue from the main one's checkpoint, or none does. Nothing is written yet; a run that
        starts anew renames an earlier run's note of its last checkpoint when it starts.

        Raises:
            FileNotFoundError, ValueError: In one line, if the checkpoint is missing, damaged or of another config.
        """
        path = self.checkpointer.file_to_resume() if resume else ""
        self._resumed_from = self.checkpointer.get_checkpoint_file() if path else None
        if path:
            self.checkpointer.resume(path)
            self.start_iter = self.iter + 1  # the checkpoint has the last finished iteration
            return
        self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
        if self.cfg.MODEL.QUANT.ENABLED and not self.cfg.MODEL.WEIGHTS:
            logger.warning(
                "QUANTIZED TRAINING STARTS FROM RANDOM WEIGHTS: MODEL.WEIGHTS is empty. Train the full-"
                "precision detector first and start from its model_final.pth"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns iteration, hooks, optimizer, seed, and loss normalizers, which are plain attributes of the model."""
        state = super().state_dict()
        state.setdefault("_trainer", self._trainer.state_dict())  # Detectron2 0.6 leaves it out
        state["seed"] = self.data_loader.seed
        state["loss_normalizers"] = loss_normalizers(unwrap(self.model).named_modules())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            ValueError: If the optimizer's state is of other parameters or of another optimizer.
        """
        super().load_state_dict(state_dict)
        try:
            self._trainer.load_state_dict(state_dict["_trainer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"--resume: the optimizer's state in {self.cfg.OUTPUT_DIR!r} is of another config "
                f"({' '.join(str(error).split())}); without --resume a training starts from MODEL.WEIGHTS"
            ) from error
        if "seed" not in state_dict:
            logger.warning("The checkpoint is of an older version: the order of images and loss normalizers start anew")
            return
        if self.cfg.SEED not in (-1, state_dict["seed"]):
            logger.warning("SEED %d is not used: the run goes on with %d", self.cfg.SEED, state_dict["seed"])
        self.data_loader.seed = state_dict["seed"]
        set_loss_normalizers(unwrap(self.model).named_modules(), state_dict["loss_normalizers"])

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`aqdet.engine.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """Builds Detectron2's schedule, for at least one iteration, since it divides by their number."""
        if cfg.SOLVER.MAX_ITER == 0:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.MAX_ITER = 1
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """See :func:`aqdet.data.loader.build_train_loader`.

        Raises:
            ValueError: If ``DATASETS.TRAIN`` is empty or has no boxes, or if ``SOLVER.IMS_PER_BATCH`` does not fit.
        """
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty: name a dataset to train on")
        hint = ""
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            hint = (
                "; DATALOADER.FILTER_EMPTY_ANNOTATIONS True leaves out images without boxes, which are all: False "
                "trains on them as negatives"
            )
        with _usable("DATASETS.TRAIN", cfg.DATASETS.TRAIN, hint):
            return build_train_loader(cfg, build_mapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Builds Detectron2's loader, whose workers end with this process, even if it is killed.

        Raises:
            ValueError: Naming ``DATASETS.TEST``, if the dataset has no images.
        """
        with _usable("DATASETS.TEST", (dataset_name,)):
            loader = build_detection_test_loader(cfg, dataset_name, mapper=build_mapper(cfg, False))
        loader.worker_init_fn = start_worker
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See :func:`aqdet.evaluation.build_evaluator`; results are written into ``OUTPUT_DIR/inference``.

        If there are several datasets, each has a folder there.
        """
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            output_dir = os.path.join(output_dir, dataset_name)
        return build_evaluator(cfg, dataset_name, output_dir)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluates the detector alone, without its auxiliary path and without TF32.

        Raises:
            ValueError: If quantizers were never calibrated, as after loading a float checkpoint.
        """
        with without_scaffold(model), exact_products():
            check_calibrated(model, f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r}")
            return super().test(cfg, model, evaluators)
