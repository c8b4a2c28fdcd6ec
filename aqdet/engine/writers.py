"""Writers of a training's scalars, which create their files with the first value."""

from __future__ import annotations

import io
import logging
import os

from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage

from ..utils.files import named, to_json

logger = logging.getLogger(__name__)

WINDOW = 20
"""Number of values that the medians in the files are taken over."""


class MetricsWriter(EventWriter):
    """Writes ``metrics.json`` as Detectron2's ``JSONWriter`` does, in strict JSON, and can be cut back by a resume.

    A line holds the scalars of one iteration. A value that is not finite, such as the AP of a class without objects,
    is ``null``.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: io.FileIO | None = None
        self._last_write = -1

    def _opened(self) -> io.FileIO:
        if self._file is None:
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        return self._file

    def write(self) -> None:
        """Appends a line for each iteration that has new scalars.

        Raises:
            OSError: Naming the file, for example if the disk is full; the file then ends with its last complete line.
        """
        by_iteration: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(WINDOW).items():
            if iteration > self._last_write:
                by_iteration.setdefault(iteration, {})[name] = value
        if not by_iteration:
            return
        lines = [to_json({**by_iteration[i], "iteration": i}, sort_keys=True) + "\n" for i in sorted(by_iteration)]
        file = self._opened()
        size = os.path.getsize(self._path)
        left = memoryview("".join(lines).encode())
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            raise named(error, self._path) from error
        self._last_write = max(by_iteration)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def state_dict(self) -> dict[str, int]:
        """Returns the length of the file in bytes and the last iteration in it."""
        size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
        return {"bytes": size, "last_write": self._last_write}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Truncates the file to its length at :meth:`state_dict`, at the end of a line."""
        self._last_write = state["last_write"]
        file = self._opened()
        size = os.path.getsize(self._path)
        if size < state["bytes"]:
            logger.warning("%s is shorter than when the checkpoint was saved: lines are missing in it", self._path)
        file.truncate(min(size, state["bytes"]))

    def start_anew(self) -> None:
        """Renames the file of an earlier run."""
        self.close()
        if os.path.exists(self._path) and os.path.getsize(self._path):
            os.replace(self._path, f"{self._path}.old")
            logger.info("%s is of an earlier run: kept as metrics.json.old", self._path)


class TensorboardWriter(EventWriter):
    """Detectron2's writer for TensorBoard, created with the first scalar.

    Args:
        folder: The folder of the event file.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._writer: TensorboardXWriter | None = None

    def write(self) -> None:
        """Writes the scalars that are new."""
        if self._writer is None:
            self._writer = TensorboardXWriter(self._folder, window_size=WINDOW)
        self._writer.write()

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
