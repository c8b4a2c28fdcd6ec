#!/usr/bin/env python
"""What helps a low-precision detector: runs a grid of trainings and writes its table into RESULTS.md.

For each seed one full-precision start, and from it runs of equal length: full precision, the quantizer alone, an
extra loss, distillation from the full-precision run of the same start, the auxiliary path by its taps, and
combinations ("aux_both+distill"); with "two_stage" the start is trained with the auxiliary path too. Stop it at any
time and run it again: it goes on where it stopped. With --split test the detectors, once trained, are evaluated on
images that the grid has not seen, 2000 of the embedded dataset or 72 of BCCD, in a table of its own. KEY VALUE pairs
after -- are for every run, as for train_net.py. What finished runs gave is kept in
tools/experiments/ablation_runs.json too, so that a grid can go on in another checkout; a run with another config, start
or teacher is run anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqdet.utils.arguments import Distinct, folder_to_write, integer
from aqdet.utils.console import run_console

if TYPE_CHECKING:
    from jobs import Job

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # jobs.py
DATASETS = {"shapes": "quickstart", "bccd": "BCCD"}
TITLES = {
    "shapes": "the embedded dataset, 192x192",
    "bccd": "BCCD (205 images to train), 320x240",
}
IMAGES = {"shapes": {"val": 200, "test": 2000}, "bccd": {"val": 87, "test": 72}}
"""Of the splits to evaluate on."""
LENGTHS = {"shapes": (600, 400), "bccd": (408, 306)}
"""Iterations of a start and of each run from one; runs of another length have it in their name."""
SECONDS = {"shapes": 0.6, "bccd": 0.9}
"""Of an iteration on two quiet cores, until runs in the output folder say better."""
RUNS, PLOTS = "ablation_runs.json", "plots"
BITS = (2, 4)
OTHERS = ("dorefa", "pact", "lqnet")
TAPS = ("fpn", "backbone", "both")
PARTS = {
    "extra": ("MODEL.EXTRA_LOSS.ENABLED", "True"),
    "distill": ("MODEL.DISTILL.ENABLED", "True"),
    **{f"aux_{taps}": ("MODEL.AUX.ENABLED", "True", "MODEL.AUX.TAPS", taps) for taps in TAPS},
    "two_stage": (),
}
"""What each part of a method adds to a run's config. "two_stage" is the recipe of 1903.11236: it changes the start."""
START, FLOAT, BASELINE, TWO_STAGE = "start", "float", "baseline", "two_stage"
STRIPPED, STATE = "model_final_stripped.pth", "model_final.pth"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of the table: what is trained, apart from the seed."""

    detector: str
    quantizer: str
    bits: int
    method: str

    def __str__(self) -> str:
        is_float = self.quantizer in (START, FLOAT)
        kind = self.quantizer if is_float else f"{self.quantizer}_w{self.bits}a{self.bits}"
        return f"{self.detector}_{kind}" + f"_{self.method}" * (not is_float or self.method != BASELINE)

    @property
    def parts(self) -> list[str]:
        return self.method.split("+")

    @property
    def reference(self) -> Cell:
        """Full precision from the usual start, which its detector is compared with."""
        return Cell(self.detector, FLOAT, 32, BASELINE)

    @property
    def teacher(self) -> Cell:
        """What distillation learns from: full precision from the start that it has itself.

        Features of another start are another basis. With a teacher from the usual start, w2a2 of two stages ended at
        52.2, 52.1 and 50.6 AP (seeds 0, 1, 2), lower than without a teacher.
        """
        return Cell(self.detector, FLOAT, 32, TWO_STAGE if TWO_STAGE in self.parts else BASELINE)

    def start(self, taps: str) -> Cell:
        """What it starts from; ``taps`` are those of a two-stage run that has no auxiliary path itself."""
        method = BASELINE
        if TWO_STAGE in self.parts:
            method = next((part for part in self.parts if part.startswith("aux_")), f"aux_{taps}")
        return Cell(self.detector, START, 32, method)

    def overrides(self, start: str, teacher: str) -> list[str]:
        """``KEY VALUE ...`` of a run from the checkpoint ``start``; ``teacher`` is what distillation learns from."""
        found = ["MODEL.WEIGHTS", "" if self.quantizer == START else start]
        is_float = self.quantizer in (START, FLOAT)
        found += ["MODEL.QUANT.ENABLED", str(not is_float), "MODEL.AUX.ENABLED", "False"]
        if not is_float:
            for tensor in ("WEIGHT", "INPUT"):
                found += [f"MODEL.QUANT.{tensor}.QUANTIZER", self.quantizer]
                found += [f"MODEL.QUANT.{tensor}.NUM_BITS", str(self.bits)]
        for part in self.parts:
            if part != BASELINE:
                found += PARTS[part]
            if part == "distill":
                found += ["MODEL.DISTILL.WEIGHTS", teacher]
        return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="shapes")
    parser.add_argument("--bccd-root", default="BCCD", help="VOC folder of BCCD")
    parser.add_argument("--output", type=folder_to_write, default="output/ablation")
    parser.add_argument("--seeds", type=integer(0), nargs="+", action=Distinct, default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, action=Distinct, default=list(BITS))
    part = "a part of the grid, with a table of its own"
    listed = "run these alone; others are in the table if they have run before"
    parser.add_argument("--detectors", nargs="+", choices=("retinanet", "fcos"), help=part)
    parser.add_argument("--quantizers", nargs="+", choices=("lsq", *OTHERS), help=part)
    parser.add_argument("--methods", nargs="+", help=f"{listed}; {BASELINE}, {', '.join(PARTS)}, or some joined by +")
    parser.add_argument(
        "--taps", choices=TAPS, default="backbone", help="of the auxiliary form that runs beside everything else"
    )
    parser.add_argument("--split", choices=IMAGES["shapes"], default="val", help="what the detectors are evaluated on")
    lengths = "by dataset: " + ", ".join(f"{name} %s" for name in LENGTHS)
    starts, runs = zip(*LENGTHS.values(), strict=True)
    parser.add_argument("--start-iterations", type=integer(2), help=f"of a start ({lengths % starts})")
    parser.add_argument("--iterations", type=integer(2), help=f"of each run from a start ({lengths % runs})")
    parser.add_argument("--results-only", action="store_true", help="rewrite table and plot and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the estimate and the commands and stop")
    parser.add_argument("--remark", default="", help="what to print below the table; the one that is there by default")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="-- KEY VALUE pairs for every run")
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


def planned(dataset: str, taps: str, methods: Sequence[str] = ()) -> list[Cell]:
    """The whole grid of a dataset, 2 bits first; ``methods`` that it does not have are added to LSQ's rows."""
    best = f"aux_{taps}"
    rows = [BASELINE, "extra", "distill", *(f"aux_{name}" for name in TAPS), f"{best}+extra", f"{best}+distill"]
    rows += [TWO_STAGE, f"{best}+{TWO_STAGE}", f"{best}+distill+{TWO_STAGE}"]
    if dataset == "bccd":
        rows = [BASELINE, "distill", best, f"{best}+distill", f"{best}+{TWO_STAGE}", f"{best}+distill+{TWO_STAGE}"]
    rows += [method for method in methods if method not in rows]
    cells = [Cell("retinanet", FLOAT, 32, method) for method in (BASELINE, TWO_STAGE)]
    cells += [Cell("retinanet", "lsq", bits, method) for bits in BITS for method in rows]
    if dataset == "bccd":
        cells += [Cell("retinanet", "dorefa", 4, method) for method in (BASELINE, best)]
    else:
        cells += [Cell("retinanet", name, 2, method) for name in OTHERS for method in (BASELINE, best)]
        cells += [Cell("fcos", FLOAT, 32, BASELINE), *(Cell("fcos", "lsq", 2, method) for method in (BASELINE, best))]
    return cells


