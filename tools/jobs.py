"""A grid of trainings that can be stopped and continued."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from detectron2.config import CfgNode
from machine import Machine

from aqdet.config import flatten, load_config
from aqdet.utils.files import from_json, write_json

DONE = "done.json"
_DECLARATIONS = ("DATASETS.DECLARED", "DATASETS.IMAGE_FOLDERS")
_PATHS = ("root", "image_root", "json", "yaml")
_NON_FINITE = 3
"""Exit status of ``train_net.py`` for a loss that is not finite."""
_POLL_SECONDS = 2.0
_LINE_SECONDS = 60.0
"""Time between lines of progress where the output is no terminal."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of ``tools/train_net.py``.

    Attributes:
        name: The name shown in progress lines.
        config: The config file.
        overrides: ``KEY VALUE ...``, without ``OUTPUT_DIR``.
        output_dir: The run's ``OUTPUT_DIR``.
        iterations: The length of the training, for the ETA.
        sources: The jobs whose checkpoints the run reads; they are run first.
        eval_only: Whether the run evaluates ``MODEL.WEIGHTS`` and trains nothing.
        cost: The time that an iteration takes, in any unit that all jobs of a grid share, for the ETA.
        overhead: The time that start, calibration and evaluation take together, in the unit of ``cost``.
        may_diverge: Whether a loss that is not finite is a result, which leaves a job done without metrics.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    output_dir: str
    iterations: int
    sources: tuple[Job, ...] = ()
    eval_only: bool = False
    cost: float = 1.0
    overhead: float = 0.0
    may_diverge: bool = False

    @property
    def work(self) -> float:
        """The time that the whole job takes, in the unit of ``cost``."""
        return self.iterations * self.cost + self.overhead

    def command(self, train_net: str) -> list[str]:
        """Returns the command line; it has config and overrides alone, so that it can be repeated by hand."""
        return [
            sys.executable,
            train_net,
            *["--eval-only"] * self.eval_only,
            "--config-file",
            self.config,
            "OUTPUT_DIR",
            self.output_dir,
            *self.overrides,
        ]

    def fingerprint(self) -> str:
        """Returns a text that changes when a value of the config does.

        The value may be in the file, in a ``_BASE_`` of it or in the overrides. Values at their default do not count,
        so that a key that is new changes nothing, nor does where on the machine a declared dataset lies. The sources
        count: a run that started from another run's weights is another run.
        """
        defaults = dict(_values(load_config("")))
        values = [
            pair for pair in _values(load_config(self.config, self.overrides)) if defaults.get(pair[0]) != pair[1]
        ]
        text = repr(sorted(values)) + "".join(source.fingerprint() for source in self.sources)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def finished(self) -> dict[str, Any] | None:
        """Returns what was noted when the job ended, or None if it is still to be done."""
        path = Path(self.output_dir) / DONE
        if not path.is_file():
            return None
        noted = json.loads(path.read_text())
        return noted if noted.get("fingerprint") == self.fingerprint() else None

    def metrics(self) -> dict[str, float | None]:
        """Returns AP and the like, in percent, from ``inference/metrics.json``; empty if nothing was evaluated."""
        path = Path(self.output_dir) / "inference" / "metrics.json"
        return from_json(path.read_text()) if path.is_file() else {}


