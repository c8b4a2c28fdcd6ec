"""The hook that stops a training between two iterations when a signal comes."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from ...checkpoint import AqdetCheckpointer

logger = logging.getLogger(__name__)


class Interrupted(SystemExit):
    """Raised when a signal stops the training; the exit status is the shell's for that signal.

    Args:
        signum: The signal.
        iteration: The last iteration that was done; -1 before the first one.
        saved: Whether a checkpoint of that iteration was written.

    Attributes:
        can_resume: Whether the folder has a checkpoint that ``--resume`` continues from.
    """

    def __init__(self, signum: int, iteration: int, *, saved: bool = True, can_resume: bool = True) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.iteration = iteration
        self.saved = saved
        self.can_resume = can_resume

    def __str__(self) -> str:
        where = f"after iteration {self.iteration}" if self.iteration >= 0 else "before the first iteration"
        lost = "" if self.saved else ", which is not saved" if self.iteration >= 0 else ": nothing is saved"
        return f"stopped by {signal.Signals(self.signum).name} {where}{lost}"


class InterruptHook(HookBase):
    """Ends the iteration, saves and stops on SIGTERM and Ctrl-C; the same signal again stops at once.

    A signal to one process stops all of them, after the same iteration. The hook has to be the last one, so that it
    saves the state after all others. In a process that ``--num-gpus`` has started, it does not handle SIGTERM: there
    the signal means that another process has failed, and waiting for that one would take forever. Such processes get
    SIGINT when their parent ends.

    Args:
        checkpointer: Saves ``model_<iteration>.pth``.
    """

    def __init__(self, checkpointer: AqdetCheckpointer) -> None:
        self._checkpointer = checkpointer
        self._received = 0
        self._previous: dict[int, Any] = {}

    def before_train(self) -> None:
        """Installs the handlers; from now on signals wait for the end of an iteration."""
        if threading.current_thread() is not threading.main_thread():
            return  # Only the main thread may set handlers.
        if self.trainer.start_iter >= self.trainer.max_iter:
            return  # The evaluation that follows, as in post-training quantization, has no iteration to wait for.
        spawned = multiprocessing.parent_process() is not None
        for signum in (signal.SIGINT,) if spawned else (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        logger.warning("%s: saving after this iteration; once more to stop at once", signal.Signals(signum).name)
        self._received = signum
        signal.signal(signum, self._previous.pop(signum))  # The other signal may follow: first Ctrl-C, then SIGTERM.

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def after_step(self) -> None:
        """Stops the training if any process got a signal."""
        signum = max(comm.all_gather(self._received))
        iteration = self.trainer.iter
        if iteration + 1 >= self.trainer.max_iter:
            self._restore()  # The evaluation that follows has no iterations, and everything is saved.
        if signum:
            if iteration + 1 < self.trainer.max_iter:
                self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            raise Interrupted(signum, iteration)

    def after_train(self) -> None:
        """Restores the earlier handlers of the signals."""
        self._restore()
