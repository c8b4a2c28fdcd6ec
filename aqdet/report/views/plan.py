"""The plans of the detectors, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...analysis.plan import PlanRow, total
from ..layer_facts import LayerFacts
from ..run_folder import Run
from .table import Cell, Row, Table, cells_of, row_of


def plan(runs: Sequence[Run], facts: Sequence[LayerFacts]) -> dict[str, Any] | None:
    """Returns the totals of each detector and its layers, or None if no run has a plan."""
    shown = [(run, each) for run, each in zip(runs, facts, strict=True) if each.rows]
    if not shown:
        return None
    totals = []
    for run, each in shown:
        sums = total(each.rows, "float", "quantized")
        totals.append(
            row_of(
                run.name,
                f"{each.size[0]} x {each.size[1]}",
                f"{sums.layers}",
                f"{sums.parameters:,}",
                f"{sums.weight_bytes / 1e6:.2f}",
                f"{sums.macs / 1e9:.2f}",
                f"{sums.bit_ops / 1e9:,.0f}",
            )
        )
    header = cells_of("detector as shipped", "image, px", "convs", "parameters", "weights, MB", "GMACs", "Gbit-ops")
    are_quantized = [any(row.part == "quantized" for row in each.rows) for _, each in shown]
    return {
        "totals": Table(header, totals),
        "layers": _layers([run.name for run, _ in shown], [each for _, each in shown], are_quantized),
        "are_compared": sum(are_quantized) > 1,
    }


def _layers(names: Sequence[str], facts: Sequence[LayerFacts], are_quantized: Sequence[bool]) -> Table:
    tables = [{row.name: row for row in each.rows} for each in facts]
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        first = next(table[name] for table in tables if name in table)
        texts = [_text(table.get(name)) for table in tables]
        compared = {text for text, included in zip(texts, are_quantized, strict=True) if included}
        kind = "left differs" if len(compared) > 1 else "left"
        cells = cells_of(
            Cell(name, "path"),
            Cell(first.kind, "left"),
            Cell(first.norm, "left"),
            f"{first.parameters:,}" if first.parameters else "-",
            f"{first.macs / 1e6:,.1f}" if first.macs else "-",
        )
        rows.append(Row([*cells, *(Cell(text, kind) for text in texts)]))
    left = [Cell("kind", "left"), Cell("norm", "left")]
    header = cells_of("layer", *left, "parameters", "MMACs", *(Cell(name, "left") for name in names))
    return Table(header, rows)


def _text(row: PlanRow | None) -> str:
    if row is None:
        return "-"
    return row.input if row.weight == "-" else f"{row.weight} · {row.input}"
