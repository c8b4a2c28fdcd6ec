#!/usr/bin/env python
"""Measures quantized detectors beside the float model in one run, or counts a training step's cost on a GPU.

    python tools/benchmark.py train [--size 128 256] [--batch 1 4] [--fpn-channels 64 256] [--rounds 7] [--threads 2]
        [--peers]
    python tools/benchmark.py export --model DIR --config-file X --weights W [--size 320] [--threads 2] [--rounds 30]
    python tools/benchmark.py step --config-file X [--config-file Y] [--precision fp32 fp16 bf16] [--size 800 1344]
        [--batch 2] [--rounds 20] [KEY VALUE ...]        torchrun --nproc_per_node N tools/benchmark.py step ...
    python tools/benchmark.py count --config-file X [--config-file Y] [--size 800 1344] [--batch 2] [--details 12]
        [--processes 8] [--kernels fused] [KEY VALUE ...]

Every speed is a ratio against the float detector of the same structure. Rounds visit all variants in turn, so that a
slow moment of the machine hits all of them, and a ratio is taken within its round. On a machine that is shared with
others, use `--threads 1`, and in training read the column of processor time.
"""

import argparse
import os
import sys

from aqdet.utils.arguments import Distinct, add_overrides, existing, file_to_read, integer
from aqdet.utils.console import run_console


def run_train(args: argparse.Namespace) -> None:
    """Measures the time of a training step, and the bytes kept for backward and at the peak."""
    # PyTorch reads it when it is loaded; its profiler would print lines about itself for every measurement.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from benchmark_train import train

    train(args)


def run_step(args: argparse.Namespace) -> None:
    """Measures whole training steps of configs against the first one, on the GPU or GPUs, or on the CPU."""
    from benchmark_step import step

    step(args)


def run_export(args: argparse.Namespace) -> None:
    """Measures latency, memory and size of an exported detector beside its float model."""
    from benchmark_export import export

    export(args)


def run_count(args: argparse.Namespace) -> None:
    """Counts launches, bytes, waits and collectives of a training step on a GPU, without one."""
    from benchmark_count import count

    count(args)


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Adds what a step of COCO's shape is of: configs, and the images of a process."""
    parser.add_argument("--config-file", type=file_to_read, action="append", required=True, help="may be repeated")
    parser.add_argument(
        "--size",
        type=integer(32, multiple_of=32),
        nargs=2,
        default=[800, 1344],
        metavar=("HEIGHT", "WIDTH"),
        help="height and width of the images (default: %(default)s)",
    )
    parser.add_argument("--batch", type=integer(1), default=2, help="images of one process (default: %(default)s)")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    positive = integer(1)
    sub = commands.add_parser("train", help=run_train.__doc__)
    sub.add_argument(
        "--size",
        type=positive,
        nargs="+",
        action=Distinct,
        default=[256],
        help="height and width of the images (default: %(default)s)",
    )
    sub.add_argument(
        "--batch", type=positive, nargs="+", action=Distinct, default=[4], help="images a step (default: %(default)s)"
    )
    sub.add_argument(
        "--fpn-channels",
        type=positive,
        nargs="+",
        action=Distinct,
        default=[64],
        help="channels of the pyramid (default: %(default)s)",
    )
    sub.add_argument("--rounds", type=positive, default=7, help="measured steps of each variant (default: %(default)s)")
    sub.add_argument("--threads", type=positive, help="threads of PyTorch, which chooses if absent")
    sub.add_argument("--peers", action="store_true", help="compare with the implementations of tools/peers.py too")
    sub.set_defaults(run=run_train)
    sub = commands.add_parser("export", help=run_export.__doc__)
    sub.add_argument("--model", type=existing, required=True, metavar="DIR", help="exported detector")
    sub.add_argument("--config-file", type=file_to_read, required=True, help="config that it was exported with")
    sub.add_argument("--weights", type=file_to_read, required=True, help="checkpoint that it was exported from")
    sub.add_argument(
        "--float-weights",
        type=file_to_read,
        metavar="FILE",
        help="checkpoint in full precision for the rows of float and of post-training int8, as the one that --weights "
        "was trained from (default: --weights with its quantizers off)",
    )
    sub.add_argument("--image", type=file_to_read, help="image to run on, resized to a square; random blocks if absent")
    sub.add_argument(
        "--calibration",
        type=existing,
        metavar="PATH",
        help="image or folder that post-training int8 is calibrated on (default: the measured image)",
    )
    sub.add_argument("--dataset", metavar="NAME", default="", help="also evaluate every form on it (AP)")
    sub.add_argument("--size", type=positive, default=320, help="height and width of the image (default: %(default)s)")
    sub.add_argument("--threads", type=positive, default=os.cpu_count(), help="threads (default: %(default)s)")
    sub.add_argument("--rounds", type=positive, default=30, help="measured runs of each network (default: %(default)s)")
    add_overrides(sub)
    sub.set_defaults(run=run_export)
    sub = commands.add_parser("step", help=run_step.__doc__)
    add_shape(sub)
    sub.add_argument(
        "--precision",
        nargs="+",
        action=Distinct,
        choices=("fp32", "fp16", "bf16"),
        default=["fp32"],
        help="precisions of autocast (default: %(default)s)",
    )
    sub.add_argument(
        "--compile", action="store_true", help="also with trunk and heads compiled by torch.compile (minutes)"
    )
    sub.add_argument("--rounds", type=positive, default=20, help="measured steps of each (default: %(default)s)")
    add_overrides(sub)
    sub.set_defaults(run=run_step)
    sub = commands.add_parser("count", help=run_count.__doc__)
    add_shape(sub)
    sub.add_argument(
        "--processes",
        type=positive,
        default=8,
        help="that synchronized norms share a batch with (default: %(default)s)",
    )
    sub.add_argument(
        "--details",
        type=integer(0),
        default=0,
        metavar="N",
        help="also print the N operations that move most, and every wait (default: %(default)s)",
    )
    add_overrides(sub)
    sub.add_argument(
        "--kernels",
        default="fused",
        choices=("plain", "lean", "fused"),
        help="kernels of quantization; GPUs use the fused ones (default: %(default)s)",
    )
    sub.set_defaults(run=run_count)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        args.run(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_console(main)
