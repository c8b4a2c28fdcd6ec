#!/usr/bin/env python
"""Measures what quantized training costs beside the float model, in one run.

    python tools/benchmark.py train [--size 256] [--batch 4] [--fpn-channels 64] [--rounds 7]

Every figure is a ratio against the float detector of the same structure; rounds visit all variants in turn, so that a
slow moment of the machine hits all of them, and a ratio is taken within its round.
"""

import argparse
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from aqdet.config import load_config
from aqdet.quantization import calibrate

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "BCCD"
VARIANTS = {
    "float": "fp_bn",
    "LSQ w4a4": "lsq_w4a4",
    "LSQ w4a4 + auxiliary": "lsq_w4a4_aux",
    "DoReFa w4a4": "dorefa_w4a4",
    "DoReFa w4a4 + auxiliary": "dorefa_w4a4_aux",
}


def make_batch(num_images: int, size: int) -> list[dict[str, Any]]:
    """Random images with eight boxes each."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(num_images):
        instances = Instances((size, size))
        corner = torch.rand(8, 2, generator=generator) * size * 0.6
        side = 16 + torch.rand(8, 2, generator=generator) * size * 0.3
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        instances.gt_classes = torch.randint(0, 3, (8,), generator=generator)
        image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": size, "width": size})
    return batch


def build(config: str, args: argparse.Namespace, batch: list[dict[str, Any]]) -> Callable[[], torch.Tensor]:
    """A function that runs a detector's forward and returns the loss."""
    torch.manual_seed(0)
    overrides = ["MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", str(args.fpn_channels)]
    model = build_model(load_config(CONFIGS / f"retinanet_r18_{config}.yaml", overrides))

    def forward() -> torch.Tensor:
        with EventStorage(0):
            return sum(model(batch).values())

    def run() -> None:
        with torch.no_grad():
            forward()

    calibrate(model, run, method="minmax")
    return forward


def saved_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that are alive after a forward and were not before: what backward needs, and the loss."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loss = forward()
    net = sum(event.self_cpu_memory_usage for event in record.key_averages())
    loss.backward()
    return net


def train(args: argparse.Namespace) -> None:
    """Time of a training step and bytes kept for backward."""
    batch = make_batch(args.batch, args.size)
    forwards = {name: build(config, args, batch) for name, config in VARIANTS.items()}
    for forward in forwards.values():
        for _ in range(3):
            forward().backward()
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", end="\r", file=sys.stderr)
        for name, forward in forwards.items():
            start = time.perf_counter()
            forward().backward()
            seconds[name].append(time.perf_counter() - start)
    kept = {name: saved_bytes(forward) for name, forward in forwards.items()}
    rows = []
    for name, times in seconds.items():
        ratios = [t / f for t, f in zip(times, seconds["float"], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append(
            [
                name,
                statistics.median(times) / args.batch,
                f"{statistics.median(ratios):.2f}x ({spread})",
                kept[name] / args.batch / 1e6,
                f"{kept[name] / kept['float']:.2f}x",
            ]
        )
    print(
        f"RetinaNet, ResNet-18, FPN {args.fpn_channels}, BN, {args.size}x{args.size}, batch {args.batch}; "
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"median of {args.rounds} rounds (range)"
    )
    print(tabulate(rows, ["training step", "s / image", "time", "MB / image kept", "kept"], floatfmt=".3f"))


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("train", help=train.__doc__)
    sub.add_argument("--size", type=int, default=256, help="height and width of the images")
    sub.add_argument("--batch", type=int, default=4)
    sub.add_argument("--fpn-channels", type=int, default=64)
    sub.add_argument("--rounds", type=int, default=7)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
