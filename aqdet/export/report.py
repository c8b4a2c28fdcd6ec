"""``report.md``: what an export measured, as text."""

from __future__ import annotations

from typing import Any

from .agreement import EXECUTIONS, Difference


def agreement_totals(agreement: dict[str, Any]) -> list[dict[str, Any]]:
    """Sums over the codes of each execution."""
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
    """Those that were compared, in order."""
    names = {entry["execution"] for entry in agreement["values"]}
    return [execution for execution in EXECUTIONS if execution in names]


def markdown(report: dict[str, Any]) -> str:
    """``report.md``: sizes, types, bounds and agreement."""
    sizes, worst, agreement = report["sizes"], report["tightest"], report["agreement"]
    lines = ["# Exported detector", "", "## Size", "", "| | bytes | of float32 |", "|---|---|---|"]
    for name, size in sizes.items():
        if name != "ratio":
            lines.append(f"| {name} | {size:,} | 1/{sizes['float32_state_dict'] / size:.2f} |")
    executed = ", ".join(f"{count} {kind}" for kind, count in report["executed"].items())
    lines += [
        "",
        "## Operations",
        "",
        f"ONNX Runtime {report['onnxruntime']} executes {executed}. Float only after a prediction's int32 sums.",
        "",
        f"Tightest int32 sum: {worst['path']} {worst['level']} with at most {worst['accumulator_bound']:,}, "
        f"{(2**31 - 1) / worst['accumulator_bound']:.1f} times less than int32 holds.",
        "",
        "| operation | kind | types | sum at most, by bits | by codes |",
        "|---|---|---|---|---|",
    ]
    for row in report["operations"]:
        bounds = ["", ""]
        if row["kind"] == "conv":
            bounds = [f"{row['accumulator_bound_by_bits']:,}", f"{row['accumulator_bound']:,}"]
        lines.append(f"| {row['output']} | {row['kind']} | {row['types']} | {bounds[0]} | {bounds[1]} |")
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
    return "\n".join(lines) + "\n"


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    if difference.is_prediction:
        return f"{difference.largest:.1e} largest"
    return _share(difference.local, difference.count)


def _share(part: int, whole: int) -> str:
    return "0" if part == 0 else f"{part / whole:.1e}"