class _Running:
    """A job's process, and how far it is.

    Args:
        job: The job.
        train_net: The path of ``tools/train_net.py``.
        threads: The number of threads of the process; None leaves the choice to it.
    """

    def __init__(self, job: Job, train_net: str, threads: int | None) -> None:
        self.job = job
        self._folder = Path(job.output_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._command = job.command(train_net)
        self.first_iteration = 0
        started, last = self._folder / "started.json", self._folder / "last_checkpoint"
        self._fingerprint = job.fingerprint()
        if started.is_file() and json.loads(started.read_text()) == self._fingerprint:
            if last.is_file():
                self._command.insert(self._command.index("--config-file"), "--resume")
                found = re.search(r"_(\d+)\.pth", last.read_text())
                self.first_iteration = int(found[1]) + 1 if found else 0
        else:
            last.unlink(missing_ok=True)
            write_json(started, self._fingerprint)
        self._history = self._folder / "metrics.json"
        # Lines of an earlier start are of iterations that this one may do again.
        self._known = self._history.stat().st_size if self._history.is_file() else 0
        self._start = time.monotonic()
        self._log: IO[bytes] = open(self._folder / "stdout.txt", "ab")  # noqa: SIM115  (closed with the process)
        environment = None if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=subprocess.STDOUT, env=environment)

    @property
    def seconds(self) -> float:
        """The time since the process was started."""
        return time.monotonic() - self._start

    def progress(self) -> tuple[int, float | None]:
        """Returns the number of iterations that are done and the last loss, as the training has written them."""
        try:
            with open(self._history, "rb") as file:
                file.seek(self._known)
                last = json.loads(file.read().splitlines()[-1])
            return int(last["iteration"]) + 1, last.get("total_loss")
        except (OSError, IndexError, KeyError, ValueError):
            return self.first_iteration, None

    def work_done(self) -> float:
        """Returns the work done since the process was started, in the unit of ``Job.cost``."""
        return max(self.progress()[0] - self.first_iteration, 0) * self.job.cost

    def has_ended(self) -> bool:
        """Returns whether the process has ended."""
        return self._process.poll() is not None

    def has_diverged(self) -> bool:
        """Returns whether the process has ended because a loss was not finite, and that is a result of the job."""
        return self.job.may_diverge and self._process.returncode == _NON_FINITE

    def finish(self) -> None:
        """Notes that the job is done.

        Raises:
            RuntimeError: If the process has failed, with the end of its log.
        """
        self._log.close()
        status = self._process.returncode
        if status and not self.has_diverged():
            tail = (self._folder / "stdout.txt").read_text(errors="replace").splitlines()[-15:]
            raise RuntimeError(
                f"{self.job.name} failed with status {status}; end of {self._folder / 'stdout.txt'}:\n"
                + "\n".join(tail)
            )
        noted = {
            "fingerprint": self._fingerprint,
            "seconds": round(self.seconds, 1),
            "date": time.strftime("%Y-%m-%d"),
            "machine": str(Machine.here()),
            "command": " ".join(["python", *self._command[1:]]),
        }
        if self.has_diverged():
            noted["diverged"] = True
        write_json(self._folder / DONE, noted, indent=None)

    def terminate(self) -> None:
        """Asks the process to save and end."""
        self._process.terminate()

    def wait(self) -> None:
        """Waits until the process has ended."""
        self._process.wait()
        self._log.close()


