"""The results of finished runs, in a file of the repository, so that a grid can go on in another checkout."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import DONE, Job

from aqdet.utils.files import to_json, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
RUNS = "ablation_runs.json"
"""The file of the ablation, beside this module; other experiments have one of their own."""
STRIPPED, STATE = "model_final_stripped.pth", "model_final.pth"
"""Checkpoints of a run: the detector alone, and the one that another run starts from."""


def kept_runs(runs: str = RUNS) -> dict[str, dict[str, Any]]:
    """Returns date, machine, seconds, fingerprint and metrics of each run in the file ``runs``, by ``dataset name``."""
    path = ROOT / "tools" / "experiments" / runs
    return json.loads(path.read_text()) if path.is_file() else {}


def keep_runs(dataset: str, jobs: Sequence[Job], runs: str = RUNS) -> dict[str, dict[str, Any]]:
    """Adds the finished jobs to the file of kept runs, and returns all of these; see :func:`kept_runs`."""
    kept = kept_runs(runs)
    for job in jobs:
        noted = job.finished()
        if noted is not None:
            noted.pop("command")
            kept[f"{dataset} {job.name}"] = {**noted, "metrics": job.metrics()}
    write_text(ROOT / "tools" / "experiments" / runs, to_json(kept, indent=1, sort_keys=True) + "\n")
    return kept


def recall_runs(dataset: str, jobs: Sequence[Job], runs: str = RUNS) -> None:
    """Writes kept runs into their output folders, so that they are not run again.

    A run whose weights another one still needs is run again if they are not there: a start, a full-precision run that
    distillation learns from, or a detector that is still to be evaluated.

    Args:
        dataset: The dataset's name, as given to :func:`keep_runs`.
        jobs: The jobs of a grid; a job comes after its sources.
        runs: The file of kept runs.
    """
    kept = kept_runs(runs)
    for job in jobs:
        noted = kept.get(f"{dataset} {job.name}")
        if job.finished() is None and noted is not None and noted["fingerprint"] == job.fingerprint():
            folder = Path(job.output_dir)
            write_json(folder / "inference" / "metrics.json", noted["metrics"])
            facts = {key: value for key, value in noted.items() if key != "metrics"}
            write_json(folder / DONE, {**facts, "command": " ".join(job.command("tools/train_net.py"))})
    for job in reversed(jobs):
        for source in job.sources if job.finished() is None else ():
            files = (os.path.join(source.output_dir, name) for name in (STATE, STRIPPED))
            if any(path in job.overrides and not os.path.isfile(path) for path in files):
                Path(source.output_dir, DONE).unlink(missing_ok=True)
