"""Tables of AP, and curves of precision over recall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ...evaluation.coco import COCO_LIMIT, LIMIT_KEY, METRICS
from .. import svg
from ..detections import precision_recall
from ..evaluation_results import TestSet, limit_of
from ..resampling import DRAWS, interval, resampled_ap
from ..run_folder import Run
from .table import Cell, Row, Table, cells_of, legend_of

MAX_CLASSES = 12
_METRIC_TEXT = {
    "AP": "AP, IoU 0.50 to 0.95",
    "AP50": "AP50, IoU 0.50",
    "AP75": "AP75, IoU 0.75",
    "APs": "APs, area up to 32² px",
    "APm": "APm, area 32² to 96² px",
    "APl": "APl, area from 96² px",
}
_TASK_TEXT = {"segm": "masks", "keypoints": "keypoints"}
"""Tasks beside boxes: beginning of a metric's name -> text of the task."""


def results(runs: Sequence[Run], sets: Sequence[TestSet]) -> dict[str, Any] | None:
    """Returns a table of AP for each test set, or None if nothing was evaluated."""
    tables = []
    for test_set in sets:
        if not any(test_set.metrics):
            continue
        keys = dict.fromkeys(key for metrics in test_set.metrics if metrics for key in (*METRICS, *metrics))
        keys.pop(LIMIT_KEY, None)
        apart = {next((key for key in keys if key not in METRICS), ""), *(f"{task} AP" for task in _TASK_TEXT)}
        rows = [Row(_cells(key, test_set.metrics), "apart" if key in apart else "") for key in keys]
        resampled = _resampled(test_set)
        if resampled is not None:
            rows.insert(list(keys).index("AP") + 1 if "AP" in keys else 0, resampled)
        limits = {run.name: limit_of(metrics) for run, metrics in zip(runs, test_set.metrics, strict=True) if metrics}
        text = ", ".join(f"{limit} ({name})" for name, limit in limits.items())
        tables.append(
            {
                "name": test_set.name or "Test set",
                "table": Table(cells_of("AP in percent", *(run.name for run in runs)), rows),
                "limits": ""
                if set(limits.values()) == {COCO_LIMIT}
                else f"Detections of an image that count, the best first: {text}.",
                "resampled": resampled is not None,
            }
        )
    return {"sets": tables, "reference": runs[0].name if len(runs) > 1 else "", "draws": DRAWS} if tables else None


def _resampled(test_set: TestSet) -> Row | None:
    """Returns a row with the range of AP over draws of the images, and of the difference from the first run."""
    known = [evaluation for evaluation in test_set.evaluations if evaluation is not None]
    if not known:
        return None
    draws = iter(resampled_ap(known))
    drawn = [None if evaluation is None else next(draws) for evaluation in test_set.evaluations]
    cells = [Cell("AP, 90 % of draws of the images")]
    for index, values in enumerate(drawn):
        ends = None if values is None else interval(values)
        if values is None or ends is None:
            cells.append(Cell("-"))
            continue
        apart = interval(values - drawn[0]) if index and drawn[0] is not None else None
        cells.append(
            Cell(f"{ends[0]:.1f} to {ends[1]:.1f}", small=f"{apart[0]:+.1f} to {apart[1]:+.1f}" if apart else "")
        )
    return Row(cells)


def _cells(key: str, metrics: Sequence[dict[str, float | None] | None]) -> list[Cell]:
    values = [(found or {}).get(key) for found in metrics]
    known = [value for value in values if value is not None]
    cells = [Cell(_label(key))]
    for index, value in enumerate(values):
        if value is None:
            cells.append(Cell("-"))
            continue
        kind = "best" if len(known) > 1 and value == max(known) else ""
        reference = values[0]
        difference = f"{value - reference:+.1f}" if index and reference is not None else ""
        cells.append(Cell(f"{value:.1f}", kind, difference))
    return cells


def _label(key: str) -> str:
    for task, text in _TASK_TEXT.items():
        if key.startswith(f"{task} "):
            return f"{text}: {_label(key.removeprefix(f'{task} '))}"
    return _METRIC_TEXT.get(key, key.replace("AP-", "AP, class ", 1))


def precision_and_recall(runs: Sequence[Run], sets: Sequence[TestSet]) -> dict[str, Any] | None:
    """Returns the curves of each test set, or None if there are no detections."""
    shown = []
    for test_set in sets:
        if test_set.truth is None or not any(test_set.evaluations):
            continue
        counts = {key: len(test_set.truth.getAnnIds(catIds=[key], iscrowd=False)) for key in test_set.truth.cats}
        with_objects = [key for key in counts if counts[key]]
        classes = sorted(with_objects, key=lambda key: -counts[key])[:MAX_CLASSES]
        charts: list[tuple[str, float, int | None]] = [
            (f"mean over classes, IoU {iou}", iou, None) for iou in (0.5, 0.75)
        ]
        charts += [(f"{test_set.class_name(key)} ({counts[key]:,} objects), IoU 0.5", 0.5, key) for key in classes]
        shown.append(
            {
                "name": test_set.name,
                "figures": [_curves(runs, test_set, title, iou, category_id) for title, iou, category_id in charts],
                "shown": len(classes),
                "left_out": len(with_objects) - len(classes),
            }
        )
    return {"legend": legend_of(runs), "sets": shown} if shown else None


def _curves(runs: Sequence[Run], test_set: TestSet, title: str, iou: float, category_id: int | None) -> Markup:
    lines = []
    for entry, evaluation in zip(legend_of(runs), test_set.evaluations, strict=True):
        curve = evaluation and precision_recall(evaluation, iou, category_id)
        if curve:
            lines.append(svg.Series(entry.name, curve[0].tolist(), curve[1].tolist(), entry.colour))
    ends = (0.0, 1.0)
    return Markup(svg.line_chart(lines, title=title, x_label="recall", y_label="precision", x_range=ends, y_range=ends))
