"""The log file of a run, which does not exist before the run does."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from types import TracebackType

from detectron2.utils import comm

_LOGGERS = ("detectron2", "fvcore", "aqdet")
_FORMAT = logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S")


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        """Drops a line for which the disk has no room; the error that stops the run is printed, too."""


class RunLog(logging.Handler):
    """Keeps log records until a folder is given, and then writes them and all that follow to ``log.txt`` there.

    So a command that is refused leaves no file. It is used in a ``with`` statement, whose end closes the file.
    Processes other than the main one write ``log.txt.rank<number>``, as with Detectron2's ``setup_logger``.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._lines: list[str] = []
        self._file: logging.FileHandler | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, or keeps its text."""
        if self._file is not None:
            self._file.emit(record)
        else:
            self._lines.append(_FORMAT.format(record))

    def write_to(self, folder: str) -> None:
        """Makes a folder, opens ``log.txt`` in it, and appends the records that were kept.

        Raises:
            OSError: If the file cannot be written.
        """
        os.makedirs(folder, exist_ok=True)
        rank = comm.get_rank()
        file = _File(os.path.join(folder, f"log.txt.rank{rank}" if rank else "log.txt"), encoding="utf-8")
        file.setFormatter(_FORMAT)
        assert file.stream is not None
        file.stream.writelines(f"{line}\n" for line in self._lines)
        file.flush()
        self._lines.clear()
        self._file = file

    def __enter__(self) -> RunLog:
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self)
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # full disk: the buffered lines are lost
                self._file.close()
        super().close()


@contextlib.contextmanager
def errors_in_one_line(*kinds: type[BaseException]) -> Iterator[None]:
    """Omits the traceback that Detectron2's training loop logs for errors that are no fault of the program.

    With ``AQDET_DEBUG`` set in the environment, the traceback stays.

    Args:
        kinds: The classes of these errors.
    """

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, kinds) and not os.environ.get("AQDET_DEBUG"):
            record.msg, record.exc_info = f"{record.msg} {' '.join(str(error).split())}", None
        return True

    train_loop = logging.getLogger("detectron2.engine.train_loop")
    train_loop.addFilter(shorten)
    try:
        yield
    finally:
        train_loop.removeFilter(shorten)
