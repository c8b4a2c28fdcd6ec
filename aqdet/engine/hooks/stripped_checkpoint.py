"""The hook that writes the checkpoint of the detector alone."""

from __future__ import annotations

from detectron2.engine import HookBase

from ...checkpoint import AqdetCheckpointer


class StrippedCheckpointHook(HookBase):
    """Writes ``model_final_stripped.pth`` beside ``model_final.pth`` once, after the last iteration."""

    def __init__(self, checkpointer: AqdetCheckpointer) -> None:
        self._checkpointer = checkpointer

    def after_train(self) -> None:
        """Writes the file if the training has finished."""
        if self.trainer.iter >= self.trainer.max_iter:
            if self.trainer.max_iter == 0:
                self._save_without_a_step()
            self._checkpointer.save_stripped("model_final_stripped")

    def _save_without_a_step(self) -> None:
        """Writes ``model_final.pth``, which otherwise the last step does; a resume begins with iteration 0."""
        self.trainer.iter = -1
        try:
            self._checkpointer.save("model_final", iteration=-1)
        finally:
            self.trainer.iter = 0
