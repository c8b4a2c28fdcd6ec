"""The output of console programs: lines with the time, errors in a line, no traceback for a reader that ends first."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

USER_ERROR = 2
STANDARD_ERROR = 2
SIGNALLED = 128
"""Exit status of a program that a signal has ended, less the signal's number: as shells have it."""
OUTPUT_CLOSED = 141
"""Exit status of a program that the signal SIGPIPE (13) would have ended: 128 + 13."""


class Terminated(KeyboardInterrupt):
    """Ends a program as Ctrl-C does, where SIGTERM has arrived."""


def signal_of(interrupt: KeyboardInterrupt) -> signal.Signals:
    """Returns the signal that has raised an interrupt."""
    return signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT


def run_console(main: Callable[[], object], *, goes_on: bool = False) -> None:
    """Runs a program; it ends without a traceback on Ctrl-C or SIGTERM, and when nobody reads its output any more.

    On Ctrl-C it says that it is stopped, with status 130, and on SIGTERM with status 143; ``AQDET_DEBUG`` keeps the
    traceback. Files that it was writing aside are gone in both cases.

    Programs catch ``OSError`` around their work and would report a closed pipe as an error of a file. Therefore the
    streams themselves end the process, with status 141.

    Args:
        main: The program.
        goes_on: Whether it goes on without its output, as a training does, since its log is in a file, too.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_ending_with_its_reader(stream, goes_on) for stream in streams)
    try:
        with _sigterm_as_interrupt():
            main()
    except KeyboardInterrupt as interrupt:
        if os.environ.get("AQDET_DEBUG"):
            raise
        print("stopped", file=sys.stderr)
        sys.exit(SIGNALLED + signal_of(interrupt))
    finally:
        # Buffered output is written here: at the interpreter's own end it would be too late to choose the exit status.
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            sys.stdout, sys.stderr = streams


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Ends the work inside the context by :class:`Terminated` on SIGTERM; a process forked from it ends at once."""
    process = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():  # Python has signals in the main thread alone
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends a program whose input is wrong with a line instead of a traceback, which ``AQDET_DEBUG`` keeps.

    The exit status is that of the error, where it has an ``exit_status``, otherwise 2. An error with a status of its
    own is a verdict on the input, to which no line of code would add anything.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("AQDET_DEBUG"):
            raise
        status = getattr(error, "exit_status", None)
        where = " (AQDET_DEBUG=1 shows where)" if status is None else ""
        print(f"error: {' '.join(str(error).split())}{where}", file=sys.stderr)
        sys.exit(USER_ERROR if status is None else status)


def timed_lines() -> Callable[[str], None]:
    """Returns a function that prints lines, each after the seconds since this call."""
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:5.1f} s] {text}", flush=True)

    return say


class _Output(io.FileIO):
    """The file descriptor of a stream, which drops further output when its reader is gone."""

    def __init__(self, descriptor: int, goes_on: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._goes_on = goes_on

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if not self._goes_on:
                sys.exit(OUTPUT_CLOSED)
            if self.fileno() != STANDARD_ERROR:
                print("nobody reads the output any more; the work goes on", file=sys.stderr)
            return super().write(data)  # type: ignore[arg-type]


def _ending_with_its_reader(stream: TextIO, goes_on: bool) -> TextIO:
    """Returns the stream on an :class:`_Output`, or itself where it is a terminal or no file, as in a test."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return stream
    if not isinstance(stream, io.TextIOWrapper) or stream.isatty():
        return stream
    stream.flush()
    output = _Output(descriptor, goes_on)
    return io.TextIOWrapper(
        output if stream.write_through else io.BufferedWriter(output),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
