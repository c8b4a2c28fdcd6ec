"""The hook that estimates BN statistics again before evaluation."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...modeling.scaffold import without_scaffold
from ..forward_state import leaving_no_trace
from .weight_average import WeightAverageHook

logger = logging.getLogger(__name__)


class _Moments:
    """A forward pre-hook that sums count, values and squares of a BN's inputs."""

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None
        self._sums = norm.running_mean.new_zeros((3, norm.num_features), dtype=torch.float64)

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if x.numel() == 0:  # a head's, of a batch without regions
            return
        var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        var, mean = var.double(), mean.double()
        self._sums += torch.stack([torch.ones_like(mean), mean, var + mean.square()]) * (x.numel() // x.shape[1])

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Returns mean and variance over all ranks, None without any value."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sums)
        count, total, squares = self._sums
        if not count.any():
            return None
        mean = total / count
        return mean, (squares / count - mean.square()).clamp(min=0)


def _norms_in_training(model: nn.Module) -> list[_BatchNorm]:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    return [norm for norm in norms if norm.running_mean is not None]


def estimate_bn(model: nn.Module, build_loader: Callable[[], Iterable[Any]], num_batches: int) -> None:
    """Replaces the running statistics of a detector's BNs by the statistics of its current weights.

    When quantized weights flip between codes, running statistics are averages that belong to no set of weights
    (Nagel et al., 2203.11086). Every BN in training mode gets the population mean and variance over the batches and
    over all ranks; where there is one BN per pyramid level, each is estimated by itself. A BN that no value reaches
    keeps its statistics. The auxiliary path, the loss normalizer and the random states do not change.

    Args:
        model: The model in training mode; it may be wrapped in ``DistributedDataParallel``.
        build_loader: Makes an iterable of training batches.
        num_batches: The number of batches that are used.
    """
    with without_scaffold(model):
        moments = [(norm, _Moments(norm)) for norm in _norms_in_training(model)]
        handles = [norm.register_forward_pre_hook(moment) for norm, moment in moments]
        try:
            with leaving_no_trace(model), torch.no_grad(), EventStorage(0):
                for batch in itertools.islice(build_loader(), num_batches):
                    model(batch)
        finally:
            for handle in handles:
                handle.remove()
    for norm, moment in moments:
        found = moment.statistics()
        if found is None:
            logger.warning("No batch reached a batch norm: its statistics stay as they are")
            continue
        mean, var = found
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


class PreciseBNHook(HookBase):
    """Estimates BN statistics again before each evaluation: every ``period`` iterations and after the last one.

    It replaces Detectron2's hook, which would also run the auxiliary path, change the loss normalizer and the random
    states of training, and keep the statistics of each rank apart. It has to run before the checkpoint is written.
    With averaged weights, it estimates the average's statistics.

    Args:
        period: ``TEST.EVAL_PERIOD``; 0 for the end of training alone.
        build_loader: Makes a new loader each time, so that a resume does not have to restore one.
        num_batches: ``TEST.PRECISE_BN.NUM_ITER``.
        average: The hook that averages weights, if there is one.
    """

    def __init__(
        self,
        period: int,
        build_loader: Callable[[], Iterable[Any]],
        num_batches: int,
        average: WeightAverageHook | None = None,
    ) -> None:
        if num_batches < 1:
            raise ValueError(f"TEST.PRECISE_BN.NUM_ITER must be at least 1, got {num_batches}")
        self._period = period
        self._build_loader = build_loader
        self._num_batches = num_batches
        self._average = average

    def after_step(self) -> None:
        """Estimates the statistics if an evaluation is due and BN is not frozen."""
        done = self.trainer.iter + 1
        if done < self.trainer.max_iter and not (self._period > 0 and done % self._period == 0):
            return
        model = self.trainer.model
        with without_scaffold(model):
            if not _norms_in_training(model):
                logger.info("BN statistics are frozen or there are none: they are not estimated again")
                return
        logger.info("Estimating BN statistics from %d batches", self._num_batches)
        with contextlib.nullcontext() if self._average is None else self._average.applied():
            estimate_bn(model, self._build_loader, self._num_batches)
