"""The hook that keeps a moving average of weights, scales and BN statistics for evaluation and export."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor

from ...modeling.scaffold import SCAFFOLD_PREFIXES
from ...utils.distributed import broadcast_from_main, unwrap

logger = logging.getLogger(__name__)


class WeightAverageHook(HookBase):
    """Averages the detector over iterations; evaluation and the final checkpoint have the average.

    Averaged are latent weights, scales and every other float of the state dict but the auxiliary path, after each step:
    ``average <- d average + (1 - d) value`` with ``d = min(decay, (1 + n) / (10 + n))`` after n steps, so that
    the start is soon forgotten. Averaged latent weights do not take part in the flips of single weights between
    two codes (2311.05109).

    After the last step the model and the average change places: ``model_final.pth`` and the stripped file
    have the average as the model, and a training that is resumed to go further changes them back. In earlier
    checkpoints the model has the trained weights, and the trainer's state has the average. Therefore this hook runs
    before the checkpoint's.

    Args:
        decay: ``SOLVER.EMA_DECAY``, above 0 and below 1.

    Raises:
        ValueError: If the decay is not in this range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"SOLVER.EMA_DECAY must be 0 for none, or above 0 and below 1, got {decay}")
        self._decay = decay
        self._other: dict[str, Tensor] = {}
        self._num_steps = 0
        self._swapped = False

    def _tensors(self) -> dict[str, Tensor]:
        model = self.trainer.model
        state = unwrap(model).state_dict()
        return {k: v for k, v in state.items() if v.is_floating_point() and not k.startswith(SCAFFOLD_PREFIXES)}

    def before_train(self) -> None:
        """Starts from the model, which is calibrated by now, or from the state of the resumed run."""
        tensors = self._tensors()
        if not self._other:
            self._other = {key: value.clone() for key, value in tensors.items()}
        self._other = {key: self._other[key].to(value.device) for key, value in tensors.items()}
        if self._swapped and self.trainer.start_iter < self.trainer.max_iter:
            self._swap()

    def after_step(self) -> None:
        """Updates the average, which becomes the model's weights after the last step."""
        self._num_steps += 1
        decay = min(self._decay, (1 + self._num_steps) / (10 + self._num_steps))
        tensors = self._tensors()
        torch._foreach_lerp_([self._other[key] for key in tensors], list(tensors.values()), 1 - decay)
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            logger.info("The model is now the average of its weights over the iterations")
            self._swap()

    def _swap(self) -> None:
        for key, value in self._tensors().items():
            saved = value.clone()
            value.copy_(self._other[key])
            self._other[key].copy_(saved)
        self._swapped = not self._swapped

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the average, equal on all ranks, into the model within a block; changes made there stay in it."""
        if self._swapped:
            yield
            return
        self._swap()
        try:
            broadcast_from_main(self._tensors().values())
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """Returns the average, or the trained weights after the last step."""
        return {"other": self._other, "num_steps": self._num_steps, "swapped": self._swapped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._other = {key: torch.as_tensor(value).clone() for key, value in state["other"].items()}
        self._num_steps = state["num_steps"]
        self._swapped = state["swapped"]
