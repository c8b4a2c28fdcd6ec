"""One HTML page about a run, or comparing several."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image

from ..analysis.histograms import SiteHistogram
from ..analysis.plan import PlanRow, total
from ..config import flatten
from ..evaluation.coco import COCO_LIMIT, LIMIT_KEY, METRICS
from . import svg
from .detections import FALSE, FOUND, MISSED, Outcome, f1, image_outcomes, precision_recall, rank_images
from .layer_facts import UNREADABLE, Inside, TestSet, collect_test_sets, limit_of, look_inside
from .page import chips, escape, grid, page, table
from .run_folder import Run, config_differences, series

MAX_CLASSES = 12
_COLUMNS = {2: 2, 3: 3, 5: 3, 6: 3}  # For this many pictures of one image; else 4.
PICTURE_SIDE = 640  # Pixels of the longer side, as embedded.
OUTCOME_COLOURS = {FOUND: "#1f6feb", FALSE: "#d9480f", MISSED: "#b4007f"}
_OUTCOME_TEXT = {FOUND: "found", FALSE: "false detection", MISSED: "missed object"}
_SITE_TEXT = {
    "weight_quantizer": "weight",
    "input_quantizer": "input",
    "quantizer": "shared tensor",
    "x_quantizer": "first operand",
    "y_quantizer": "second operand",
}
_METRIC_TEXT = {
    "AP": "AP, IoU 0.50 to 0.95",
    "AP50": "AP50, IoU 0.50",
    "AP75": "AP75, IoU 0.75",
    "APs": "APs, area up to 32² px",
    "APm": "APm, area 32² to 96² px",
    "APl": "APl, area from 96² px",
}


def make_report(runs: Sequence[Run], *, min_score: float = 0.5, num_pictures: int = 4, num_images: int = 4) -> str:
    """The page as text.

    Args:
        runs: see :func:`aqdet.report.load_runs`; the first is what the others are compared with. Their
            configs name devices that exist.
        min_score: of the detections that pictures show and that images are ranked by.
        num_pictures: how many of the worst and of the best images are shown.
        num_images: how many test images the activations are observed on.
    """
    sets = collect_test_sets(runs)
    insides = [look_inside(run, num_images) for run in runs]
    names = [run.name for run in runs]
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [
        ("Results", _results(runs, sets)),
        ("Training", _training(runs)),
        ("Precision and recall", _precision_recall(runs, sets)),
        ("Pictures", _pictures(runs, sets, min_score, num_pictures)),
        ("Layers", _layers(runs, insides)),
        ("Plan", _plan(runs, insides)),
        ("Config", _config(runs)),
    ]
    # The header last, when everything that is missing has been noted.
    return page(f"aqdet report: {title}", _header(runs), sections)


def _colours(runs: Sequence[Run]) -> list[str]:
    return [svg.colour(index) for index in range(len(runs))]


def _legend(runs: Sequence[Run]) -> str:
    return chips([run.name for run in runs], _colours(runs))


def _header(runs: Sequence[Run]) -> str:
    parts = [f'<p class="soft">Made {time.strftime("%Y-%m-%d %H:%M")}</p>']
    # Words of the first run's commands; what others have beside them is marked.
    known = {word for command in runs[0].commands for word in command.split(" ")}
    for run, colour in zip(runs, _colours(runs), strict=True):
        parts.append(f"<h3>{chips([run.name], [colour])}</h3>")
        done = [record["iteration"] for record in run.history]
        progress = ""
        if done and run.cfg is not None:
            progress = f" · {max(done) + ('total_loss' in run.history[-1]):,} of {run.cfg.SOLVER.MAX_ITER:,} iterations"
        parts.append(f'<p class="soft">Folder <code>{escape(run.path)}</code>{progress}</p>')
        parts.extend(f"<pre>{_marked(command, known)}</pre>" for command in run.commands)
        if run.notes:
            items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
            parts.append(f'<div class="notes">Missing or odd in this run:<ul>{items}</ul></div>')
    return "".join(parts)


def _marked(command: str, known: Collection[str]) -> str:
    """The command with the words that are not known marked."""
    if not known:
        return escape(command)
    words = command.split(" ")
    return " ".join(escape(word) if word in known else f"<mark>{escape(word)}</mark>" for word in words)


# --- numbers ---


def _results(runs: Sequence[Run], sets: Sequence[TestSet]) -> str:
    parts = []
    for test_set in sets:
        if not any(test_set.metrics):
            continue
        keys = dict.fromkeys(key for metrics in test_set.metrics if metrics for key in (*METRICS, *metrics))
        keys.pop(LIMIT_KEY, None)
        rows = [_result_row(key, test_set.metrics) for key in keys]
        first_class = next((key for key in keys if key not in METRICS), None)
        apart = ["apart" if key == first_class else "" for key in keys]
        parts.append(f"<h3>{escape(test_set.name or 'Test set')}</h3>")
        parts.append(table(["AP in percent", *(escape(run.name) for run in runs)], rows, row_classes=apart))
        limits = {run.name: limit_of(metrics) for run, metrics in zip(runs, test_set.metrics, strict=True) if metrics}
        if set(limits.values()) != {COCO_LIMIT}:
            text = ", ".join(f"{limit} ({escape(name)})" for name, limit in limits.items())
            parts.append(f'<p class="soft">Detections of an image that count, the best first: {text}.</p>')
    if parts and len(runs) > 1:
        parts.append(f'<p class="soft">Small: difference from {escape(runs[0].name)}. Bold: the best of a row.</p>')
    if parts:
        parts.append('<p class="soft">"-": no objects of that kind, or not evaluated.</p>')
    return "".join(parts)


def _result_row(key: str, metrics: Sequence[dict[str, float | None] | None]) -> list[str]:
    values = [(found or {}).get(key) for found in metrics]
    known = [v for v in values if v is not None]
    label = _METRIC_TEXT.get(key, key.replace("AP-", "AP, class ", 1))
    cells = [escape(label)]
    for index, value in enumerate(values):
        if value is None:
            cells.append("-")
            continue
        best = ' class="best"' if len(known) > 1 and value == max(known) else ""
        reference = values[0]
        difference = ""
        if index and reference is not None:
            difference = f" <small>{value - reference:+.1f}</small>"
        cells.append(f"<td{best}>{value:.1f}{difference}</td>")
    return cells


def _training(runs: Sequence[Run]) -> str:
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
            svg.Series(run.name, *series(run, key), colour) for run, colour in zip(runs, _colours(runs), strict=True)
        ]
        # A single AP, after the last iteration, is in the results.
        if max(len(line.x) for line in lines) > key.endswith("bbox/AP"):
            figures.append(
                svg.line_chart(lines, title=title, x_label="iteration", y_label=label, x_range=(0.0, 1.02 * end or 1.0))
            )
    if not figures:
        return ""
    text = "Losses are medians over the logging window. total_loss includes the auxiliary losses where there are any."
    return f'{_legend(runs)}<p class="soft">{text}</p>{grid(figures, 2)}'


def _precision_recall(runs: Sequence[Run], sets: Sequence[TestSet]) -> str:
    parts = []
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
        figures = []
        for title, iou, category_id in charts:
            lines = []
            for run, evaluation, colour in zip(runs, test_set.evaluations, _colours(runs), strict=True):
                curve = evaluation and precision_recall(evaluation, iou, category_id)
                if curve:
                    lines.append(svg.Series(run.name, curve[0].tolist(), curve[1].tolist(), colour))
            ends = (0.0, 1.0)
            figures.append(
                svg.line_chart(lines, title=title, x_label="recall", y_label="precision", x_range=ends, y_range=ends)
            )
        parts.append(f"<h3>{escape(test_set.name)}</h3>{grid(figures, 2)}")
        if len(with_objects) > len(classes):
            parts.append(
                f'<p class="soft">The {MAX_CLASSES} classes with the most objects; '
                f"{len(with_objects) - MAX_CLASSES} more are in the table of results.</p>"
            )
    text = "Precision as COCO interpolates it at 101 recalls: the best precision at that recall or above."
    return f'{_legend(runs)}<p class="soft">{text}</p>{"".join(parts)}' if parts else ""


# --- pictures ---


def _pictures(runs: Sequence[Run], sets: Sequence[TestSet], min_score: float, count: int) -> str:
    parts = []
    for number, test_set in enumerate(sets):
        shown = [(run, e) for run, e in zip(runs, test_set.evaluations, strict=True) if e is not None]
        if not shown or test_set.truth is None or not test_set.truth.imgs or count == 0:
            continue
        outcomes = [image_outcomes(evaluation, min_score) for _, evaluation in shown]
        ranked = rank_images(outcomes)
        worst = ranked[:count]
        best = ranked[max(count, len(ranked) - count) :][::-1]
        parts.append(f"<h3>{escape(test_set.name)}</h3>")
        for heading, chosen in (("Worst images", worst), ("Best images", best)):
            if chosen:
                parts.append(f"<h3>{heading}</h3>")
            for rank, (image_id, score) in enumerate(chosen):
                found = [(run, by_image[image_id]) for (run, _), by_image in zip(shown, outcomes, strict=True)]
                key = f"{heading.split()[0].lower()}-{number}-{rank}"
                parts.append(_picture_row(test_set, image_id, score, found, key))
    if not parts:
        return ""
    text = (
        f"Detections with a score of at least {min_score:g}; right at an IoU of 0.5 with an object of the class. "
        "Images are ordered by F1 = 2 found / (2 found + false + missed), the mean over the runs. "
        "Point at a box for its class and score."
    )
    legend = chips([_OUTCOME_TEXT[kind] for kind in OUTCOME_COLOURS], list(OUTCOME_COLOURS.values()), "legend")
    return f'<p class="soft">{text}</p>{legend}{"".join(parts)}'


def _picture_row(
    test_set: TestSet, image_id: int, score: float, found: Sequence[tuple[Run, Sequence[Outcome]]], key: str
) -> str:
    assert test_set.truth is not None
    record = test_set.truth.imgs[image_id]
    path = os.path.join(test_set.image_root, record["file_name"])
    title = f"{record['file_name']}: F1 {score:.2f}"
    try:
        if os.path.isabs(record["file_name"]) or os.path.normpath(record["file_name"]).startswith(os.pardir):
            raise ValueError("it is outside of the image root")
        width, height = int(record["width"]), int(record["height"])  # Of the annotations, which the boxes refer to.
        data = _jpeg(path)
    except UNREADABLE as error:
        for run, _ in found:
            run.note(f"no picture: {path} cannot be read: {' '.join(str(error).split())}")
        return f"<h4>{escape(title)}</h4><p>{escape(path)} cannot be read.</p>"
    image = f'<image id="{key}" width="{width}" height="{height}" preserveAspectRatio="none" href="{data}"/>'
    objects = [
        Outcome("truth", tuple(a["bbox"]), a["category_id"])
        for a in test_set.truth.imgToAnns.get(image_id, [])
        if not a.get("iscrowd")
    ]
    panels = [
        _panel(
            "ground truth", f"{len(objects)} object{'s' * (len(objects) != 1)}", objects, test_set, key, (width, height)
        )
    ]
    for run, outcomes in found:
        counts = [f"{sum(o.kind == kind for o in outcomes)} {kind}" for kind in (FOUND, FALSE, MISSED)]
        text = f"{', '.join(counts)}; F1 {f1(outcomes):.2f}"
        panels.append(_panel(run.name, text, outcomes, test_set, key, (width, height)))
    return (
        f'<h4>{escape(title)}</h4><svg class="defs" aria-hidden="true"><defs>{image}</defs></svg>'
        f"{grid(panels, _COLUMNS.get(len(panels), 4))}"
    )


def _panel(
    title: str, caption: str, outcomes: Sequence[Outcome], test_set: TestSet, key: str, size: tuple[int, int]
) -> str:
    """The image with a box for each outcome; classes are written where something is wrong, and for the truth."""
    width, height = size
    boxes, tags = [], []
    letter = max(size) / 34
    for outcome in sorted(outcomes, key=lambda o: -o.box[2] * o.box[3]):
        x, y, w, h = (round(v, 1) for v in outcome.box)
        colour = OUTCOME_COLOURS.get(outcome.kind, "#1a7f37")
        name = test_set.class_name(outcome.category_id)
        score = "" if outcome.score is None else f" {outcome.score:.2f}"
        kind = _OUTCOME_TEXT.get(outcome.kind, "object")
        boxes.append(
            f'<rect class="box {outcome.kind}" x="{x}" y="{y}" width="{w}" height="{h}" stroke="{colour}">'
            f"<title>{escape(f'{name}{score}: {kind}')}</title></rect>"
        )
        if outcome.kind != FOUND:
            tags.append(
                f'<text class="tag" x="{x + letter * 0.2:.1f}" y="{max(y + letter * 0.95, letter):.1f}" '
                f'style="font-size:{letter:.1f}px;fill:{colour}">{escape(name)}</text>'
            )
    content = f'<use href="#{key}"/>{"".join(boxes)}{"".join(tags)}'
    label = escape(f"{title}: {caption}")
    picture = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{content}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}<p>{escape(caption)}</p></figure>"


def _jpeg(path: str) -> str:
    """The image as a data URI, no larger than needed, upright as the evaluation reads it."""
    image = Image.fromarray(np.asarray(read_image(path, format="RGB"), dtype=np.uint8))
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


# --- layers ---


def _describe(histogram: SiteHistogram) -> str:
    spec = histogram.spec
    sign = "signed" if spec.signed else "unsigned"
    return f"{spec.quantizer}, {spec.num_bits} bits {sign}" + ", per channel" * spec.per_channel


def _brief(histogram: SiteHistogram) -> str:
    """As in the plan, e.g. ``lsq s4/ch``."""
    spec = histogram.spec
    return f"{spec.quantizer} {'s' if spec.signed else 'u'}{spec.num_bits}" + "/ch" * spec.per_channel


def _share(value: float | None) -> str:
    if value is None or value == 0:
        return "-" if value is None else "0"
    return f"{100 * value:.2f} %" if value >= 5e-5 else "<0.01 %"


def _caption(histogram: SiteHistogram) -> str:
    parts = [_describe(histogram)]
    if histogram.below is not None and histogram.above is not None:
        parts.append(f"clipped below {_share(histogram.below)}, above {_share(histogram.above)}")
    else:
        parts.append("no clipping range")
    if histogram.used is not None:
        parts.append(f"{histogram.used} of {2**histogram.spec.num_bits} levels used")
    return "; ".join(parts)


def _layers(runs: Sequence[Run], insides: Sequence[Inside]) -> str:
    shown = [
        (run, inside, colour)
        for run, inside, colour in zip(runs, insides, _colours(runs), strict=True)
        if inside.weights or inside.activations
    ]
    if not shown:
        return ""
    layers: dict[str, list[str]] = {}
    for path in dict.fromkeys(path for _, inside, _ in shown for path in _in_order(inside)):
        layers.setdefault(path.rpartition(".")[0], []).append(path)
    rows, blocks = [], []
    for layer, paths in layers.items():
        figures = []
        for path in paths:
            row = [f'<td class="path">{escape(path)}</td>']
            for run, inside, colour in shown:
                histogram = inside.weights.get(path) or inside.activations.get(path)
                if histogram is None:
                    row += ["-"] * 4
                    continue
                used = "-" if histogram.used is None else f"{histogram.used}/{2**histogram.spec.num_bits}"
                row += [
                    escape(_brief(histogram)),
                    escape(_share(histogram.below)),
                    escape(_share(histogram.above)),
                    used,
                ]
                title = _SITE_TEXT.get(path.rpartition(".")[2], path) + f", {run.name}" * (len(runs) > 1)
                figures.append(svg.histogram_chart(histogram, title=title, caption=_caption(histogram), colour=colour))
            rows.append(row)
        columns = {1: 2, 3: 3}.get(len(shown), 4)
        blocks.append(f'<div class="layer"><h4>{escape(layer)}</h4>{grid(figures, columns)}</div>')
    header = ["quantizer"]
    for run, _, _ in shown:
        header += [escape(run.name), "below", "above", "levels"]
    text = (
        "Values in units of the quantization step, so that levels are integers, or as the axis says where a method "
        "has no uniform step. Levels are dashed; of more than 32 only the outermost. Shares are on a logarithmic axis; "
        "values beyond the axis are in its first and last bin. Clipped: outside the outermost levels; what an unsigned "
        "activation quantizer clips below zero is the work of the ReLU. "
        f"Activations are those of {shown[0][1].num_images} test images."
    )
    return (
        f'{_legend([run for run, _, _ in shown]) if len(shown) == len(runs) else ""}<p class="soft">{text}</p>'
        f"<details><summary>Table of {len(rows)} quantizers: shares clipped below and above, levels used</summary>"
        f"{table(header, rows)}</details>" + (grid(blocks, 2) if len(shown) == 1 else "".join(blocks))
    )


def _in_order(inside: Inside) -> Iterator[str]:
    """Paths of quantizers by layer, as the plan lists the layers; each layer's weight first."""
    paths = [*inside.weights, *inside.activations]
    order = {row.name: index for index, row in enumerate(inside.rows)}
    yield from sorted(
        paths, key=lambda path: (order.get(path.rpartition(".")[0], len(order)), path not in inside.weights)
    )


