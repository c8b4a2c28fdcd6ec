"""The hook that evaluates the detector alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.engine.hooks import EvalHook

from ...checkpoint import AqdetCheckpointer
from ...modeling.scaffold import without_scaffold
from ...utils.distributed import broadcast_from_main


class StrippedEvalHook(EvalHook):
    """Evaluates the detector alone, every ``eval_period`` iterations and after the last one.

    The auxiliary path is removed from the model during evaluation and restored afterwards. All processes evaluate with
    the main process's BN statistics, which are those in the checkpoint. If the evaluation fails, the hook saves a
    checkpoint before the error ends the training.

    Args:
        eval_period, eval_function: See Detectron2's ``EvalHook``.
        checkpointer: Saves ``model_<iteration>.pth``.
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
            if trainer.iter < trainer.max_iter:  # after the last one, model_final.pth exists
                self._checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
            raise

    def after_train(self) -> None:
        """Evaluates if the training has finished."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
