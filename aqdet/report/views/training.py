"""Curves of the training: AP on the way, losses and learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from .. import svg
from ..run_folder import Run, series
from .table import legend_of


def training(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Returns the curves, or None if nothing was trained."""
    keys = list(dict.fromkeys(key for run in runs for record in run.history for key in record))
    charts = [
        (key, f"{key[:-7]}AP on the test set".lstrip("/"), "AP, percent") for key in keys if key.endswith("bbox/AP")
    ]
    for start in ("total_loss", "loss_", "aux_loss_"):
        charts += [(key, key, "loss") for key in sorted(keys) if key.startswith(start)]
    charts += [("lr", "lr", "learning rate")] * ("lr" in keys)
    end = max((record["iteration"] for run in runs for record in run.history), default=0)
    figures = []
    for key, title, label in charts:
        lines = [
            svg.Series(run.name, *series(run, key), entry.colour)
            for run, entry in zip(runs, legend_of(runs), strict=True)
        ]
        # A single AP, after the last iteration, is in the results.
        if max(len(line.x) for line in lines) > key.endswith("bbox/AP"):
            ends = (0.0, 1.02 * end or 1.0)
            figures.append(Markup(svg.line_chart(lines, title=title, x_label="iteration", y_label=label, x_range=ends)))
    return {"legend": legend_of(runs), "figures": figures} if figures else None
