#!/usr/bin/env python
"""Trains Mask R-CNNs to see what 4 and 2 bits cost and what the path wins back, and writes the table into RESULTS.md.

Each seed has one full-precision start with the path on the embedded dataset, and runs of equal length from it: full
precision, and 4 and 2 bits each with and without the path. Boxes and masks of the detector alone are evaluated. A grid
that was stopped goes on where it stopped when it is started again. Results are kept where ablation.py keeps them, so
that the table can be made in another checkout. KEY VALUE pairs after -- go to every run, as for train_net.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqdet.utils.arguments import Distinct, folder_to_write, integer
from aqdet.utils.console import run_console

if TYPE_CHECKING:
    from jobs import Job

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tools" / "experiments")]  # jobs.py, kept_runs.py
DATASET, SECTION = "shapes", "mask_rcnn shapes"
START_ITERATIONS, ITERATIONS = 300, 100
STATE = "model_final.pth"


@dataclasses.dataclass(frozen=True)
class Row:
    """A training apart from its seed."""

    name: str
    config: str
    quantized: bool = False
    path: bool = False

    def overrides(self) -> list[str]:
        """Returns the ``KEY VALUE ...`` that the shipped config does not have."""
        return ["MODEL.QUANT.ENABLED", str(self.quantized), "MODEL.AUX.ENABLED", str(self.path)]


START = Row("start", "mask_rcnn_r18_fp_bn_aux", path=True)
FLOAT = Row("float", "mask_rcnn_r18_lsq_w4a4_aux")
ROWS = (
    FLOAT,
    Row("w4a4", "mask_rcnn_r18_lsq_w4a4_aux", quantized=True),
    Row("w4a4_path", "mask_rcnn_r18_lsq_w4a4_aux", quantized=True, path=True),
    Row("w2a2", "mask_rcnn_r18_lsq_w2a2_aux", quantized=True),
    Row("w2a2_path", "mask_rcnn_r18_lsq_w2a2_aux", quantized=True, path=True),
)
"""Rows of the table; a row with the path comes after the one without."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=folder_to_write, default="output/mask_rcnn", help="folder of all runs")
    parser.add_argument(
        "--seeds", type=integer(0), nargs="+", action=Distinct, default=[0, 1, 2], help="seeds (default: 0 1 2)"
    )
    names = [row.name for row in (START, *ROWS)]
    parser.add_argument(
        "--rows", nargs="+", choices=names, action=Distinct, help="train these alone, from their starts"
    )
    lengths = (START_ITERATIONS, ITERATIONS)
    parser.add_argument(
        "--start-iterations", type=integer(2), default=lengths[0], help="length of a start (%(default)s)"
    )
    parser.add_argument("--iterations", type=integer(2), default=lengths[1], help="length of a run (%(default)s)")
    parser.add_argument("--results-only", action="store_true", help="rewrite the table and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="-- KEY VALUE pairs for every run")
    args = parser.parse_args()
    if args.opts[:1] == ["--"]:
        del args.opts[0]
    return args


def make_jobs(args: argparse.Namespace) -> dict[tuple[int, Row], Job]:
    """Returns the runs in their order: seed by seed, each start before the runs from it."""
    from jobs import Job

    jobs: dict[tuple[int, Row], Job] = {}
    for seed in args.seeds:
        for row in (START, *ROWS):
            start = jobs.get((seed, START))
            iterations = args.start_iterations if start is None else args.iterations
            name = f"mask_rcnn_{row.name}_{args.start_iterations}" + f"+{iterations}" * (start is not None)
            weights = "" if start is None else os.path.join(start.output_dir, STATE)
            overrides = ["SEED", str(seed), "SOLVER.MAX_ITER", str(iterations)]
            overrides += ["SOLVER.CHECKPOINT_PERIOD", str(iterations), "MODEL.WEIGHTS", weights]
            jobs[seed, row] = Job(
                name=f"seed {seed} {name}",
                config=os.path.relpath(ROOT / "configs" / "quickstart" / f"{row.config}.yaml"),
                overrides=(*overrides, *row.overrides(), *args.opts),
                output_dir=os.path.join(args.output, f"seed{seed}", name),
                iterations=iterations,
                sources=() if start is None else (start,),
            )
    return jobs


def make_table(seeds: list[int], done: dict[tuple[int, Row], dict[str, Any]]) -> str:
    """Returns the table of the rows that have run, with differences paired by seed."""
    from results_file import markdown_table, mean_and_spread

    def values(row: Row, task: str, key: str = "AP") -> dict[int, float]:
        found = {seed: done[seed, row] for seed in seeds if (seed, row) in done}
        return {seed: (metrics if task == "bbox" else metrics[task])[key] for seed, metrics in found.items()}

    def paired(row: Row, other: Row, task: str) -> str:
        mine, theirs = values(row, task), values(other, task)
        return "-" if row == other else mean_and_spread([mine[s] - theirs[s] for s in mine if s in theirs])

    header = ["detector"]
    for name in ("box", "mask"):
        header += [f"{name} AP", f"{name} AP50", "− full precision", "− without the path", f"{name} AP by seed"]
    rows = []
    for index, row in enumerate(ROWS):
        if not any((seed, row) in done for seed in seeds):
            continue
        cells = [row.name.replace("_path", " + path").replace("float", "full precision")]
        for task in ("bbox", "segm"):
            found = values(row, task)
            without = ROWS[index - 1] if row.path else row
            cells += [mean_and_spread(list(found.values())), mean_and_spread(list(values(row, task, "AP50").values()))]
            cells += [paired(row, FLOAT, task), paired(row, without, task)]
            cells.append(", ".join(f"{value:.1f}" for value in found.values()) or "-")
        rows.append(cells)
    return markdown_table(header, rows)


def write_results(args: argparse.Namespace, jobs: dict[tuple[int, Row], Job]) -> None:
    """Writes the section of RESULTS.md from the runs that have finished, here or in another checkout."""
    import torch
    from kept_runs import keep_runs
    from results_file import kept_remark, mean_and_spread, write_section

    kept = keep_runs(DATASET, list(jobs.values()))
    noted = {key: kept.get(f"{DATASET} {job.name}") for key, job in jobs.items()}
    runs = {key: run for key, run in noted.items() if run and run["fingerprint"] == jobs[key].fingerprint()}
    if not runs:
        print("Nothing has finished: no table")
        return
    done = {key: run["metrics"] for key, run in runs.items()}
    starts = [done[seed, START] for seed in args.seeds if (seed, START) in done]
    dates, machines = {run["date"] for run in runs.values()}, {run["machine"] for run in runs.values()}
    command = f"python tools/experiments/mask_rcnn.py --seeds {' '.join(map(str, args.seeds))}"
    command += f" --start-iterations {args.start_iterations} --iterations {args.iterations}"
    command += " ".join([" --", *args.opts]) if args.opts else ""
    text = f"""### What low precision costs a Mask R-CNN: ResNet-18, the embedded dataset, 192x192

For each seed one full-precision start of {args.start_iterations} iterations with the path, and from it every run of
{args.iterations}, full precision included. COCO AP of the detector alone, in percent, on 200 images (val); mean ±
sample standard deviation over the seeds that have run; differences are paired by seed.

{make_table(args.seeds, done)}

AP of the starts: boxes {mean_and_spread([metrics["AP"] for metrics in starts])}, masks
{mean_and_spread([metrics["segm"]["AP"] for metrics in starts])}.

Command: `{command}`. {" to ".join(sorted({min(dates), max(dates)}))}, {"; ".join(sorted(machines))},
torch {torch.__version__}.
"""
    remark = kept_remark(ROOT / "RESULTS.md", SECTION)
    write_section(ROOT / "RESULTS.md", SECTION, text + f"\n{remark}\n" * bool(remark))
    print(text)


def main() -> None:
    args = parse_args()
    from jobs import grid_ends_in_one_line, print_commands, run_jobs  # late, so that --help opens at once
    from kept_runs import recall_runs

    with grid_ends_in_one_line():
        jobs = make_jobs(args)
        wanted = [job for (_, row), job in jobs.items() if not args.rows or row == START or row.name in args.rows]
        train_net = os.path.relpath(ROOT / "tools" / "train_net.py")
        if args.dry_run:
            print_commands(wanted, train_net)
            return
        recall_runs(DATASET, wanted)
        try:
            if not args.results_only:
                run_jobs(wanted, train_net)
        finally:
            write_results(args, jobs)


if __name__ == "__main__":
    run_console(main)
