"""``report.md``, the text of an export's measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .agreement import EXECUTIONS, Difference


def agreement_totals(agreement: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the sums over the codes of each execution."""
    totals = []
    for execution in _executions(agreement):
        found = [Difference(**entry) for entry in agreement["values"] if entry["execution"] == execution]
        codes = [d for d in found if not d.is_prediction]
        totals.append(
            {
                "execution": execution,
                "codes": sum(d.count for d in codes),
                "local": sum(d.local for d in codes),
                "whole": sum(d.whole for d in codes),
                "largest": max((d.largest for d in codes), default=0),
                "unexplained": sum(d.unexplained for d in codes),
                "largest_prediction": max((d.largest for d in found if d.is_prediction), default=0),
            }
        )
    return totals


def _executions(agreement: dict[str, Any]) -> list[str]:
    """Returns the executions that were compared, in order."""
    names = {entry["execution"] for entry in agreement["values"]}
    return [execution for execution in EXECUTIONS if execution in names]


def markdown(report: dict[str, Any]) -> str:
    """Returns ``report.md``: sizes, types, bounds and agreement."""
    sizes, worst, agreement = report["sizes"], report["tightest"], report["agreement"]
    lines = ["# Exported detector", "", "## Size", "", "| | bytes |", "|---|---|"]
    named = {name.replace("float32_state_dict", "weights in float32"): size for name, size in sizes.items()}
    lines += [f"| {name} | {size:,} |" for name, size in named.items() if name != "ratio"]
    lines += ["", f"What aqdet.runtime executes has 1/{sizes['ratio']:.2f} of the weights in float32."]
    if "c" in report:
        plain = report["c"]
        lines += [
            "",
            f"detector.c, for {plain['size']}x{plain['size']} pixels: {plain['arena']:,} bytes of RAM in static "
            f"buffers, {plain['outputs']:,} for the predictions, {plain['flash']:,} of constants (flash) beside code.",
        ]
    executed = ", ".join(f"{count} {kind}" for kind, count in report["executed"].items())
    moves = [row["largest_move"] for row in report["operations"] if "largest_move" in row]
    lines += [
        "",
        "## Operations",
        "",
        f"ONNX Runtime {report['onnxruntime']} executes {executed}. Float only after a prediction's int32 sums.",
        "",
        f"Tightest int32 sum: {worst['layer']} {worst['level']} with at most {worst['accumulator_bound']:,}, "
        f"{(2**31 - 1) / worst['accumulator_bound']:.1f} times less than int32 holds.",
        "",
        f"Scales of {len(moves)} sums are chosen so that no pair of codes is a rounding tie, which moves a sum by at "
        f"most {max(moves, default=0):.3f} codes.",
        "",
        "| operation | kind | types | sum at most, by bits | by codes |",
        "|---|---|---|---|---|",
    ]
    for row in report["operations"]:
        bounds = ["", ""]
        if row["kind"] == "conv":
            bounds = [f"{row['accumulator_bound_by_bits']:,}", f"{row['accumulator_bound']:,}"]
        lines.append(f"| {row['output']} | {row['kind']} | {row['types']} | {bounds[0]} | {bounds[1]} |")
    if evaluation := report.get("evaluation"):
        lines += evaluation_lines(evaluation)
    source = "a random image" if agreement["random"] else f"{agreement['images']} images"
    lines += [
        "",
        f"## Agreement with the integer reference, on {source}",
        "",
        "local: codes that differ where the reference is given the execution's own inputs; not explained: those that",
        "nothing excuses, which a rounding tie does in what computes in float32. whole: codes that differ from the",
        "image on; an early one changes what follows.",
        "",
        "| execution | codes | local | not explained | largest | whole | predictions, largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for total in agreement_totals(agreement):
        lines.append(
            f"| {total['execution']} | {total['codes']:,} | {_share(total['local'], total['codes'])} "
            f"| {total['unexplained']} | {total['largest']:g} | {_share(total['whole'], total['codes'])} "
            f"| {total['largest_prediction']:.1e} |"
        )
    executions = _executions(agreement)
    lines += ["", "Local differences by value:", "", f"| value | {' | '.join(executions)} |"]
    lines.append("|---" * (1 + len(executions)) + "|")
    by_value: dict[str, dict[str, Difference]] = {}
    for entry in agreement["values"]:
        difference = Difference(**entry)
        by_value.setdefault(difference.value, {})[difference.execution] = difference
    for value, found in by_value.items():
        cells = [_cell(found.get(execution)) for execution in executions]
        lines.append(f"| {value} | {' | '.join(cells)} |")
    lines += range_lines(report.get("ranges", {}), report.get("warnings", ()))
    return "\n".join(lines) + "\n"


def evaluation_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """Returns lines on the AP of the trained and the exported model, and on their detections."""
    lines = ["", f"## On {evaluation['dataset']}, {evaluation['images']} images", ""]
    # A detector quantized without training has a float model beside it, and is not called "trained".
    start = ["float", "quantized"] if "float_detections" in evaluation else ["trained"]
    columns = [*start, "in the arithmetic that ships", "exported", f"exported - {start[-1]}"]
    lines += [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    keys = [*["float"] * (len(start) - 1), "trained", "shipped", "exported"]
    for name, values in evaluation["metrics"].items():
        cells = ["-" if v is None else f"{v:.2f}" for v in (values[key] for key in keys)]
        difference = values["difference"]
        lines.append(f"| {name} | {' | '.join(cells)} | {'-' if difference is None else f'{difference:+.2f}'} |")
    shipped = evaluation["shipped_detections"]
    if "float_detections" in evaluation:
        lines += ["", detections_line(evaluation["float_detections"], "float")]
    lines += ["", detections_line(evaluation["detections"], start[-1])]
    if not shipped["trained"]:
        return lines
    return [
        *lines,
        f"In the arithmetic that ships (the program's integers, executed by torch) the {start[-1]} model has "
        f"{shipped['trained']} such detections, {shipped['matched']} of them exported too; scores differ by "
        f"{shipped['mean_score_difference']:.1e} on average, {shipped['largest_score_difference']:.1e} at most. The "
        f"{start[-1]} model and this one differ by rounding alone.",
    ]


def detections_line(detections: Mapping[str, Any], model: str = "trained") -> str:
    """Returns a line on the matched detections of two models, their scores, and the threshold with equal recall."""
    if not detections["trained"]:
        return (
            f"The {model} model has no detection with a score of at least 0.5 (the exported one has "
            f"{detections['exported']}), so that none are compared."
        )
    text = (
        f"Of the {model} model's {detections['trained']} detections with a score of at least 0.5, the exported one has "
        f"{detections['matched']} too (it has {detections['exported']}); their scores differ by "
        f"{detections['mean_score_difference']:.3f} on average, {detections['largest_score_difference']:.3f} at most."
    )
    if detections["threshold"] is not None:
        text += (
            f" The {model} model's recall at 0.5, {detections['recall']:.3f}, is the exported one's at a threshold of "
            f"{detections['threshold']:.3f}."
        )
    return text


def range_lines(ranges: Mapping[str, Any], warnings: Sequence[str]) -> list[str]:
    """Returns lines on how much of each quantizer's range is used."""
    if not ranges:
        return ["", "## Ranges", "", "Not measured: neither --images nor the training set were at hand."]
    lines = ["", "## Ranges", "", *[f"Warning: {warning}" for warning in warnings], *[""] * bool(warnings)]
    lines += ["Share of the codes other than zero that are clipped, and of the range that is used.", ""]
    lines += [f"| quantizer |{''.join(f' clipped, {name} | used, {name} |' for name in ranges)}"]
    lines.append("|---" * (1 + 2 * len(ranges)) + "|")
    for rows in zip(*ranges.values(), strict=True):
        cells = "".join(f" {row['clipped']:.3f} | {row['used']:.2f} |" for row in rows)
        lines.append(f"| {rows[0]['name']} |{cells}")
    return lines


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    if difference.is_prediction:
        return f"{difference.largest:.1e} largest"
    return _share(difference.local, difference.count)


def _share(part: int, whole: int) -> str:
    return "0" if part == 0 else f"{part / whole:.1e}"
