"""The ablation's table, its plot, and its section of RESULTS.md."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ablation_grid import BASELINE, BITS, FLOAT, START, WIDTH, Cell, chosen, is_usual, part_name
from ablation_jobs import evaluations, learning_rates
from jobs import Job
from kept_runs import keep_runs
from results_file import LEFT_OUT, kept_remark, markdown_table, mean_and_spread, write_section

from aqdet.utils.files import replacing

ROOT = Path(__file__).resolve().parents[2]
PLOTS = "plots"
TITLES = {
    "shapes": "the embedded dataset, 192x192",
    "bccd": "BCCD (205 images to train), 320x240",
    "cards": "photographs of playing cards (236 to train), 320x240",
}
IMAGES = {"shapes": {"val": 200, "test": 2000}, "bccd": {"val": 87, "test": 72}, "cards": {"val": 60, "test": 67}}
"""Number of images of each split."""


def make_rows(
    seeds: Sequence[int], cells: Sequence[Cell], done: dict[tuple[int, Cell], dict[str, Any]]
) -> list[list[str]]:
    """Returns the rows of the Markdown table; a cell without a finished run has none.

    Args:
        seeds: The seeds to average over.
        cells: The rows in their order.
        done: Metrics of the finished runs, by seed and cell.
    """

    def values(cell: Cell, key: str = "AP") -> dict[int, float]:
        return {s: done[s, cell][key] for s in seeds if (s, cell) in done and done[s, cell][key] is not None}

    def paired(cell: Cell, other: Cell) -> str:
        a, b = values(cell), values(other)
        if cell == other or not set(a) & set(b):
            return "-"
        return mean_and_spread([a[s] - b[s] for s in seeds if s in a and s in b])

    rows = []
    for cell in cells:
        found = values(cell)
        if not found:
            continue
        baseline = dataclasses.replace(cell, method=BASELINE)
        rows.append(
            [
                cell.detector,
                cell.quantizer if cell.quantizer == FLOAT else f"{cell.quantizer} w{cell.bits}a{cell.bits}",
                "-" if cell == cell.reference else cell.method.replace("+", " + "),
                mean_and_spread(list(found.values())),
                mean_and_spread(list(values(cell, "AP50").values())),
                paired(cell, baseline),
                paired(cell, cell.reference),
                paired(cell, cell.same_start),
                ", ".join(f"{ap:.1f}" for ap in found.values()),
            ]
        )
    return rows


def make_plot(
    path: str, seeds: Sequence[int], cells: Sequence[Cell], done: dict[tuple[int, Cell], dict[str, Any]]
) -> None:
    """Draws AP by method: a panel for each detector and quantizer, with a dot for each seed and a bar for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        if cell.quantizer != FLOAT and any((s, cell) in done for s in seeds):
            panels.setdefault((cell.detector, cell.quantizer, cell.bits), []).append(cell)
    if not panels:
        return
    shown: list[list[tuple[str, Cell]]] = []
    for found in panels.values():
        starts = dict.fromkeys(start for cell in found for start in (cell.reference, cell.same_start))
        full = [start for start in starts if any((s, start) in done for s in seeds)]
        names = ["full precision" + f", {cell.method}" * (cell != cell.reference) for cell in full]
        shown.append([*zip(names, full, strict=True), *((cell.method, cell) for cell in found)])
    heights = [len(rows) for rows in shown]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(8, 0.35 * sum(heights) + 0.5 * len(panels)),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for ax, (detector, quantizer, bits), rows in zip(axes[:, 0], panels, shown, strict=True):
        for line, (_, cell) in enumerate(rows):
            points = [done[s, cell]["AP"] for s in seeds if (s, cell) in done and done[s, cell]["AP"] is not None]
            colour = "grey" if cell.quantizer == FLOAT else "tab:blue"
            ax.plot(points, [line] * len(points), "o", color=colour, alpha=0.6)
            if points:
                ax.plot([statistics.mean(points)], [line], "|", color=colour, markersize=16, markeredgewidth=2)
        ax.set_yticks(range(len(rows)), [name for name, _ in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.grid(axis="x", alpha=0.3)
        ax.set_title(f"{detector}, {quantizer} w{bits}a{bits}", fontsize="medium")
    axes[-1, 0].set_xlabel("AP of the detector alone, in percent: a dot a seed, a bar their mean")
    with replacing(path, keep_ending=True) as aside:
        figure.savefig(aside, dpi=120)
    plt.close(figure)


def ap_of_starts(seeds: Sequence[int], done: dict[tuple[int, Cell], dict[str, Any]]) -> str:
    """Returns a clause with the AP of each detector's starts."""
    starts = {
        cell.detector + f" with {cell.method}" * (cell.method != BASELINE): cell
        for _, cell in done
        if cell.quantizer == START
    }
    return ", ".join(
        f"{name} {mean_and_spread([done[s, cell]['AP'] for s in seeds if (s, cell) in done])}"
        for name, cell in starts.items()
    )


def command_line(args: argparse.Namespace) -> str:
    """Returns the command that makes the table."""
    command = f"python tools/experiments/ablation.py --dataset {args.dataset} --seeds {' '.join(map(str, args.seeds))}"
    command += f" --{args.dataset}-root {'BCCD' if args.dataset == 'bccd' else 'cards'}" * (args.dataset != "shapes")
    command += f" --width {args.width}" * (args.width != WIDTH)
    for option in ("detectors", "quantizers", "methods"):
        if getattr(args, option):
            command += " ".join([f" --{option}", *getattr(args, option)])
    if args.bits != list(BITS):
        command += " ".join([" --bits", *map(str, args.bits)])
    command += f" --taps {args.taps}"
    if not is_usual(args):
        command += f" --start-iterations {args.start_iterations} --iterations {args.iterations}"
    command += f" --split {args.split}" * (args.split != "val")
    return command + (" ".join([" --", *args.opts]) if args.opts else "")


def write_results(args: argparse.Namespace, cells: Sequence[Cell], jobs: dict[tuple[int, Cell], Job]) -> None:
    """Writes the section of RESULTS.md and the plot from the runs that have finished, here or in another checkout."""
    done, dates, machines = {}, set(), set()
    evaluated = evaluations(args, jobs)
    kept = keep_runs(args.dataset, [*jobs.values(), *evaluated.values()])

    def noted(job: Job) -> dict[str, Any] | None:
        found = kept.get(f"{args.dataset} {job.name}")
        return found if found is not None and found["fingerprint"] == job.fingerprint() else None

    for key, job in jobs.items():
        trained, shown = noted(job), noted(evaluated.get(key, job))
        if trained is not None and shown is not None:
            done[key] = shown["metrics"]
            dates.add(shown["date"])
            machines.add(shown["machine"])
    if not done:
        print("Nothing has finished: no table")
        return
    missing = []
    for cell in cells:
        if not chosen(args, cell):
            continue
        wanted = [seed for seed in args.seeds if not evaluated or noted(jobs[seed, cell]) is not None]
        absent = [str(seed) for seed in wanted if (seed, cell) not in done]
        if absent:
            missing.append(f"{cell} ({', '.join(absent)})")
    part = part_name(args)
    plot = Path("tools", "experiments", PLOTS, f"ablation_{part.replace(' ', '_')}.png")
    (ROOT / plot).parent.mkdir(parents=True, exist_ok=True)
    make_plot(str(ROOT / plot), args.seeds, cells, done)
    header = [
        "detector",
        "quantizer",
        "method",
        "AP",
        "AP50",
        "− baseline",
        "− full precision",
        "− same start",
        "AP by seed",
    ]
    seeds = " ".join(map(str, args.seeds))
    title = TITLES[args.dataset] + (f" ({part.partition(' ')[2]})" if " " in part else "")
    narrow = f" narrowed from {WIDTH} to {args.width} channels" * (args.width != WIDTH)
    text = f"""### What helps: ResNet-18 detectors{narrow} on {title}

For each seed one full-precision start of {args.start_iterations} iterations, and from it every run of
{args.iterations}, full precision included. COCO AP of the detector alone, in percent, on
{IMAGES[args.dataset][args.split]} images ({args.split}); mean ± sample standard deviation over the seeds that have
run (of {seeds}). Differences are paired by seed: with the quantizer alone and full precision from the usual start, and
with full precision from the row's own start, which for two_stage has the path.

{markdown_table(header, make_rows(args.seeds, cells, done))}

![AP by method, a dot a seed]({plot.as_posix()})

AP of the starts: {ap_of_starts(args.seeds, done)}. {learning_rates(jobs)}.

Command: `{command_line(args)}`. {" to ".join(sorted({min(dates), max(dates)}))}, {"; ".join(sorted(machines))},
torch {torch.__version__}.
"""
    section = f"ablation {part}"
    remark = args.remark or kept_remark(ROOT / "RESULTS.md", section)
    if remark:
        text += f"\n{remark}\n"
    if missing:
        text += f"\n{LEFT_OUT} (seeds): {'; '.join(missing)}.\n"
    write_section(ROOT / "RESULTS.md", section, text)
    print(text)
