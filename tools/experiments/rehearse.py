#!/usr/bin/env python
"""Trains each family of configs/COCO-* and configs/ImageNet scaled down to minutes, and puts its table into a file.

Both stages of a family are trained with their own solver, and with the others of a small set, from the same start and
for as long: full precision, low precision, and full precision for as long as low precision. rehearsal_scaling.py says
how a config is scaled. Drawn scenes stand in for COCO, the objects cut out of them for ImageNet, and the trunk of the
rehearsed classifier for torchvision's weights. The program can be stopped at any time; run again, it goes on where it
stopped. Results of finished runs are kept in tools/experiments/rehearsal_runs.json, too. With --short nothing is
measured: a few iterations of both stages of each family, with its own solver and ResNet, show that the loss falls and
that scales move.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aqdet.utils.arguments import Distinct, folder_to_write, integer
from aqdet.utils.console import run_console

if TYPE_CHECKING:
    from jobs import Job
    from rehearsal_scaling import Family, Form, Solver

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # jobs.py
RUNS, PLOT = "rehearsal_runs.json", "rehearsal.png"
DETECTOR, CROPS = (60, 4, 192, 18), (160, 16, 64, 18)
"""Iterations, images, their side and the ResNet's depth, of a detector's and of a classifier's stage."""
START, FULL, LOW, CONTINUED = "start", "full", "low", "continued"
ADAMW_DECAY = 0.05
START_RATE = 0.002
"""AdamW's learning rate for the classifier's start."""
STARTS = {
    "QuantRetinaNet": "retinanet_r18_fp_bn_aux",
    "QuantFCOS": "fcos_r18_fp_bn_aux",
    "QuantGeneralizedRCNN": "mask_rcnn_r18_fp_bn_aux",
}
"""The full-precision configs of the quickstart that detectors start from, trained as they are."""
LOW_RATES = (0.0005, 0.001)
AQD_DETECTORS = ("QuantRetinaNet", "QuantFCOS")
SHORT_ALONE = {
    "retinanet_R_50_FPN_1x_lsq_w4a4_aux": "scaled down it is the one on ResNet-18",
    "atss_R_18_FPN_1x_lsq_w4a4_aux": "FCOS with its solver, trained on other points",
    "atss_X_400MF_FPN_1x_lsq_w4a4_aux": "the same, on a trunk that no rehearsal trains",
}
"""Families that are left to --short, and why."""
STATE = "model_final.pth"


@dataclasses.dataclass(frozen=True)
class Run:
    """A training of the grid.

    Attributes:
        config: The name of the config, with its folder.
        kind: ``"start"``, ``"full"``, ``"low"``, or ``"continued"``: full precision in the place of ``"low"``.
        bits: The bits in place of the config's, or 0.
        solver: The optimizer with its settings.
    """

    config: str
    kind: str
    bits: int
    solver: Solver

    def __str__(self) -> str:
        words = [self.config.partition("/")[2], f"w{self.bits}a{self.bits}" * bool(self.bits)]
        words += ["without quantizers" * (self.kind == CONTINUED), "" if self.kind == START else str(self.solver)]
        return " ".join(filter(None, words))


@dataclasses.dataclass(frozen=True)
class Row:
    """A config's row of the table: the run with its own solver, and the runs that it is compared with.

    Attributes:
        config: The name of the config, with its folder.
        bits: The bits in place of the config's, or 0.
        own: The run with the config's own solver.
        others: Runs with the other solvers, the most telling first.
        continued: Full precision for as long from the same start, with the config's own solver; None for a first stage.
    """

    config: str
    bits: int
    own: Run
    others: tuple[Run, ...]
    continued: Run | None = None


def form_of(family: Family) -> Form:
    """Returns what a family's stages are scaled down to."""
    from rehearsal_scaling import CLASSIFIER, Form

    from aqdet.config import load_config

    is_classifier = load_config(family.full).MODEL.META_ARCHITECTURE == CLASSIFIER
    return Form(*(CROPS if is_classifier else DETECTOR))


