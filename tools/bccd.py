#!/usr/bin/env python
"""Trains the BCCD comparison, seed by seed, and writes its table into RESULTS.md.

For each seed one full-precision start from scratch, and from it six runs of equal length: full precision,
LSQ and DoReFa at 4 bits, each without and with the auxiliary path. Stop it at any time and run it again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aqdet.utils.arguments import Distinct, existing, folder_to_write, integer

if TYPE_CHECKING:
    from aqdet.engine.experiment import Job

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "BCCD"
VARIANTS = {
    "fp_bn": "full precision, continued",
    "lsq_w4a4": "LSQ w4a4",
    "lsq_w4a4_aux": "LSQ w4a4 + auxiliary",
    "dorefa_w4a4": "DoReFa w4a4",
    "dorefa_w4a4_aux": "DoReFa w4a4 + auxiliary",
    "fp_bn_aux": "full precision + auxiliary, continued",
}
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
BATCH = 4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd-root", type=existing, required=True, help="VOC folder of BCCD")
    parser.add_argument("--output", type=folder_to_write, default="output/bccd", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=integer(0), nargs="+", action=Distinct, default=[0, 1, 2])
    parser.add_argument("--start-epochs", type=integer(1), default=10, help="of each start (default: %(default)s)")
    parser.add_argument("--epochs", type=integer(1), default=4, help="of each of the runs from the start")
    parser.add_argument("--results-only", action="store_true", help="rewrite the table and stop")
    parser.add_argument("--remark", default="", help="what to print below the table; the one that is there by default")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    return parser.parse_args()


def make_jobs(args: argparse.Namespace, num_train: int) -> dict[tuple[int, str], Job]:
    """The grid, in the order in which it runs."""
    from aqdet.engine.experiment import Job

    images = os.path.join(args.bccd_root, "JPEGImages")
    declared = [
        {
            "name": f"bccd_{s}",
            "json": os.path.join(args.output, f"bccd_{s}.json"),
            "image_root": images,
        }
        for s in ("train", "val")
    ]
    jobs = {}
    for seed in args.seeds:
        start_dir = os.path.join(args.output, f"seed{seed}", "start")
        for key in ("start", *VARIANTS):
            start = key == "start"
            iterations = (args.start_epochs if start else args.epochs) * num_train // BATCH
            overrides = ["DATASETS.DECLARED", str(declared), "SEED", str(seed)]
            overrides += ["SOLVER.MAX_ITER", str(iterations)]
            if not start:
                overrides += ["MODEL.WEIGHTS", os.path.join(start_dir, "model_final.pth")]
            jobs[seed, key] = Job(
                name=f"seed {seed} {key}",
                config=os.path.relpath(CONFIGS / f"retinanet_r18_{'fp_bn' if start else key}.yaml"),
                overrides=tuple(overrides),
                output_dir=os.path.join(args.output, f"seed{seed}", key),
                iterations=iterations,
                sources=() if start else (jobs[seed, "start"],),
            )
    return jobs


def write_results(args: argparse.Namespace, jobs: dict[tuple[int, str], Job]) -> None:
    """The BCCD section of RESULTS.md, from the metrics files of finished jobs."""
    import torch

    from aqdet.engine.experiment import (
        LEFT_OUT,
        describe_machine,
        kept_remark,
        markdown_table,
        mean_and_spread,
        write_section,
    )

    done = {key: job for key, job in jobs.items() if job.finished() is not None}
    missing = [job.name for key, job in jobs.items() if key not in done]
    values = {key: job.metrics() for key, job in done.items()}

    def seeds_of(*keys: str) -> list[int]:
        return [s for s in args.seeds if all((s, key) in done for key in keys)]

    rows, paired = [], []
    for key, title in VARIANTS.items():
        finished = [done[s, key].finished()["seconds"] for s in seeds_of(key)]
        cells = [mean_and_spread([values[s, key][m] for s in seeds_of(key)]) for m in METRICS]
        per_seed = ", ".join(f"{values[s, key]['AP']:.1f}" for s in seeds_of(key)) or "-"
        minutes = f"{sum(finished) / len(finished) / 60:.1f} min" if finished else "-"
        rows.append([title, *cells, per_seed, minutes])
    pairs = [(key, "fp_bn") for key in VARIANTS if key != "fp_bn"]
    pairs += [("lsq_w4a4_aux", "lsq_w4a4"), ("dorefa_w4a4_aux", "dorefa_w4a4")]
    pairs += [("lsq_w4a4_aux", "fp_bn_aux"), ("dorefa_w4a4_aux", "fp_bn_aux")]
    for a, b in pairs:
        differences = [values[s, a]["AP"] - values[s, b]["AP"] for s in seeds_of(a, b)]
        each = ", ".join(f"{d:+.1f}" for d in differences) or "-"
        paired.append([f"{VARIANTS[a]} − {VARIANTS[b]}", mean_and_spread(differences), each])
    starts = mean_and_spread([values[s, "start"]["AP"] for s in seeds_of("start")])
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    dates = sorted({job.finished()["date"] for job in done.values()})
    flags = f"--start-epochs {args.start_epochs} --epochs {args.epochs}"
    seeds = " ".join(map(str, args.seeds))
    text = f"""## BCCD: RetinaNet, ResNet-18, 320x240, from scratch on a CPU

Train split to train (205 images), val split to evaluate (87). For each seed one full-precision start of
{args.start_epochs} epochs, and from it {len(VARIANTS)} runs of {args.epochs} epochs with the same schedule.
COCO AP of the detector alone, in percent, mean ± sample standard deviation over the seeds that have run (of {seeds}).

{markdown_table(["detector", *METRICS, "AP by seed", "time a run"], rows)}

The full-precision starts have AP {starts}.

Paired differences in AP, from the same start:

{markdown_table(["difference", "mean ± std", "by seed"], paired)}

Command: `python tools/bccd.py --bccd-root BCCD --seeds {seeds} {flags}`, which runs
`configs/BCCD/retinanet_r18_{{{",".join(VARIANTS)}}}.yaml`. {" to ".join(sorted({*dates[:1], *dates[-1:]}))},
table written at commit {commit}, {describe_machine()}, torch {torch.__version__}.
"""
    remark = args.remark or kept_remark(ROOT / "RESULTS.md", "bccd")
    if remark:
        text += f"\n{remark}\n"
    if missing:
        text += f"\n{LEFT_OUT}: {', '.join(missing)}.\n"
    write_section(ROOT / "RESULTS.md", "bccd", text)
    print(text)


def main() -> None:
    args = parse_args()
    # Late, so that --help opens at once.
    from aqdet.data.formats.voc import convert_voc
    from aqdet.engine.experiment import run_jobs

    try:
        num_train = 0
        for split in ("train", "val"):
            report = convert_voc(args.bccd_root, split, os.path.join(args.output, f"bccd_{split}.json"))
            print(f"BCCD {split}: {report}")
            num_train = num_train or report.num_images
        jobs = make_jobs(args, num_train)
        train_net = os.path.relpath(ROOT / "tools" / "train_net.py")
        if args.dry_run:
            for job in jobs.values():
                print(" ".join(job.command(train_net)))
            return
        if not args.results_only:
            run_jobs(list(jobs.values()), train_net)
        write_results(args, jobs)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to continue")


if __name__ == "__main__":
    main()
