#!/usr/bin/env python
"""Trains a grid of detectors to see what helps low precision, and writes its table into RESULTS.md.

Each seed has one full-precision start, and runs of equal length from it: full precision, the quantizer alone, an extra
loss, distillation from the full-precision run of the same start, the auxiliary path by its taps, and combinations
("aux_both+distill"). With "two_stage" the start is trained with the auxiliary path, too. A grid that was stopped goes
on where it stopped when it is started again. --split test evaluates the trained detectors on images that the grid has
not seen, 2000 of the embedded dataset, 72 of BCCD or 67 of the cards, for a table of its own. KEY VALUE pairs after --
go to every run, as for train_net.py. Results are kept in tools/experiments/ablation_runs.json, so that a grid can go on
in another checkout; a run whose config, start or teacher has changed is trained anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ablation_grid import (
    BASELINE,
    BITS,
    LENGTHS,
    OTHERS,
    PARTS,
    TAPS,
    WEIGHTS_ALONE,
    WIDTH,
    Cell,
    chosen,
    part_of_grid,
    planned,
)

from aqdet.utils.arguments import Distinct, folder_to_write, integer
from aqdet.utils.console import run_console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # jobs.py


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", choices=LENGTHS, default="shapes", help="shapes are drawn scenes, cards playing cards"
    )
    parser.add_argument("--bccd-root", default="BCCD", help="folder of BCCD in VOC's layout (default: %(default)s)")
    parser.add_argument("--cards-root", default="cards", help="likewise, of the playing cards (default: %(default)s)")
    parser.add_argument(
        "--width",
        type=integer(4, WIDTH),
        default=WIDTH,
        help="channels of the network's first stage, and half of the pyramid's if there are fewer than %(default)s",
    )
    parser.add_argument("--output", type=folder_to_write, default="output/ablation", help="folder of all runs")
    parser.add_argument(
        "--seeds", type=integer(0), nargs="+", action=Distinct, default=[0, 1, 2], help="seeds (default: 0 1 2)"
    )
    parser.add_argument(
        "--bits",
        type=int,
        nargs="+",
        choices=BITS,
        action=Distinct,
        default=list(BITS),
        help="bit widths (default: both)",
    )
    part = "train these alone; they get a table of their own"
    listed = "train these alone; others are in the table if they have run before"
    parser.add_argument("--detectors", nargs="+", choices=("retinanet", "fcos"), help=part)
    parser.add_argument("--quantizers", nargs="+", choices=("lsq", *OTHERS, WEIGHTS_ALONE), help=part)
    parser.add_argument("--methods", nargs="+", help=f"{listed}; {BASELINE}, {', '.join(PARTS)}, or some joined by +")
    parser.add_argument(
        "--taps", choices=TAPS, default="backbone", help="taps of the path that is combined with the other methods"
    )
    parser.add_argument("--split", choices=("val", "test"), default="val", help="images to evaluate on")
    lengths = "by dataset: " + ", ".join(f"{name} %s" for name in LENGTHS)
    starts, runs = zip(*LENGTHS.values(), strict=True)
    parser.add_argument("--start-iterations", type=integer(2), help=f"iterations of a start ({lengths % starts})")
    parser.add_argument("--iterations", type=integer(2), help=f"iterations of each run from a start ({lengths % runs})")
    parser.add_argument("--results-only", action="store_true", help="write table and plot again, and end")
    parser.add_argument("--dry-run", action="store_true", help="print the estimate and the commands, and end")
    parser.add_argument("--remark", default="", help="text below the table; by default the one that is there stays")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for every run, after --")
    args = parser.parse_args()
    usual = dict(zip(("start_iterations", "iterations"), LENGTHS[args.dataset], strict=True))
    for name, length in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, length)
    if args.opts[:1] == ["--"]:
        del args.opts[0]
    for method in args.methods or []:
        for part in method.split("+"):
            if part != BASELINE and part not in PARTS:
                parser.error(f"--methods: {part!r} of {method!r} must be one of {', '.join((BASELINE, *PARTS))}")
        cell = Cell("", "", 0, method)
        if "distill" in cell.parts and cell.start(args.taps) != cell.teacher.start(args.taps):
            taps = cell.start(args.taps).method.removeprefix("aux_")
            parser.error(f"--methods: the teacher of {method!r} has the start of --taps: add --taps {taps}")
    return args


def main() -> None:
    args = parse_args()
    # Late, so that --help opens at once.
    from ablation_jobs import estimate, evaluations, make_jobs, prune
    from ablation_table import write_results
    from jobs import grid_ends_in_one_line, print_commands, run_jobs
    from kept_runs import recall_runs

    with grid_ends_in_one_line():
        cells = part_of_grid(args, planned(args.dataset, args.taps, args.methods or ()))
        jobs = make_jobs(args, cells)
        run = make_jobs(args, [cell for cell in cells if chosen(args, cell)])
        trainings, evaluated = list(run.values()), list(evaluations(args, run).values())
        recall_runs(args.dataset, [*trainings, *evaluated])
        train_net = os.path.relpath(ROOT / "tools" / "train_net.py")
        print(estimate(args, trainings), flush=True)
        if args.dry_run:
            print_commands([*trainings, *evaluated], train_net)
            return
        try:
            if not args.results_only:
                run_jobs(trainings, train_net, lambda job: prune(job, args.seeds[0]))
                run_jobs(evaluated, train_net)
        finally:
            write_results(args, cells, jobs)


if __name__ == "__main__":
    run_console(main)