def part_of_grid(args: argparse.Namespace, cells: Sequence[Cell]) -> list[Cell]:
    """The rows of the detectors and quantizers asked for; full precision always is among them.

    Full precision of two stages is a row beside LSQ's.
    """

    def fits(cell: Cell) -> bool:
        quantizer = "lsq" if cell.quantizer == FLOAT else cell.quantizer
        return cell == cell.reference or not args.quantizers or quantizer in args.quantizers

    return [cell for cell in cells if fits(cell) and (not args.detectors or cell.detector in args.detectors)]


def is_usual(args: argparse.Namespace) -> bool:
    """Whether starts and runs have the lengths that the grid is sized for."""
    return (args.start_iterations, args.iterations) == LENGTHS[args.dataset]


def part_name(args: argparse.Namespace) -> str:
    """Dataset, and what the options leave of the grid: ``shapes retinanet lsq``, then what else is not as usual."""
    unusual = [] if is_usual(args) else [f"{args.start_iterations}+{args.iterations}"]
    unusual += [args.split] * (args.split != "val")
    return " ".join([args.dataset, *(args.detectors or ()), *(args.quantizers or ()), *unusual])


def chosen(args: argparse.Namespace, cell: Cell) -> bool:
    """Whether the options leave a row's runs in; full precision from the usual start always is."""
    is_wanted = (not args.methods or cell.method in args.methods) and cell.bits in (32, *args.bits)
    return cell == cell.reference or is_wanted


