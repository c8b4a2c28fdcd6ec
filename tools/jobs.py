"""A grid of trainings that can be stopped and continued."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from aqdet.config import load_config

DONE = "done.json"
LEFT_OUT = "Left out"
"""Begins the last paragraph of a section, where a grid has not all run."""
_DECLARATIONS = ("DATASETS.DECLARED", "DATASETS.IMAGE_FOLDERS")
_PATHS = ("root", "image_root", "json", "yaml")
_POLL_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of ``tools/train_net.py``.

    Attributes:
        name: shown in progress lines.
        config: config file.
        overrides: ``KEY VALUE ...``, without ``OUTPUT_DIR``.
        output_dir: its ``OUTPUT_DIR``.
        iterations: length, for the ETA.
        sources: jobs whose checkpoints it reads.
        eval_only: evaluates ``MODEL.WEIGHTS`` and trains nothing.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    output_dir: str
    iterations: int
    sources: tuple[Job, ...] = ()
    eval_only: bool = False

    def command(self, train_net: str) -> list[str]:
        """The command line; config and overrides alone, so that it can be repeated by hand."""
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
        """Changes when a value of the config does, be it in the file, in a ``_BASE_`` of it or in the overrides.

        Values at their default do not count, so that a key that is new changes nothing, nor does where on the machine
        a declared dataset lies. The sources count: what started from another run's weights is another run.
        """
        defaults = dict(_leaves(load_config("")))
        values = [
            pair for pair in _leaves(load_config(self.config, self.overrides)) if defaults.get(pair[0]) != pair[1]
        ]
        text = repr(sorted(values)) + "".join(source.fingerprint() for source in self.sources)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def finished(self) -> dict[str, Any] | None:
        """What was noted when the job ended, or None if it is still to be done."""
        path = Path(self.output_dir) / DONE
        if not path.is_file():
            return None
        noted = json.loads(path.read_text())
        return noted if noted.get("fingerprint") == self.fingerprint() else None

    def metrics(self) -> dict[str, float | None]:
        """AP and the like, in percent, from ``inference/metrics.json``."""
        return json.loads((Path(self.output_dir) / "inference" / "metrics.json").read_text())


def run_jobs(jobs: Sequence[Job], train_net: str, after: Callable[[Job], object] | None = None) -> None:
    """Runs the jobs in order; finished ones are passed over, an interrupted one is resumed.

    Prints a line a job and, on a terminal, the running job's progress. The ETA counts iterations at the
    pace seen so far.

    Args:
        jobs: the grid.
        train_net: path of ``tools/train_net.py``.
        after: called with each job that it ran, when the job is done.

    Raises:
        RuntimeError: if a job fails, with the end of its log.
    """
    left = sum(job.iterations for job in jobs if job.finished() is None)
    seconds_per_iteration: float | None = None
    spent = done_iterations = 0.0
    for number, job in enumerate(jobs, 1):
        head = f"[{number}/{len(jobs)}] {job.name}"
        if job.finished() is not None:
            print(f"{head}: done before", flush=True)
            continue
        eta = "" if seconds_per_iteration is None else f", ETA {_clock(left * seconds_per_iteration)}"
        print(f"{head}: running{eta}", flush=True)
        start = time.monotonic()
        _run(job, train_net, head)
        seconds = time.monotonic() - start
        if after is not None:
            after(job)
        spent += seconds
        done_iterations += job.iterations
        left -= job.iterations
        seconds_per_iteration = spent / done_iterations
        values = job.metrics()
        print(f"{head}: AP {_number(values.get('AP'))} in {_clock(seconds)}", flush=True)


def _run(job: Job, train_net: str, head: str) -> None:
    output = Path(job.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    command = job.command(train_net)
    started = output / "started.json"
    if started.is_file() and json.loads(started.read_text()) == job.fingerprint():
        if (output / "last_checkpoint").is_file():
            command.insert(command.index("--config-file"), "--resume")
    else:
        (output / "last_checkpoint").unlink(missing_ok=True)
        started.write_text(json.dumps(job.fingerprint()))
    start = time.monotonic()
    with open(output / "stdout.txt", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                if sys.stdout.isatty():
                    line = f"\r{head}: {_progress(output)}, {_clock(time.monotonic() - start)}  "
                    print(line, end="", flush=True)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if sys.stdout.isatty():
        print("\r", end="")
    if process.returncode:
        tail = (output / "stdout.txt").read_text(errors="replace").splitlines()[-15:]
        raise RuntimeError(
            f"{job.name} failed with status {process.returncode}; end of {output / 'stdout.txt'}:\n" + "\n".join(tail)
        )
    noted = {
        "fingerprint": job.fingerprint(),
        "seconds": round(time.monotonic() - start, 1),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "command": " ".join(["python", *command[1:]]),
    }
    aside = output / f"{DONE}.part"
    aside.write_text(json.dumps(noted))
    os.replace(aside, output / DONE)


def _progress(output: Path) -> str:
    """Iteration and loss from the last line of Detectron2's ``metrics.json``."""
    try:
        last = json.loads((output / "metrics.json").read_text().splitlines()[-1])
        return f"iteration {last['iteration']}, loss {last['total_loss']:.2f}"
    except (OSError, IndexError, KeyError, ValueError):
        return "starting"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.1f}"


def describe_machine() -> str:
    """Processor, cores and threads, for a line below a table."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def mean_and_spread(values: Sequence[float | None]) -> str:
    """``mean ± sample standard deviation`` to one decimal; the mean alone for a single value."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.1f}"
    return f"{statistics.mean(known):.1f} ± {statistics.stdev(known):.1f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def kept_remark(path: str | os.PathLike[str], name: str) -> str:
    """What :func:`write_section`'s section ``name`` says below its command, but for what was left out; "" if nothing.

    A table is written again when it has more rows; what was written about it by hand is to stay.
    """
    target = Path(path)
    content = target.read_text() if target.is_file() else ""
    section = content.partition(f"<!-- begin {name} -->")[2].partition(f"<!-- end {name} -->")[0]
    below: list[str] = []
    for paragraph in reversed(section.strip().split("\n\n")):
        if "Command: `" in paragraph:
            return "\n\n".join(reversed(below))
        if not paragraph.startswith(LEFT_OUT):
            below.append(paragraph)
    return ""


def write_section(path: str | os.PathLike[str], name: str, text: str) -> None:
    """Replaces the section between the markers of ``name`` in a Markdown file, or appends it."""
    target = Path(path)
    content = target.read_text() if target.is_file() else "# Results\n"
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{text.strip()}\n{end}"
    if begin in content and end in content:
        before, _, rest = content.partition(begin)
        content = before + block + rest.partition(end)[2]
    else:
        content = f"{content.rstrip()}\n\n{block}\n"
    aside = target.with_name(target.name + ".part")
    aside.write_text(content)
    os.replace(aside, target)


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" in _DECLARATIONS:
            yield f"{prefix}{key}", repr([_without_folders(entry) for entry in value])
        else:
            yield f"{prefix}{key}", repr(value)


def _without_folders(entry: dict[str, Any]) -> dict[str, Any]:
    """A declared dataset with the last parts of its paths."""
    return {
        field: os.path.basename(os.path.normpath(value)) if field in _PATHS else value for field, value in entry.items()
    }