class _Grid:
    """The jobs that are left, and the lines that say how far they are.

    The ETA takes the pace of all work that was done since the start, with as many jobs side by side as there were.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.waiting: list[Job] = []
        self.running: list[_Running] = []
        self._heads = {job: f"[{number}/{len(jobs)}] {job.name}" for number, job in enumerate(jobs, 1)}
        self._start = self._last_line = time.monotonic()
        self._done = 0.0
        for job in jobs:
            if job.finished() is not None:
                self.say(job, "done before")
            else:
                self.waiting.append(job)

    def startable(self) -> list[Job]:
        """Returns the jobs whose sources are done."""
        left = {*self.waiting, *(running.job for running in self.running)}
        return [job for job in self.waiting if left.isdisjoint(job.sources)]

    def start(self, job: Job, train_net: str, threads: int | None) -> None:
        """Starts a job."""
        self.waiting.remove(job)
        self.running.append(_Running(job, train_net, threads))
        eta = self.eta()
        self.say(job, f"running{'' if eta is None else f', ETA {_clock(eta)}'}")

    def finish(self, running: _Running) -> None:
        """Takes a job whose process has ended out of the grid."""
        self.running.remove(running)
        seconds = running.seconds
        running.finish()
        job = running.job
        self._done += job.work - running.first_iteration * job.cost
        metrics = job.metrics()
        result = "done"
        if metrics:
            result = f"top-1 {_number(metrics['top1'])}" if "top1" in metrics else f"AP {_number(metrics.get('AP'))}"
        elif running.has_diverged():
            result = "a loss was not finite: stopped"
        self.say(job, f"{result} in {_clock(seconds)}")

    def eta(self) -> float | None:
        """Returns the seconds until the last job ends, or None before there is a pace to tell it by."""
        done = self._done + sum(running.work_done() for running in self.running)
        if done <= 0:
            return None
        left = sum(job.work for job in self.waiting)
        for running in self.running:
            iterations, _ = running.progress()
            left += max(running.job.work - iterations * running.job.cost, 0)
        return left * (time.monotonic() - self._start) / done

    def say(self, job: Job, text: str) -> None:
        """Prints a line about a job."""
        print(f"{_clear()}{self._heads[job]}: {text}", flush=True)

    def show(self) -> None:
        """Shows how far the running jobs are: on a terminal in place, elsewhere in a line a minute."""
        now = time.monotonic()
        is_terminal = sys.stdout.isatty()
        if not self.running or (not is_terminal and now - self._last_line < _LINE_SECONDS):
            return
        self._last_line = now
        parts = []
        for running in self.running:
            iterations, loss = running.progress()
            state = "starting" if loss is None else f"iteration {iterations} of {running.job.iterations}"
            if loss is not None and iterations < running.job.iterations:
                state += f", loss {loss:.2f}"
            parts.append(f"{self._heads[running.job]}: {state}, {_clock(running.seconds)}")
        eta = self.eta()
        line = "; ".join([*parts, *([] if eta is None else [f"ETA {_clock(eta)}"])])
        print(f"{_clear()}{line}", end="" if is_terminal else "\n", flush=True)


def run_jobs(
    jobs: Sequence[Job], train_net: str, after: Callable[[Job], object] | None = None, *, at_once: int = 1
) -> None:
    """Runs the jobs, the first ones first; finished ones are passed over, an interrupted one is resumed.

    Prints a line when a job starts or ends, and how far the running jobs are, with an ETA.

    Args:
        jobs: The grid.
        train_net: The path of ``tools/train_net.py``.
        after: A function that is called with each job that was run, when the job is done.
        at_once: How many jobs may run side by side. They then share the processor's cores, unless ``OMP_NUM_THREADS``
            is set.

    Raises:
        RuntimeError: If a job fails, with the end of its log. The others are stopped, and go on with the next call.
    """
    grid = _Grid(jobs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with _sigterm_as_exit():
        try:
            while grid.waiting or grid.running:
                ready = grid.startable()[: at_once - len(grid.running)]
                together = len(grid.running) + len(ready)
                for job in ready:
                    shared = at_once > 1 and "OMP_NUM_THREADS" not in os.environ
                    grid.start(job, train_net, max(cores // together, 1) if shared else None)
                time.sleep(_POLL_SECONDS)
                for running in [running for running in grid.running if running.has_ended()]:
                    grid.finish(running)
                    if after is not None:
                        after(running.job)
                grid.show()
        except BaseException:
            for running in grid.running:
                running.terminate()
            for running in grid.running:
                running.wait()
            raise


def print_commands(jobs: Sequence[Job], train_net: str) -> None:
    """Prints the command of each job, a line each."""
    for job in jobs:
        print(" ".join(job.command(train_net)))


@contextlib.contextmanager
def grid_ends_in_one_line() -> Iterator[None]:
    """Ends a program whose grid of jobs has failed, or was stopped, with a line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to continue")


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Lets SIGTERM end the program by an exception, which stops the trainings too, in a line."""

    def stop(number: int, _: FrameType | None) -> None:
        print("stopped; run the same command again to continue", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _clear() -> str:
    """Returns what clears the line of progress on a terminal."""
    return "\r\x1b[K" if sys.stdout.isatty() else ""


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.1f}"


def _values(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Yields the values of a config as text, without the folders that declared datasets lie in."""
    for name, value in flatten(cfg):
        if name in _DECLARATIONS:
            value = [_without_folders(entry) for entry in value]
        yield name, repr(value)


def _without_folders(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns a declared dataset with the last parts of its paths."""
    return {
        field: os.path.basename(os.path.normpath(value)) if field in _PATHS else value for field, value in entry.items()
    }
