"""Calibration as an explicit step before training."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch.distributed as dist
from torch import nn

from .observer import check_method
from .quantizer import quantizers

logger = logging.getLogger(__name__)


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
        ValueError: if the method is unknown, before anything runs.
    """
    check_method(method)
    pending = {name: q for name, q in quantizers(model) if q.enabled and not q.is_calibrated}
    if not pending:
        return {}
    for name, quantizer in pending.items():
        quantizer.path = quantizer.path or name
        quantizer.start_observing()
    shares = {}
    try:
        run_on_all_ranks(run)
        for name, quantizer in pending.items():
            shares[name] = quantizer.finish_calibration(method)
    finally:
        for quantizer in pending.values():
            quantizer.stop_observing()
    for name, share in shares.items():
        if share > 0 and not pending[name].spec.signed:
            logger.warning(
                "%s is declared unsigned but %.2f %% of its calibration values are negative: they are clipped to zero",
                name,
                100 * share,
            )
    logger.info("Calibrated %d quantizers (%s)", len(shares), method)
    return shares


def run_on_all_ranks(run: Callable[[], object]) -> None:
    """Runs; a failure on one rank is raised on all, which would otherwise wait for its statistics."""
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
