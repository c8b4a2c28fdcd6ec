"""The trainings and evaluations of the ablation's rows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ablation_grid import FLOAT, LENGTHS, START, WIDTH, Cell
from jobs import Job
from kept_runs import STATE, STRIPPED

from aqdet.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"shapes": "quickstart", "bccd": "BCCD", "cards": "BCCD"}
"""The folder of each dataset's configs."""
SECONDS = {"shapes": 0.6, "bccd": 0.9, "cards": 0.9}
"""Duration of an iteration on two quiet cores, in seconds; used until runs in the output folder tell it."""


def declared(args: argparse.Namespace, *splits: str) -> list[str]:
    """Returns the ``KEY VALUE`` that declares splits of photographs; the embedded dataset needs no declaration."""
    if args.dataset == "shapes":
        return []
    root = {"bccd": args.bccd_root, "cards": args.cards_root}[args.dataset]
    entries = [{"name": f"{args.dataset}_{s}", "format": "voc", "root": root, "split": s} for s in splits]
    return ["DATASETS.DECLARED", str(entries)]


def fitted(args: argparse.Namespace) -> list[str]:
    """Returns the ``KEY VALUE`` that fit a config to the dataset and to the width of the network."""
    found = []
    if args.dataset == "cards":  # with the config of the other photographs
        found += ["DATASETS.TRAIN", "('cards_train',)", "DATASETS.TEST", "('cards_val',)"]
        found += ["MODEL.RETINANET.NUM_CLASSES", "6"]
    if args.width != WIDTH:
        for key in ("RESNETS.STEM_OUT_CHANNELS", "RESNETS.RES2_OUT_CHANNELS"):
            found += [f"MODEL.{key}", str(args.width)]
        found += ["MODEL.FPN.OUT_CHANNELS", str(2 * args.width)]
    return found


def config_of(dataset: str, cell: Cell) -> Path:
    """Returns the shipped config that a row is trained with; full precision has that of 4 bits, with overrides."""
    folder = ROOT / "configs" / CONFIGS[dataset]
    kinds = ["fp_bn_aux"] if cell.quantizer == START else ["lsq_w2a2_aux"] * (cell.bits == 2) + ["lsq_w4a4_aux"]
    return next(path for kind in kinds if (path := folder / f"{cell.detector}_r18_{kind}.yaml").is_file())


def make_jobs(args: argparse.Namespace, cells: Sequence[Cell]) -> dict[tuple[int, Cell], Job]:
    """Returns the trainings by seed and row, each after the ones whose checkpoints it reads."""
    data = [*declared(args, "train", "val"), *fitted(args)]
    usual_start, usual_run = LENGTHS[args.dataset]

    def name_of(cell: Cell) -> str:
        length = f"_width{args.width}" * (args.width != WIDTH)
        length += "" if args.start_iterations == usual_start else f"_from{args.start_iterations}"
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
    """Returns the evaluations of trained detectors on ``args.split``.

    There are none for "val", which each training ends with.
    """
    if args.split == "val":
        return {}
    name = f"{'aqdet_shapes' if args.dataset == 'shapes' else args.dataset}_{args.split}"
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
    """Deletes the checkpoints that nothing reads later, since a grid of whole checkpoints takes 50 GB.

    It keeps the stripped detector, a start's ``model_final.pth`` and, for tools/experiments/gradient_evidence.py, the
    first seed's checkpoints of half way.
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


def estimate(args: argparse.Namespace, jobs: Sequence[Job]) -> str:
    """Returns a sentence on how much is left to run, and how long that takes."""
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


def learning_rates(jobs: dict[tuple[int, Cell], Job]) -> str:
    """Returns a clause with the optimizer and the learning rate of each kind of run."""
    kinds: dict[str, dict[str, None]] = {}
    several = len({cell.detector for _, cell in jobs}) > 1
    for (_, cell), job in jobs.items():
        solver = load_config(job.config, job.overrides).SOLVER
        names = {START: "starts", FLOAT: "full precision"}
        kind = f"{cell.detector} " * several + names.get(cell.quantizer, f"{cell.bits} bits")
        kinds.setdefault(f"{solver.OPTIMIZER}, learning rate {solver.BASE_LR:g}", {})[kind] = None
    return "; ".join(f"{setting}: {', '.join(names)}" for setting, names in kinds.items())
