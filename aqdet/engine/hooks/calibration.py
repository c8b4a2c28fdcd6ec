"""The hook that gives quantizers their first ranges and aligns adaptors."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage

from ...modeling.scaffold import aligning, waiting_adaptors
from ...quantization import calibrate, quantizers
from ...quantization.calibration import run_on_all_ranks
from ...quantization.observer import check_method
from ...utils.distributed import average_over_processes
from ..forward_state import leaving_no_trace

logger = logging.getLogger(__name__)


class CalibrationHook(HookBase):
    """Calibrates quantizers without a range on training batches, before training.

    The model runs in training mode, so that ranges fit the batch statistics of training, and everything but the
    quantizers is restored afterwards. If the head of an auxiliary path is a copy of the detector's, the hook also
    aligns the path's adaptors on the same batches, and averages them across processes. After a resume everything is
    calibrated, and the hook does nothing.

    Args:
        build_loader: Makes another data loader, so that training still begins with its first batch.
        num_batches, method: Values of ``MODEL.QUANT.CALIBRATION``.

    Raises:
        ValueError: If one of them is not valid; it is raised before training.
    """

    def __init__(self, build_loader: Callable[[], Iterable[Any]], num_batches: int, method: str) -> None:
        check_method(method)
        if num_batches < 1:
            raise ValueError(f"MODEL.QUANT.CALIBRATION.NUM_BATCHES must be at least 1, got {num_batches}")
        self._build_loader = build_loader
        self._num_batches = num_batches
        self._method = method

    def before_train(self) -> None:
        """Calibrates the quantizers and aligns the adaptors that are not ready."""
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