def declared(args: argparse.Namespace, *splits: str) -> list[str]:
    """``KEY VALUE`` that makes the splits known; those of the embedded dataset always are."""
    if args.dataset != "bccd":
        return []
    entries = [{"name": f"bccd_{s}", "format": "voc", "root": args.bccd_root, "split": s} for s in splits]
    return ["DATASETS.DECLARED", str(entries)]


def config_of(dataset: str, cell: Cell) -> Path:
    """The shipped config that a cell is trained with, by its stage and bits; full precision has that of 4 bits."""
    folder = ROOT / "configs" / DATASETS[dataset]
    kinds = ["fp_bn_aux"] if cell.quantizer == START else ["lsq_w2a2_aux"] * (cell.bits == 2) + ["lsq_w4a4_aux"]
    return next(path for kind in kinds if (path := folder / f"{cell.detector}_r18_{kind}.yaml").is_file())


def make_jobs(args: argparse.Namespace, cells: Sequence[Cell]) -> dict[tuple[int, Cell], Job]:
    """The runs in their order: seed by seed, each detector's start before what starts from it."""
    from jobs import Job

    data = declared(args, "train", "val")
    usual_start, usual_run = LENGTHS[args.dataset]

    def name_of(cell: Cell) -> str:
        length = "" if args.start_iterations == usual_start else f"_from{args.start_iterations}"
        if cell.quantizer != START and args.iterations != usual_run:
            length += f"_{args.iterations}"
        return f"{cell}{length}"

    jobs: dict[tuple[int, Cell], Job] = {}

    def add(seed: int, cell: Cell) -> Job:
        if (seed, cell) in jobs:
            return jobs[seed, cell]
        folder = os.path.join(args.output, args.dataset, f"seed{seed}")
        is_start = cell.quantizer == START
        sources = {}
        if not is_start:
            sources[STATE] = add(seed, cell.start(args.taps))
        if "distill" in cell.parts:
            sources[STRIPPED] = add(seed, cell.teacher)
        weights, teacher = (
            os.path.join(sources[name].output_dir, name) if name in sources else "" for name in (STATE, STRIPPED)
        )
        iterations = args.start_iterations if is_start else args.iterations
        overrides = [
            *data,
            "SEED",
            str(seed),
            "SOLVER.MAX_ITER",
            str(iterations),
            "SOLVER.CHECKPOINT_PERIOD",
            str(iterations // 2),
        ]
        overrides += [*cell.overrides(weights, teacher), *args.opts]
        jobs[seed, cell] = Job(
            name=f"seed {seed} {name_of(cell)}",
            config=os.path.relpath(config_of(args.dataset, cell)),
            overrides=tuple(overrides),
            output_dir=os.path.join(folder, name_of(cell)),
            iterations=iterations,
            sources=tuple(sources.values()),
        )
        return jobs[seed, cell]

    for seed in args.seeds:
        for cell in cells:
            add(seed, cell)
    return jobs


def evaluations(args: argparse.Namespace, jobs: dict[tuple[int, Cell], Job]) -> dict[tuple[int, Cell], Job]:
    """The evaluation of each run's detector on ``args.split``, where training has not evaluated it."""
    from jobs import Job

    if args.split == "val":
        return {}
    name = f"{'bccd' if args.dataset == 'bccd' else 'aqdet_shapes'}_{args.split}"
    return {
        key: Job(
            name=f"{job.name} on {args.split}",
            config=job.config,
            overrides=(
                *job.overrides,
                *declared(args, "train", args.split),
                *("DATASETS.TEST", f"('{name}',)", "MODEL.WEIGHTS", os.path.join(job.output_dir, STRIPPED)),
            ),
            output_dir=os.path.join(job.output_dir, args.split),
            iterations=1,
            sources=(job,),
            eval_only=True,
        )
        for key, job in jobs.items()
    }


def prune(job: Job, first_seed: int) -> None:
    """Deletes what nothing reads later: a grid of whole checkpoints takes 50 GB.

    Kept are the stripped detector, a start's ``model_final.pth``, and of the first seed's runs the checkpoint of half
    way, for tools/experiments/gradient_evidence.py.
    """
    folder = Path(job.output_dir)
    keep = {STRIPPED}
    if f"_{START}" in folder.name:
        keep.add(STATE)
    elif folder.parent.name == f"seed{first_seed}":
        keep.update(path.name for path in sorted(folder.glob("model_0*.pth"))[:1])
    for path in folder.glob("*.pth"):
        if path.name not in keep:
            path.unlink()


def kept_runs() -> dict[str, dict[str, Any]]:
    """What runs gave, of any grid, by dataset and the run's name."""
    path = ROOT / "tools" / "experiments" / RUNS
    return json.loads(path.read_text()) if path.is_file() else {}


def keep_runs(dataset: str, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """Adds the finished runs to what is kept, and returns it."""
    from aqdet.utils.files import to_json, write_text

    kept = kept_runs()
    for job in jobs:
        noted = job.finished()
        if noted is not None:
            noted.pop("command")
            kept[f"{dataset} {job.name}"] = {**noted, "metrics": job.metrics()}
    write_text(ROOT / "tools" / "experiments" / RUNS, to_json(kept, indent=1, sort_keys=True) + "\n")
    return kept


def recall_runs(dataset: str, jobs: Sequence[Job]) -> None:
    """Puts what is kept into the output folders, so that it is not run again; a job's sources must come before it.

    What another run needs the weights of is run again where they are not there: starts, full-precision runs that
    distillation learns from, and what is still to be evaluated.
    """
    from jobs import DONE

    from aqdet.utils.files import write_json

    kept = kept_runs()

    def recall(job: Job) -> None:
        noted = kept.get(f"{dataset} {job.name}")
        if job.finished() is None and noted is not None and noted["fingerprint"] == job.fingerprint():
            folder = Path(job.output_dir)
            write_json(folder / "inference" / "metrics.json", noted["metrics"])
            facts = {key: value for key, value in noted.items() if key != "metrics"}
            write_json(folder / DONE, {**facts, "command": " ".join(job.command("tools/train_net.py"))})

    for job in jobs:
        recall(job)
    for job in reversed(jobs):
        for source in job.sources if job.finished() is None else ():
            files = (os.path.join(source.output_dir, name) for name in (STATE, STRIPPED))
            if any(path in job.overrides and not os.path.isfile(path) for path in files):
                Path(source.output_dir, DONE).unlink(missing_ok=True)


def estimate(args: argparse.Namespace, jobs: Sequence[Job]) -> str:
    """What is left to run, and how long that takes."""
    done = [(job, noted) for job in jobs if (noted := job.finished()) is not None]
    left = sum(job.iterations for job in jobs) - sum(job.iterations for job, _ in done)
    pace, source = SECONDS[args.dataset], "as on two quiet cores"
    if done:
        pace = sum(noted["seconds"] for _, noted in done) / sum(job.iterations for job, _ in done)
        source = f"as the {len(done)} finished runs"
    return (
        f"{len(jobs)} runs, {len(done)} of them finished: {left} iterations left, about {left * pace / 3600:.1f} hours "
        f"at {pace:.2f} s each ({source})"
    )


def make_rows(
    seeds: Sequence[int], cells: Sequence[Cell], done: dict[tuple[int, Cell], dict[str, Any]]
) -> list[list[str]]:
    """Rows of the table from the metrics of finished runs; none for a cell without one."""
    from results_file import mean_and_spread

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
                ", ".join(f"{ap:.1f}" for ap in found.values()),
            ]
        )
    return rows


