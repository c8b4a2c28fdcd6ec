#!/usr/bin/env python
"""Measures whether an added loss brings the gradient of a quantized trunk nearer to that of full precision.

The measure is the cosine, for each layer of a trunk in training, between the gradient of the quantized model and the
gradient of the same model with its quantizers off, on the same batches, with and without the losses of the auxiliary
path (or the extra head). The program reads the config.yaml and a checkpoint from the middle of a run with such losses,
for example output/ablation/shapes/seed0/retinanet_lsq_w2a2_aux_backbone/{config.yaml,model_0000199.pth}.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aqdet.utils.arguments import add_overrides, file_to_read, folder_to_write, integer
from aqdet.utils.console import run_console

if TYPE_CHECKING:
    from aqdet.analysis.gradients import Alignment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # machine.py
COLUMNS = {
    "own": "own losses",
    "all": "with added losses",
    "all_to_own": "with added losses, to the float gradient of the own",
    "beside_to_own": "added losses alone, to the float gradient of the own",
}
"""Field of ``Alignment`` -> title of its column."""
PART = re.compile(r"(stem|res\d|fpn_[a-z]+\d|p\d)")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", type=file_to_read, required=True, help="config.yaml of the run")
    parser.add_argument(
        "--weights", type=file_to_read, required=True, help="checkpoint of quantized training, model_<iteration>.pth"
    )
    parser.add_argument("--batches", type=integer(1), default=16, help="number of training batches")
    parser.add_argument(
        "--output", type=folder_to_write, default="output/gradients", help="folder of the table and the plot"
    )
    parser.add_argument("--section", help="also write the summary into RESULTS.md, under this name")
    add_overrides(parser)
    return parser.parse_args()


def mean(values: Sequence[float]) -> float:
    """Returns the mean of the values that are not nan; nan if all are."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.mean(known) if known else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean of the values that are not nan; 0 for fewer than two of them."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0


def number(value: float) -> str:
    """Returns a value with two decimals, or a dash for nan."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def by_part(found: Sequence[Alignment]) -> dict[str, list[Alignment]]:
    """Returns the layers of each stage of the backbone, then of the pyramid, then the others."""
    parts: dict[str, list[Alignment]] = {}
    for alignment in found:
        match = PART.search(alignment.layer)
        name = match.group(1) if match else "others"
        parts.setdefault(name if name.startswith(("stem", "res")) else "pyramid", []).append(alignment)
    order = ("stem", "res2", "res3", "res4", "res5", "pyramid", "others")
    return {name: parts[name] for name in order if name in parts}


def reached(found: Sequence[Alignment]) -> list[Alignment]:
    """Returns the layers that get a gradient from the added losses."""
    return [alignment for alignment in found if not all(map(math.isnan, alignment.beside_to_own))]


def gains(found: Sequence[Alignment]) -> list[float]:
    """Returns, for each batch, the mean over layers of the gain in cosine from the added losses.

    The cosines compared are those of the gradients of all losses, and of the own losses, with the float gradient of the
    own losses. Layers that the added losses do not reach are left out.
    """
    members = reached(found)
    return [mean([a.all_to_own[i] - a.own[i] for a in members]) for i in range(len(members[0].own))] if members else []


def make_table(found: Sequence[Alignment], summary: bool) -> str:
    """Returns a Markdown table of cosines, averaged over batches.

    Args:
        found: The layers.
        summary: Whether the table has a row for each stage, and one for the layers that the added losses reach, instead
            of a row for each layer.
    """
    from results_file import markdown_table

    groups = {alignment.layer.removeprefix("backbone."): [alignment] for alignment in found}
    if summary:
        groups = {**by_part(found), "reached by added losses": reached(found)}
    rows = [
        [f"{name} ({len(members)} layers)" if summary else name]
        + [number(mean([mean(getattr(a, column)) for a in members])) for column in COLUMNS]
        + [f"{sum(mean(a.all_to_own) > mean(a.own) for a in members)} of {len(members)}"] * summary
        for name, members in groups.items()
    ]
    return markdown_table(["layers", *COLUMNS.values(), *["nearer with"] * summary], rows)


def make_plot(found: Sequence[Alignment], path: str) -> None:
    """Draws a line for each column over the layers of the trunk, with the standard error over batches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from aqdet.utils.files import replacing

    layers = [alignment for members in by_part(found).values() for alignment in members]
    names = [alignment.layer.removeprefix("backbone.").removeprefix("bottom_up.") for alignment in layers]
    figure, ax = plt.subplots(figsize=(max(8, 0.3 * len(names)), 5), layout="constrained")
    for (column, title), style in zip(COLUMNS.items(), ("o-", "s-", "^--", "x:"), strict=True):
        values = [getattr(alignment, column) for alignment in layers]
        means, errors = ([of(v) for v in values] for of in (mean, standard_error))
        ax.errorbar(range(len(names)), means, errors, fmt=style, label=title, capsize=2, markersize=4)
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    ax.set_ylabel("cosine to the gradient without quantizers")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    with replacing(path, keep_ending=True) as aside:
        figure.savefig(aside, dpi=120)
    plt.close(figure)


def measure(args: argparse.Namespace) -> list[Alignment]:
    """Loads the run's model and returns the comparison of gradients on batches of its training data."""
    from aqdet.analysis.gradients import gradient_alignment
    from aqdet.config import load_config
    from aqdet.data import check_num_classes, register_declared
    from aqdet.engine import Trainer, build_checkpointer, check_config, fit_to_machine

    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    fit_to_machine(cfg)
    register_declared(cfg)
    check_num_classes(cfg)
    model = Trainer.build_model(cfg)
    build_checkpointer(cfg, model).load(args.weights, checkpointables=[])
    batches = itertools.islice(Trainer.build_train_loader(cfg), args.batches)
    return gradient_alignment(model, batches)


def main() -> None:
    args = parse_args()
    # Late, so that --help opens at once.
    import torch
    from machine import Machine
    from results_file import kept_remark, write_section

    from aqdet.utils.files import write_text

    try:
        found = measure(args)
        table = os.path.join(args.output, "gradients.md")
        plot = os.path.join("tools/experiments/plots" if args.section else args.output, "gradients.png")
        write_text(table, make_table(found, summary=False) + "\n")
        make_plot(found, plot)
        opts = "".join(f" {value}" for value in args.opts)
        text = f"""### Gradients of the trunk with and without quantizers

Cosine between the gradient of a layer's latent weights in the quantized model and in the same model with its quantizers
off: same weights and batches, batch norms by the batch's statistics. Mean over {args.batches} batches, then over
layers. "Nearer with": layers whose gradient of all losses is nearer to the float gradient of the detector's own losses
than that of the own losses is.

{make_table(found, summary=True)}

In the layers that the added losses reach, they bring the gradient nearer to the float gradient of the own losses by
{mean(gains(found)):.4f} ± {standard_error(gains(found)):.4f} (standard error over batches, paired).

![Cosine by layer]({plot})

By layer: `{table}`. Command: `python tools/experiments/gradient_evidence.py --config-file {args.config_file}
--weights {args.weights} --batches {args.batches}{f" --section {args.section}" if args.section else ""}{opts}`.
{time.strftime("%Y-%m-%d")}, {Machine.here()}, torch {torch.__version__}.
"""
        if args.section and (remark := kept_remark("RESULTS.md", args.section)):
            text += f"\n{remark}\n"
        print(text)
        if args.section:
            write_section("RESULTS.md", args.section, text)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_console(main)
