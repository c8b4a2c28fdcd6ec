#!/usr/bin/env python
"""Quantizes a detector in full precision without training, and exports it: post-training quantization.

    python tools/quantize.py --config-file X --weights W --images photos --bits 8 --output detector
    python tools/quantize.py --config-file X --weights W --dataset NAME --bits 4 --output detector

The config and the checkpoint may be aqdet's, Detectron2's or its model zoo's, as they are. The program compares methods
of calibration and corrections by the error of the outputs. At the end it compares the full-precision detector with the
exported one, and says whether training at these bits is worth it. The exit status is 3 if --max-loss is exceeded.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqdet.utils.arguments import add_export_options, add_overrides, existing, file_to_write, integer
from aqdet.utils.console import errors_in_one_line, run_console, timed_lines

if TYPE_CHECKING:
    import numpy as np
    from detectron2.config import CfgNode

FEWER_BITS = RECONSTRUCTED = 4
MARK = "# Written by tools/quantize.py."
"""Beginning of the configs that it writes."""
METHODS = ("mse", "minmax", "percentile", "mean")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config of the full-precision detector")
    parser.add_argument("--weights", help="its checkpoint (default: MODEL.WEIGHTS)")
    add_export_options(parser)
    parser.add_argument(
        "--bits",
        type=integer(2, 8),
        default=8,
        help="bits of weights and inputs of all but the first and last layers (default: 8; weights have 7 then, since "
        "8 take twice the file and the time, unless MODEL.QUANT.WEIGHT.NUM_BITS 8 is given)",
    )
    parser.add_argument(
        "--images",
        type=existing,
        action="append",
        default=[],
        metavar="PATH",
        help="image or folder to calibrate on (default: the training set of the config, or --dataset)",
    )
    parser.add_argument(
        "--dataset", metavar="NAME", default="", help="evaluate the float and the exported detector on it"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        action="append",
        default=[],
        help="calibration method to try; several times for several (default: all)",
    )
    parser.add_argument(
        "--reconstruct",
        action=argparse.BooleanOptionalAction,
        help="also try weights rounded by the layers' outputs, which takes a minute (default: at up to "
        f"{RECONSTRUCTED} bits, where it gains)",
    )
    parser.add_argument("--max-images", type=integer(1), default=64, help="most images to calibrate on (default: 64)")
    parser.add_argument("--batch-size", type=integer(1), default=4, help="images in a calibration batch (default: 4)")
    parser.add_argument(
        "--save-checkpoint",
        type=file_to_write,
        metavar="FILE",
        help="also write the quantized checkpoint, from which export_model.py goes on, and its config (.yaml)",
    )
    add_overrides(parser)
    args = parser.parse_args()
    if args.max_loss is not None and not args.dataset:
        parser.error("argument --max-loss: name the --dataset that it is measured on")
    return args


def calibration_images(cfg: CfgNode, args: argparse.Namespace, say: Any) -> list[np.ndarray]:
    """Returns images resized for the network, (3, H, W): given ones, else the training set's, else the dataset's."""
    from aqdet.export.gate import dataset_records
    from aqdet.export.images import images_of, network_image, training_images

    if args.images:
        return images_of(cfg, args.images, args.max_images)
    images = training_images(cfg, args.max_images, lambda _: None)
    if images:
        say(f"calibrating on {len(images)} images of {cfg.DATASETS.TRAIN[0]}")
        return images
    if not args.dataset:
        raise ValueError("--images: name images to calibrate on, since the training set of the config is not at hand")
    _, records = dataset_records(cfg, args.dataset)
    number = min(args.max_images, len(records))
    say(f"calibrating on {number} images of {args.dataset}, the training set of the config is not at hand")
    return [network_image(cfg, records[i * len(records) // number]["file_name"]) for i in range(number)]


def make_batches(images: list[np.ndarray], size: int) -> list[list[dict[str, Any]]]:
    """Returns batches of images in the form of Detectron2's detectors."""
    import torch

    entries = [{"image": torch.tensor(i), "height": i.shape[1], "width": i.shape[2]} for i in images]
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def save(cfg: CfgNode, checkpoint: Path, file: Path) -> None:
    """Copies the checkpoint to the given file, and writes its config beside it."""
    from aqdet.utils.files import open_replacing, write_text

    file.parent.mkdir(parents=True, exist_ok=True)
    with open_replacing(file, "wb") as target:
        target.write(checkpoint.read_bytes())
    write_text(file.with_suffix(".yaml"), f"{MARK}\n{cfg.dump()}")