def make_plot(
    path: str, seeds: Sequence[int], cells: Sequence[Cell], done: dict[tuple[int, Cell], dict[str, Any]]
) -> None:
    """A panel for each detector and quantizer: AP by method, a dot a seed, a bar for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from aqdet.utils.files import replacing

    panels: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        if cell.quantizer != FLOAT and any((s, cell) in done for s in seeds):
            panels.setdefault((cell.detector, cell.quantizer, cell.bits), []).append(cell)
    if not panels:
        return
    heights = [len(found) + 1 for found in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(8, 0.35 * sum(heights) + 0.5 * len(panels)),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for ax, ((detector, quantizer, bits), found) in zip(axes[:, 0], panels.items(), strict=True):
        reference = found[0].reference
        for row, cell in enumerate([reference, *found]):
            points = [done[s, cell]["AP"] for s in seeds if (s, cell) in done and done[s, cell]["AP"] is not None]
            colour = "grey" if cell == reference else "tab:blue"
            ax.plot(points, [row] * len(points), "o", color=colour, alpha=0.6)
            if points:
                ax.plot([statistics.mean(points)], [row], "|", color=colour, markersize=16, markeredgewidth=2)
        ax.set_yticks(range(len(found) + 1), ["full precision", *(cell.method for cell in found)])
        ax.set_ylim(len(found) + 0.5, -0.5)
        ax.grid(axis="x", alpha=0.3)
        ax.set_title(f"{detector}, {quantizer} w{bits}a{bits}", fontsize="medium")
    axes[-1, 0].set_xlabel("AP of the detector alone, in percent: a dot a seed, a bar their mean")
    with replacing(path, keep_ending=True) as aside:
        figure.savefig(aside, dpi=120)
    plt.close(figure)


def learning_rates(jobs: dict[tuple[int, Cell], Job]) -> str:
    """A clause with the optimizer and the learning rate of each kind of run."""
    from aqdet.config import load_config

    kinds: dict[str, dict[str, None]] = {}
    several = len({cell.detector for _, cell in jobs}) > 1
    for (_, cell), job in jobs.items():
        solver = load_config(job.config, job.overrides).SOLVER
        names = {START: "starts", FLOAT: "full precision"}
        kind = f"{cell.detector} " * several + names.get(cell.quantizer, f"{cell.bits} bits")
        kinds.setdefault(f"{solver.OPTIMIZER}, learning rate {solver.BASE_LR:g}", {})[kind] = None
    return "; ".join(f"{setting}: {', '.join(names)}" for setting, names in kinds.items())


def write_results(args: argparse.Namespace, cells: Sequence[Cell], jobs: dict[tuple[int, Cell], Job]) -> None:
    """The section of RESULTS.md and the plot, from what has finished, here or before."""
    import torch
    from results_file import LEFT_OUT, kept_remark, markdown_table, mean_and_spread, write_section

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
    header = ["detector", "quantizer", "method", "AP", "AP50", "− baseline", "− full precision", "AP by seed"]
    part = part_name(args)
    plot = Path("tools", "experiments", PLOTS, f"ablation_{part.replace(' ', '_')}.png")
    (ROOT / plot).parent.mkdir(parents=True, exist_ok=True)
    make_plot(str(ROOT / plot), args.seeds, cells, done)
    missing = []
    for cell in cells:
        if not chosen(args, cell):
            continue
        wanted = [seed for seed in args.seeds if not evaluated or noted(jobs[seed, cell]) is not None]
        absent = [str(seed) for seed in wanted if (seed, cell) not in done]
        if absent:
            missing.append(f"{cell} ({', '.join(absent)})")
    starts = {
        cell.detector + f" with {cell.method}" * (cell.method != BASELINE): cell
        for _, cell in done
        if cell.quantizer == START
    }
    lines = [
        f"{name} {mean_and_spread([done[s, cell]['AP'] for s in args.seeds if (s, cell) in done])}"
        for name, cell in starts.items()
    ]
    seeds = " ".join(map(str, args.seeds))
    command = f"python tools/experiments/ablation.py --dataset {args.dataset} --seeds {seeds}"
    command += " --bccd-root BCCD" * (args.dataset == "bccd")
    for option in ("detectors", "quantizers", "methods"):
        if getattr(args, option):
            command += " ".join([f" --{option}", *getattr(args, option)])
    if args.bits != list(BITS):
        command += " ".join([" --bits", *map(str, args.bits)])
    command += f" --taps {args.taps}"
    if not is_usual(args):
        command += f" --start-iterations {args.start_iterations} --iterations {args.iterations}"
    command += f" --split {args.split}" * (args.split != "val")
    command += " ".join([" --", *args.opts]) if args.opts else ""
    title = TITLES[args.dataset] + (f" ({part.partition(' ')[2]})" if " " in part else "")
    text = f"""### What helps: ResNet-18 detectors on {title}

