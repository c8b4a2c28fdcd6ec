"""Calibration as an explicit step before training: observing activations and weights, and the first ranges."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .observer import HistogramObserver, Statistics, check_method, tensor_statistics
from .quantizer import Quantizer, quantizers

logger = logging.getLogger(__name__)


class _Observation:
    """Observes what a quantizer reads, which passes through it meanwhile.

    Args:
        quantizer: uncalibrated and enabled; switched off until :meth:`stop`.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer
        self._observer = HistogramObserver() if quantizer.spec.role == "input" else None
        self._weight: Statistics | None = None
        self._handle = quantizer.register_forward_pre_hook(self._observe)
        quantizer.enabled = False

    def _observe(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0]
        if x.numel() == 0:
            return
        if not torch.isfinite(x).all():
            raise ValueError(f"quantizer '{self._quantizer.name}' saw values that are not finite during calibration")
        if self._observer is not None:
            self._observer.update(x)
        elif self._weight is None:
            # Weights do not change during calibration, so one observation is enough.
            self._weight = tensor_statistics(x, self._quantizer.spec.per_channel)

    def stop(self) -> None:
        """Leaves the quantizer as it was found, but for a range that it got."""
        self._handle.remove()
        self._quantizer.enabled = True

    def statistics(self) -> Statistics:
        """Returns the statistics of all processes.

        Raises:
            RuntimeError: if nothing was observed in any of them.
        """
        statistics = self._weight
        if self._observer is not None:
            self._observer.synchronize(self._quantizer.calibrated.device)
            if not self._observer.is_empty:
                statistics = self._observer.statistics()
        if statistics is None:
            raise RuntimeError(f"quantizer '{self._quantizer.name}' saw no data during calibration")
        return statistics


def observe(model: nn.Module, run: Callable[[], object]) -> dict[str, Statistics]:
    """Collects statistics of what every uncalibrated quantizer of a model reads, for its ``set_range``.

    Args:
        model: the model; its quantizers stay as they are.
        run: forwards some batches through the model; uncalibrated quantizers pass their input through.

    Returns:
        Name of each quantizer -> statistics, summed over the ranks of the default process group.

    Raises:
        RuntimeError: naming the first quantizer that ``run`` did not reach, or the rank where ``run`` failed.
        ValueError: if a value is not finite.
    """
    pending = {name: q for name, q in quantizers(model) if q.enabled and not q.is_calibrated}
    if not pending:
        return {}
    for name, quantizer in pending.items():
        quantizer.name = quantizer.name or name
    observations = {name: _Observation(quantizer) for name, quantizer in pending.items()}
    try:
        run_on_all_ranks(run)
        return {name: observation.statistics() for name, observation in observations.items()}
    finally:
        for observation in observations.values():
            observation.stop()


def calibrate(model: nn.Module, run: Callable[[], object], *, method: str = "mse") -> dict[str, float]:
    """Gives every uncalibrated quantizer of a model its first range.

    Calibrated ones are left as they are and keep quantizing. Statistics are summed over the ranks of the
    default process group, so that all ranks must call this; if ``run`` fails in one of them all raise.

    Args:
        model: the model.
        run: forwards some batches through the model; uncalibrated quantizers pass their input through.
        method: see :func:`aqdet.quantization.observer.initial_scale`.

    Returns:
        Name of each quantizer calibrated -> share of its observed values that were negative.

    Raises:
        RuntimeError: naming the first quantizer that ``run`` did not reach, or the rank where ``run`` failed.
        ValueError: if the method is unknown, before anything runs, or if a value is not finite.
    """
    check_method(method)
    shares = set_ranges(model, observe(model, run), method)
    if shares:
        logger.info("Calibrated %d quantizers (%s)", len(shares), method)
    return shares


def set_ranges(model: nn.Module, observed: Mapping[str, Statistics], method: str) -> dict[str, float]:
    """Gives quantizers their ranges, whether they have some already or not.

    Args:
        model: the model.
        observed: see :func:`observe`.
        method: see :func:`aqdet.quantization.observer.initial_scale`.

    Returns:
        Name of each quantizer -> share of its observed values that were negative.
    """
    own = dict(quantizers(model))
    for name, statistics in observed.items():
        own[name].set_range(statistics, method)
        if statistics.negative_share > 0 and not own[name].spec.signed:
            logger.warning(
                "%s is declared unsigned but %.2f %% of its calibration values are negative: they are clipped to zero",
                name,
                100 * statistics.negative_share,
            )
    return {name: statistics.negative_share for name, statistics in observed.items()}


def run_on_all_ranks(run: Callable[[], object]) -> None:
    """Calls ``run``, and raises a failure on one rank on all ranks, which would otherwise wait for its statistics.

    What torch.compile has compiled of a model runs as it is written: observing is no part of the network.
    """
    run = torch.compiler.set_stance("force_eager")(run)
    if not (dist.is_available() and dist.is_initialized()):
        run()
        return
    failure: Exception | None = None
    try:
        run()
    except Exception as error:
        failure = error
    failures: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(failures, "" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, message in enumerate(failures):
        if message:
            raise RuntimeError(f"calibration failed on rank {rank}: {message}")