def quantize(args: argparse.Namespace, say: Any) -> None:
    """Quantizes, exports and compares."""
    from aqdet.checkpoint.files import save_atomically
    from aqdet.config import load_config
    from aqdet.data import complete_num_classes
    from aqdet.engine import check_config, fit_to_machine
    from aqdet.engine.post_training import check_quantizable, quantize_detector, quantized_overrides
    from aqdet.export.folder import export_detector
    from aqdet.export.gate import dataset_records
    from aqdet.export.post_training import advice, comparison, match_on_images, training_command
    from aqdet.utils.files import refuse_replacing

    full = load_config(args.config_file, args.opts)
    if args.save_checkpoint:
        beside = Path(args.save_checkpoint).with_suffix(".yaml")
        inputs = [args.weights or full.MODEL.WEIGHTS, args.config_file]
        refuse_replacing([("--save-checkpoint", args.save_checkpoint), ("the config beside it", beside)], inputs)
        if beside.exists() and not beside.read_text(errors="replace").startswith(MARK):
            raise ValueError(f"--save-checkpoint would replace {beside}, which it has not written: name another file")
    pairs = quantized_overrides(full, args.bits)
    cfg = load_config(args.config_file, [*pairs, *args.opts])
    check_quantizable(cfg)
    check_config(cfg)
    fit_to_machine(cfg)
    complete_num_classes(cfg)
    weights = args.weights or cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError("--weights: name a checkpoint in full precision")
    if args.dataset:
        dataset_records(cfg, args.dataset)
    images = calibration_images(cfg, args, say)
    say(f"loading {weights}")
    methods = list(dict.fromkeys(args.method)) or METHODS
    batches = make_batches(images, args.batch_size)
    reconstruct = args.bits <= RECONSTRUCTED if args.reconstruct is None else args.reconstruct
    made = quantize_detector(cfg, weights, batches, methods=methods, reconstruct=reconstruct, progress=say)
    say(f"chosen: {made.chosen}")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / f"{Path(weights).stem}_{args.bits}bit.pth"
        save_atomically({"model": made.model.state_dict()}, str(checkpoint))
        report = export_detector(
            cfg,
            str(checkpoint),
            args.output,
            images=images[:2],
            dataset=args.dataset,
            max_loss=args.max_loss,
            float_model=made.float_model.to("cpu"),
            force=args.force,
            licence=args.licence,
            end_to_end=args.end_to_end,
            config_name=os.path.basename(args.config_file),
            progress=say,
        )
        if args.save_checkpoint:
            save(cfg, checkpoint, Path(args.save_checkpoint))
    evaluation = report.get("evaluation")
    if evaluation:
        matches = evaluation["float_detections"]
    else:
        matches = match_on_images(cfg, made.float_model, args.output, images)
    train = Path(sys.argv[0]).with_name("train_net.py")
    program = f"python {os.path.relpath(train)}" if train.is_file() else "aqdet train"

    def command(bits: int) -> str:
        wanted = quantized_overrides(full, bits)
        return training_command(program, args.config_file, weights, wanted, full.SOLVER.BASE_LR, args.opts)

    print_table("Tried, and the error of the outputs:", [[a.name, f"{a.error:.5f}"] for a in made.attempts])
    print_table("", comparison(report, matches, f"{args.bits} bits, exported"))
    print(f"\n{advice(report, matches, args.bits, command(args.bits), command(FEWER_BITS))[1]}")


def print_table(title: str, rows: list[list[str]]) -> None:
    """Prints rows with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{title}" if title else "")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    args = parse_args()
    say = timed_lines()
    with errors_in_one_line():
        quantize(args, say)
    say(f"done: {args.output} (README.md, detector.json, report.md)")


if __name__ == "__main__":
    run_console(main)