def _plan(runs: Sequence[Run], insides: Sequence[Inside]) -> str:
    shown = [(run, inside) for run, inside in zip(runs, insides, strict=True) if inside.rows]
    if not shown:
        return ""
    totals = []
    for run, inside in shown:
        t = total(inside.rows, "float", "quantized")
        totals.append(
            [
                escape(run.name),
                f"{inside.size[0]} x {inside.size[1]}",
                f"{t.layers}",
                f"{t.parameters:,}",
                f"{t.weight_bytes / 1e6:.2f}",
                f"{t.macs / 1e9:.2f}",
                f"{t.bit_ops / 1e9:,.0f}",
            ]
        )
    header = ["detector as shipped", "image, px", "convs", "parameters", "weights, MB", "GMACs", "Gbit-ops"]
    parts = [table(header, totals)]
    tables = [{row.name: row for row in inside.rows} for _, inside in shown]
    rows = []
    quantized = [any(row.part == "quantized" for row in inside.rows) for _, inside in shown]
    for path in dict.fromkeys(path for by_path in tables for path in by_path):
        first = next(by_path[path] for by_path in tables if path in by_path)
        cells = [_plan_cell(by_path.get(path)) for by_path in tables]
        compared = {cell for cell, included in zip(cells, quantized, strict=True) if included}
        kind = "left differs" if len(compared) > 1 else "left"
        rows.append(
            [
                f'<td class="path">{escape(path)}</td>',
                f'<td class="left">{escape(first.kind)}</td>',
                f'<td class="left">{escape(first.norm)}</td>',
                f"{first.parameters:,}" if first.parameters else "-",
                f"{first.macs / 1e6:,.1f}" if first.macs else "-",
                *(f'<td class="{kind}">{escape(cell)}</td>' for cell in cells),
            ]
        )
    names = [f'<th class="left">{escape(run.name)}</th>' for run, _ in shown]
    header = ["layer", '<th class="left">kind</th>', '<th class="left">norm</th>', "parameters", "MMACs", *names]
    listing = table(header, rows)
    parts.append(f"<details><summary>{len(rows)} layers and shared tensors</summary>{listing}</details>")
    text = "Quantizers of weights · input: method, bits (u unsigned, s signed), /ch for a scale for each channel."
    marked = " Marked: what differs between the quantized detectors." * (sum(quantized) > 1)
    parts.append(f'<p class="soft">{text}{marked}</p>')
    return "".join(parts)


def _plan_cell(row: PlanRow | None) -> str:
    if row is None:
        return "-"
    return row.input if row.weight == "-" else f"{row.weight} · {row.input}"


def _config(runs: Sequence[Run]) -> str:
    known = [(run, run.cfg) for run in runs if run.cfg is not None]
    parts = []
    if len(known) > 1:
        differences = config_differences([cfg for _, cfg in known])
        rows = []
        for key, values in differences:
            row = [f'<td class="path">{escape(key)}</td>']
            for value in values:
                kind = "code" if value == values[0] else "code differs"
                row.append(f'<td class="{kind}">{escape(value)}</td>')
            rows.append(row)
        names = [f'<th class="left">{escape(run.name)}</th>' for run, _ in known]
        text = f"Keys that differ; marked: not as in {known[0][0].name}." if rows else "The configs are the same."
        parts.append(f"<p>{escape(text)}</p>")
        if rows:
            parts.append(table(["key", *names], rows))
    for run, cfg in known:
        lines = "\n".join(f"{key}: {value!r}" for key, value in flatten(cfg))
        parts.append(
            f"<details><summary>Whole config of {escape(run.name)}</summary><pre>{escape(lines)}</pre></details>"
        )
    return "".join(parts)
