"""The head of a report: folder, length, commands and notes of each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..run_folder import Run
from .table import legend_of


def header(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the head of each run, with the notes taken so far."""
    # Words of the other commands that the first run's command does not have are marked.
    known = {word for command in runs[0].commands for word in command.split(" ")}
    return [
        {
            "legend": entry,
            "folder": run.path,
            "facts": _facts(run),
            "commands": [
                [{"text": word, "is_marked": bool(known) and word not in known} for word in command.split(" ")]
                for command in run.commands
            ],
            "notes": list(run.notes),
        }
        for run, entry in zip(runs, legend_of(runs), strict=True)
    ]


def _facts(run: Run) -> list[str]:
    facts = []
    done = [record["iteration"] for record in run.history]
    if run.is_post_training():
        facts.append("post-training quantization: calibrated, no iteration trained")
    elif done and run.cfg is not None:
        count = max(done) + ("total_loss" in run.history[-1])
        facts.append(f"{count:,} of {run.cfg.SOLVER.MAX_ITER:,} iterations")
    evaluated = run.evaluation.get("weights")
    if not evaluated and isinstance(run.evaluation.get("iterations"), int):
        evaluated = f"iteration {run.evaluation['iterations']:,}"
    if evaluated:
        date = run.evaluation.get("date")
        facts.append(f"results of {evaluated}" + (f", {date}" if date else ""))
    return facts
