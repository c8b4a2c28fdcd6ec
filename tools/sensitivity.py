#!/usr/bin/env python
"""Measures what few bits cost in each part of a detector, without training.

The program quantizes one group of layers after another, weights and inputs, in an otherwise full-precision detector.
The cost is the rise of the loss on some training batches or, with --metric ap, the fall of AP on DATASETS.TEST. The
program writes sensitivity.json, which tools/allocate_bits.py reads, and a picture.

    python tools/sensitivity.py --config-file configs/quickstart/retinanet_r18_lsq_w4a4.yaml --output output/sensitivity
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqdet.utils.arguments import Distinct, add_overrides, add_plan_size, folder_to_write, integer
from aqdet.utils.console import run_console
from aqdet.utils.files import replacing, write_json

if TYPE_CHECKING:
    from torch import nn

    from aqdet.analysis.sensitivity import Sensitivity


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file",
        required=True,
        help="config of a quantized detector, whose MODEL.WEIGHTS are a full-precision detector's",
    )
    parser.add_argument("--output", type=folder_to_write, required=True, help="folder for sensitivity.json and .png")
    parser.add_argument(
        "--bits",
        type=integer(2, 8),
        nargs="+",
        action=Distinct,
        default=[2, 3, 4, 8],
        help="bit widths (default: 2 3 4 8)",
    )
    parser.add_argument(
        "--by", choices=("layer", "block", "part"), default="layer", help="size of a group (default: %(default)s)"
    )
    parser.add_argument(
        "--metric", choices=("loss", "ap"), default="loss", help="measure of the cost (default: %(default)s)"
    )
    parser.add_argument(
        "--batches", type=integer(1), default=8, help="number of batches of training data (default: %(default)s)"
    )
    add_plan_size(parser, "image in pixels for which MACs are counted")
    add_overrides(parser)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> Sensitivity:
    """Loads the detector and measures it."""
    import itertools

    from aqdet.analysis.sensitivity import PartlyQuantized, measure_sensitivity
    from aqdet.config import load_config
    from aqdet.data import complete_num_classes, register_declared
    from aqdet.engine import Trainer, check_config, fit_to_machine
    from aqdet.utils.progress import progress_bar

    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    fit_to_machine(cfg)
    register_declared(cfg)
    complete_num_classes(cfg)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = max(cfg.SEED, 0)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS is empty: name the checkpoint of the full-precision detector")
    batches = list(itertools.islice(Trainer.build_train_loader(cfg), args.batches))
    detector = PartlyQuantized(cfg, cfg.MODEL.WEIGHTS, batches, args.bits)
    if detector.kept:
        print(f"{len(detector.kept)} layers are not measured, since MODEL.QUANT.RULES decide for them")

    def average_precision(model: nn.Module) -> float:
        logging.disable(logging.INFO)
        try:
            return float(Trainer.test(cfg, model)["bbox"]["AP"])
        finally:
            logging.disable(logging.NOTSET)

    def progress(pairs: list[tuple[str, int]]) -> Iterable[tuple[str, int]]:
        return progress_bar(pairs, unit="measurement")

    metric = average_precision if args.metric == "ap" else None
    return measure_sensitivity(detector, by=args.by, size=tuple(args.size), metric=metric, progress=progress)


def draw(found: Sensitivity, metric: str, path: Path) -> None:
    """Draws a row a group and a column a bit width."""
    import matplotlib

    matplotlib.use("agg")
    import numpy as np
    from matplotlib import pyplot

    groups, bits = list(found.costs), sorted(next(iter(found.costs.values())))
    values = np.array([[found.costs[group][width] for width in bits] for group in groups])
    figure, axes = pyplot.subplots(figsize=(2.5 + 1.1 * len(bits), 1.5 + 0.22 * len(groups)), layout="constrained")
    largest = max(float(np.abs(values).max()), 1e-12)
    image = axes.imshow(np.maximum(values, 0) ** 0.5, aspect="auto", cmap="OrRd", vmin=0, vmax=largest**0.5)
    axes.set_xticks(range(len(bits)), [f"{width} bits" for width in bits])
    axes.set_yticks(range(len(groups)), groups, fontsize=7)
    for (row, column), value in np.ndenumerate(values):
        dark = value > 0.4 * largest
        axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_title(f"{'loss added' if metric == 'loss' else 'AP lost'} by quantizing this alone", fontsize=10)
    image.set_clim(0, largest**0.5)
    with replacing(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
    pyplot.close(figure)


def table(found: Sensitivity) -> Iterator[list[Any]]:
    """Yields a row a group, the most costly at the fewest bits first."""
    least = min(next(iter(found.costs.values())))
    for group in sorted(found.costs, key=lambda name: -found.costs[name][least]):
        macs = sum(found.macs[name] for name in found.layers[group])
        yield [group, macs / 1e6, *(cost for _, cost in sorted(found.costs[group].items()))]


def main() -> None:
    args = parse_args()
    import dataclasses

    from tabulate import tabulate

    try:
        found = measure(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"metric": args.metric, "config": args.config_file, **dataclasses.asdict(found)}
    write_json(str(folder / "sensitivity.json"), content)
    draw(found, args.metric, folder / "sensitivity.png")
    what = "loss" if args.metric == "loss" else "AP"
    print(f"In full precision: {what} {found.baseline:.4g}. Alone at few bits, {what} changes for the worse by:")
    print(tabulate(table(found), ["part", "MMACs", *(f"{width} bits" for width in sorted(args.bits))], floatfmt=".3g"))
    print(f"written to {folder / 'sensitivity.json'} and {folder / 'sensitivity.png'}")


if __name__ == "__main__":
    run_console(main)