def rows_of(family: Family, bits: int = 0) -> list[Row]:
    """Returns the rows of a family's two stages; with ``bits`` that of the second alone.

    SGD's rates are one, three and ten times that of the literature: of full precision's own config, and for low
    precision a fifth of that in AQD's detectors (2007.06919), elsewhere a tenth, as reproductions of LSQ have it.
    """
    from rehearsal_scaling import CLASSIFIER, Solver, own_solver

    from aqdet.config import load_config

    form = form_of(family)
    full, low = (f"{path.parent.name}/{path.stem}" for path in (family.full, family.low))
    full_cfg, low_cfg = load_config(family.full), load_config(family.low)
    own_full, own_low = own_solver(full_cfg, form), own_solver(low_cfg, form)

    def sgd(factor: float) -> Solver:
        return dataclasses.replace(own_full, rate=own_full.rate * factor)

    def others(config: str, kind: str, own: Solver, solvers: Sequence[Solver]) -> tuple[Run, ...]:
        return tuple(Run(config, kind, bits, solver) for solver in solvers if str(solver) != str(own))

    base = 0.2 if full_cfg.MODEL.META_ARCHITECTURE in AQD_DETECTORS else 0.1
    # Two bits have further to go than four, so that the higher rate is the more telling one.
    adamw = [Solver("AdamW", rate, ADAMW_DECAY) for rate in (reversed(LOW_RATES) if bits else LOW_RATES)]
    rows = [
        Row(
            low,
            bits,
            Run(low, LOW, bits, own_low),
            others(low, LOW, own_low, [adamw[0], sgd(base), adamw[1], sgd(10 * base), sgd(3 * base)]),
            Run(low, CONTINUED, 0, own_low),
        )
    ]
    if not bits:
        is_classifier = full_cfg.MODEL.META_ARCHITECTURE == CLASSIFIER
        # A detector goes on from one that is trained, and a classifier begins with random weights.
        rate = START_RATE if is_classifier else LOW_RATES[0]
        solvers = [Solver("AdamW", rate, ADAMW_DECAY), sgd(10)]
        rows.append(Row(full, 0, Run(full, FULL, 0, own_full), others(full, FULL, own_full, solvers)))
    return rows


def start_of(family: Family) -> Run:
    """Returns the run that all runs of low precision start from, and a detector's of full precision."""
    from rehearsal_scaling import CLASSIFIER, Solver

    from aqdet.config import load_config

    architecture = load_config(family.full).MODEL.META_ARCHITECTURE
    solver = Solver("AdamW", START_RATE, ADAMW_DECAY)
    if architecture == CLASSIFIER:
        return Run(f"{family.full.parent.name}/{family.full.stem}", FULL, 0, solver)
    return Run(f"quickstart/{STARTS[architecture]}", START, 0, solver)


def planned() -> list[tuple[Family, int]]:
    """Returns the families that are rehearsed in full, and the bits that are set instead of a config's own.

    RetinaNet is rehearsed at 2 bits too, which configs/README.md gives as overrides.
    """
    from rehearsal_scaling import families

    full = [family for family in families() if family.low.stem not in SHORT_ALONE]
    two_bits = [(family, 2) for family in full if family.low.stem == "retinanet_R_18_FPN_1x_lsq_w4a4_aux"]
    return [*((family, 0) for family in full), *two_bits]


def make_jobs(args: argparse.Namespace, chosen: Sequence[tuple[Family, int]]) -> dict[Run, Job]:
    """Returns the runs in order: the most telling ones of a family first, each after the run that it starts from."""
    from jobs import Job
    from rehearsal_scaling import CLASSIFIER, scaled

    from aqdet.config import load_config

    jobs: dict[Run, Job] = {}

    def add(run: Run, family: Family) -> Job:
        if run in jobs:
            return jobs[run]
        path = ROOT / "configs" / f"{run.config}.yaml"
        form, cfg = form_of(family), load_config(path)
        is_classifier = cfg.MODEL.META_ARCHITECTURE == CLASSIFIER
        overrides = ["SEED", str(args.seed)]
        sources: tuple[Job, ...] = ()
        if run.kind == START:
            overrides += ["SOLVER.CHECKPOINT_PERIOD", "100"]
            form = dataclasses.replace(form, iterations=cfg.SOLVER.MAX_ITER)
        else:
            if run.kind != FULL or not is_classifier:
                sources = (add(start_of(family), family),)
            weights = os.path.join(sources[0].output_dir, STATE) if sources else ""
            overrides += [*scaled(cfg, form), *run.solver.overrides(), "MODEL.WEIGHTS", weights]
            overrides += crops(args.output) if is_classifier else SCENES
        if run.bits:
            overrides += ["MODEL.QUANT.WEIGHT.NUM_BITS", str(run.bits), "MODEL.QUANT.INPUT.NUM_BITS", str(run.bits)]
        if run.kind == CONTINUED:
            overrides += ["MODEL.QUANT.ENABLED", "False"]
        if cfg.MODEL.META_ARCHITECTURE == "QuantGeneralizedRCNN" and not cfg.MODEL.MASK_ON:
            overrides += ["CHECKPOINT.ALLOW_KEYS", "['mask_head']"]
        name = str(run)
        jobs[run] = Job(
            name=name,
            config=os.path.relpath(path),
            overrides=tuple(overrides),
            output_dir=os.path.join(args.output, f"seed{args.seed}", name.replace(" ", "_")),
            iterations=form.iterations,
            sources=sources,
            cost=0.4 if is_classifier else 1.0,
            overhead=60.0,
            may_diverge=run.solver.optimizer == "SGD",
        )
        return jobs[run]

    for has_own_bits in (True, False):
        pairs = [(family, bits) for family, bits in chosen if has_own_bits == (not bits)]
        rows = [(family, row) for family, bits in pairs for row in rows_of(family, bits)]
        for part in (
            [(family, run) for family, row in rows if row.continued for run in (row.own, row.others[0])],
            [(family, run) for family, row in rows if row.continued for run in (row.continued, row.others[1])],
            [(family, row.own) for family, row in rows],
            [(family, run) for family, row in rows for run in row.others],
        ):
            for family, run in part:
                add(run, family)
    return jobs


