"""The configs: the keys that differ, and each as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...config import flatten
from ..run_folder import Run, config_differences
from .table import Cell, Row, Table, cells_of


def config(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Returns the differences and the whole configs, or None if no run has a config."""
    known = [(run.name, run.cfg) for run in runs if run.cfg is not None]
    if not known:
        return None
    whole = [
        {"name": name, "text": "\n".join(f"{key}: {value!r}" for key, value in flatten(cfg))} for name, cfg in known
    ]
    if len(known) == 1:
        return {"configs": whole, "differences": None}
    rows = [
        Row([Cell(key, "path"), *(Cell(v, "code" if v == values[0] else "code differs") for v in values)])
        for key, values in config_differences([cfg for _, cfg in known])
    ]
    header = cells_of("key", *(Cell(name, "left") for name, _ in known))
    text = f"Keys that differ; marked: not as in {known[0][0]}." if rows else "The configs are the same."
    return {"configs": whole, "differences": {"text": text, "table": Table(header, rows)}}