For each seed one full-precision start of {args.start_iterations} iterations, and from it every run of
{args.iterations}, full precision included. COCO AP of the detector alone, in percent, on
{IMAGES[args.dataset][args.split]} images ({args.split}); mean ± sample standard deviation over the seeds that have
run (of {seeds}); differences are paired by seed: from the same start, but for two_stage, whose start has the path.

{markdown_table(header, make_rows(args.seeds, cells, done))}

![AP by method, a dot a seed]({plot.as_posix()})

AP of the starts: {", ".join(lines)}. {learning_rates(jobs)}.

Command: `{command}`. {" to ".join(sorted({min(dates), max(dates)}))}, {"; ".join(sorted(machines))},
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


def main() -> None:
    args = parse_args()
    from jobs import run_jobs  # late, so that --help opens at once

    try:
        cells = part_of_grid(args, planned(args.dataset, args.taps, args.methods or ()))
        jobs = make_jobs(args, cells)
        run = make_jobs(args, [cell for cell in cells if chosen(args, cell)])
        trainings, evaluated = list(run.values()), list(evaluations(args, run).values())
        recall_runs(args.dataset, [*trainings, *evaluated])
        train_net = os.path.relpath(ROOT / "tools" / "train_net.py")
        print(estimate(args, trainings), flush=True)
        if args.dry_run:
            for job in [*trainings, *evaluated]:
                print(" ".join(job.command(train_net)))
            return
        try:
            if not args.results_only:
                run_jobs(trainings, train_net, lambda job: prune(job, args.seeds[0]))
                run_jobs(evaluated, train_net)
        finally:
            write_results(args, cells, jobs)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to continue")


if __name__ == "__main__":
    run_console(main)
