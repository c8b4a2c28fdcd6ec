"""The hook that carries metrics through a resume."""

from __future__ import annotations

from typing import Any

from detectron2.engine import HookBase

from ..writers import WINDOW, MetricsWriter

TIMINGS = frozenset({"time", "data_time", "rank_data_time", "eta_seconds"})
"""Scalars that no resume can repeat."""


class MetricsHook(HookBase):
    """Carries ``metrics.json``, and the recent values that its medians are taken over, through a resume.

    Args:
        writer: The writer of the main process; None in the others.
    """

    def __init__(self, writer: MetricsWriter | None) -> None:
        self._writer = writer
        self._loaded: dict[str, Any] | None = None

    def before_train(self) -> None:
        """Restores the loaded state, or starts the file anew if the run starts at its beginning."""
        if self._loaded is None:
            if self._writer is not None and self.trainer.start_iter == 0:
                self._writer.start_anew()
            return
        storage = self.trainer.storage
        for name, (smoothed, values) in self._loaded["recent"].items():
            for value, iteration in values:
                storage.iter = iteration
                storage.put_scalar(name, value, smoothing_hint=smoothed)
        storage.iter = self.trainer.start_iter
        if self._writer is not None:
            self._writer.load_state_dict(self._loaded["file"])

    def state_dict(self) -> dict[str, Any]:
        """Returns the state after the trainer's iteration, in built-in types."""
        storage, iteration = self.trainer.storage, self.trainer.iter
        hints = storage.smoothing_hints()
        recent = {}
        for name, history in storage.histories().items():
            values = [(float(v), int(i)) for v, i in history.values()[-2 * WINDOW :] if i <= iteration]
            if name not in TIMINGS:
                recent[name] = (hints[name], values[-WINDOW:])
        return {"recent": recent, "file": {} if self._writer is None else self._writer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the state until training starts."""
        self._loaded = state
