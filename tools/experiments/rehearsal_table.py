"""The table and the plot of the rehearsals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rehearse import Row, Run

TOLERANCE = 1.0
"""A config that is more AP than this below the best solver is wrong."""


def ap_of(noted: dict[str, Any]) -> float:
    """Returns the AP of a run, or a classifier's top-1, in percent; 0 where nothing was found or a loss not finite."""
    metrics = noted["metrics"]
    return metrics.get("top1", metrics.get("AP")) or 0.0


def make_table(rows: Sequence[Row], done: dict[Run, dict[str, Any]]) -> tuple[list[list[str]], list[str]]:
    """Returns the table's rows, and by name of a row how many of its runs are still to be done."""
    table, missing = [], []
    for row in rows:
        name = row.config.partition("/")[2] + f" at {row.bits} bits" * bool(row.bits)
        runs = [run for run in (row.own, row.continued, *row.others) if run is not None]
        absent = sum(run not in done for run in runs)
        missing += [f"{name} ({absent} of {len(runs)})"] * bool(absent)
        if row.own not in done:
            continue
        own = ap_of(done[row.own])
        found = {run: ap_of(done[run]) for run in (row.own, *row.others) if run in done}
        best = max(found, key=lambda run: found[run])
        full = ap_of(done[row.continued]) if row.continued in done else None
        behind = found[best] - own
        verdict = "-" if len(found) == 1 else f"{behind:.1f}" + " (wrong)" * (behind > TOLERANCE)
        others = ", ".join(f"{run.solver} {found[run]:.1f}" for run in row.others if run in found)
        cells = [name, str(row.own.solver), f"{own:.1f}", "-" if full is None else f"{full:.1f}"]
        table.append([*cells, others or "-", verdict])
    return table, missing


def make_plot(path: Path, rows: Sequence[Row], done: dict[Run, dict[str, Any]]) -> None:
    """Draws a line for each row: a dot for each solver, and a larger one for the config's own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from aqdet.utils.files import replacing

    shown = [row for row in rows if row.own in done]
    if not shown:
        return
    figure, ax = plt.subplots(figsize=(8, 0.4 * len(shown) + 1), layout="constrained")
    series: dict[str, list[tuple[float, int]]] = {}
    for line, row in enumerate(shown):
        series.setdefault("the config's own solver", []).append((ap_of(done[row.own]), line))
        for run in row.others:
            if run in done:
                series.setdefault(f"other {run.solver.optimizer}", []).append((ap_of(done[run]), line))
        if row.continued in done:
            series.setdefault("full precision as long", []).append((ap_of(done[row.continued]), line))
    marks = {"the config's own solver": ("o", "black", 70), "full precision as long": ("|", "grey", 200)}
    for name, points in series.items():
        marker, colour, size = marks.get(name, ("o", "tab:blue" if name.endswith("AdamW") else "tab:orange", 25))
        aps, lines = zip(*points, strict=True)
        ax.scatter(aps, lines, s=size, marker=marker, color=colour, alpha=0.8, label=name)
    labels = [row.config.partition("/")[2] + f", {row.bits} bits" * bool(row.bits) for row in shown]
    ax.set_yticks(range(len(shown)), labels)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    ax.set_xlabel("AP (resnet: top-1) of the detector alone at the end, in percent")
    ax.legend(fontsize="small")
    with replacing(path, keep_ending=True) as aside:
        figure.savefig(aside, dpi=120)
    plt.close(figure)