SCENES = ("DATASETS.TRAIN", "('aqdet_shapes_train',)", "DATASETS.TEST", "('aqdet_shapes_val',)")


def crops(output: str) -> list[str]:
    """Returns the ``KEY VALUE`` pairs that make a classifier train on the folder that :func:`write_crops` fills."""
    entries = [{"name": f"shape_crops_{s}", "root": os.path.join(output, "shape_crops", s)} for s in ("train", "val")]
    names = ("DATASETS.TRAIN", "('shape_crops_train',)", "DATASETS.TEST", "('shape_crops_val',)")
    return ["DATASETS.IMAGE_FOLDERS", str(entries), *names]


def write_crops(output: str) -> None:
    """Writes the stand-in for ImageNet, if it is not there."""
    from crop_shapes import crop_objects

    folder = Path(output, "shape_crops")
    if not folder.is_dir():
        aside = Path(output, "shape_crops.part")
        for split in ("train", "val"):
            crop_objects(split, aside, size=64, margin=0.15)
        aside.rename(folder)


def write_results(args: argparse.Namespace, chosen: Sequence[tuple[Family, int]], jobs: dict[Run, Job]) -> None:
    """Writes the section of configs/README.md and the plot, from what has finished, here or before."""
    import torch
    from kept_runs import keep_runs
    from rehearsal_table import make_plot, make_table
    from results_file import LEFT_OUT, kept_remark, markdown_table, write_section

    kept = keep_runs(f"seed {args.seed}", list(jobs.values()), RUNS)
    done = {
        run: noted
        for run, job in jobs.items()
        if (noted := kept.get(f"seed {args.seed} {job.name}")) is not None and noted["fingerprint"] == job.fingerprint()
    }
    if not done:
        print("Nothing has finished: no table")
        return
    rows = [row for family, bits in chosen for row in rows_of(family, bits)]
    table, missing = make_table(rows, done)
    plot = ROOT / "tools" / "experiments" / "plots" / PLOT
    plot.parent.mkdir(parents=True, exist_ok=True)
    make_plot(plot, rows, done)
    dates, machines = ({noted[key] for noted in done.values()} for key in ("date", "machine"))
    header = ["config", "own solver, scaled", "AP", "full precision", "AP with other solvers", "best minus own"]
    text = f"""{markdown_table(header, table)}

![AP of each config by solver](../tools/experiments/plots/{PLOT})

Command: `python tools/experiments/rehearse.py --seed {args.seed}`. {" to ".join(sorted({min(dates), max(dates)}))},
{"; ".join(sorted(machines))}, torch {torch.__version__}.
"""
    readme = ROOT / "configs" / "README.md"
    remark = args.remark or kept_remark(readme, "rehearsals")
    if remark:
        text += f"\n{remark}\n"
    if missing:
        text += f"\n{LEFT_OUT}, runs of a row: {'; '.join(missing)}.\n"
    write_section(readme, "rehearsals", text)
    print(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=folder_to_write, default="output/rehearsal", help="folder of all runs")
    parser.add_argument("--seed", type=integer(0), default=1, help="seed of all runs (default: %(default)s)")
    named = "low-precision configs with their folder, as ImageNet/resnet_R_18_lsq_w4a4_aux; all by default"
    parser.add_argument("--families", nargs="+", action=Distinct, help=f"run these alone: {named}")
    parser.add_argument("--short", action="store_true", help="a few iterations only, to see that both stages learn")
    parser.add_argument("--results-only", action="store_true", help="rewrite table and plot and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    parser.add_argument("--remark", default="", help="what to print below the table; the one that is there by default")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from jobs import grid_ends_in_one_line, print_commands, run_jobs  # late, so that --help opens at once
    from kept_runs import recall_runs
    from rehearsal_scaling import families
    from rehearsal_short import rehearse_shortly

    with grid_ends_in_one_line():
        everything = [(family, 0) for family in families()] if args.short else planned()
        names = list(dict.fromkeys(family.name for family, _ in everything))
        unknown = [name for name in args.families or () if name not in names]
        if unknown:
            raise ValueError(f"--families {unknown[0]} must be one of {', '.join(names)}")
        wanted = [pair for pair in everything if not args.families or pair[0].name in args.families]
        if args.short:
            rehearse_shortly([family for family, _ in wanted], args.output, args.seed)
            return
        jobs, run = make_jobs(args, everything), list(make_jobs(args, wanted).values())
        train_net = os.path.relpath(ROOT / "tools" / "train_net.py")
        if args.dry_run:
            print_commands(run, train_net)
            return
        recall_runs(f"seed {args.seed}", run, RUNS)
        try:
            if not args.results_only:
                write_crops(args.output)
                run_jobs(run, train_net)
        finally:
            write_results(args, everything, jobs)


if __name__ == "__main__":
    run_console(main)
