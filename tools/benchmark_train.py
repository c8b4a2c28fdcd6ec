"""Measurement of quantized training steps beside the float detector's, which ``benchmark.py train`` runs."""

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from machine import Machine
from peers import MakeConv, convert, peers, start_learning
from tabulate import tabulate
from torch import nn
from torch.profiler import ProfilerActivity, profile

from aqdet.analysis.plan import make_plan
from aqdet.config import load_config
from aqdet.quantization import calibrate, use_kernels
from aqdet.quantization.lean.integer import largest_integer_weight

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "BCCD"
DOREFA = ("MODEL.QUANT.WEIGHT.QUANTIZER", "dorefa", "MODEL.QUANT.INPUT.QUANTIZER", "dorefa")
VARIANTS = {
    "float": "fp_bn",
    "float, channels last": "fp_bn",
    "LSQ w4a4": "lsq_w4a4",
    "LSQ w4a4 + auxiliary": "lsq_w4a4_aux",
    "DoReFa w4a4": "lsq_w4a4",
    "DoReFa w4a4 + auxiliary": "lsq_w4a4_aux",
}
PEERS_FROM, PEERS_LIKE = "fp_bn", "lsq_w4a4"


def make_batch(num_images: int, height: int, width: int) -> list[dict[str, Any]]:
    """Returns random images with eight boxes each."""
    generator = torch.Generator().manual_seed(0)
    size = min(height, width)
    batch = []
    for _ in range(num_images):
        instances = Instances((height, width))
        corner = torch.rand(8, 2, generator=generator) * size * 0.6
        side = 16 + torch.rand(8, 2, generator=generator) * size * 0.3
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        instances.gt_classes = torch.randint(0, 3, (8,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


@dataclasses.dataclass
class Variant:
    """A detector, and the measurements of its steps.

    Attributes:
        model, batch: the detector and the images of a step.
        is_ours: whether it computes with our kernels; Detectron2's own detector and peers do not.
        seconds, processor: time of each step, and of the processor in it.
    """

    model: nn.Module
    batch: list[dict[str, Any]]
    is_ours: bool = True
    seconds: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)

    def loss(self) -> torch.Tensor:
        """Runs the forward pass alone."""
        ours_or_plain = contextlib.nullcontext() if self.is_ours else use_kernels("plain")
        with EventStorage(0), ours_or_plain:
            return sum(self.model(self.batch).values())

    def step(self) -> None:
        """Runs forward and backward passes without earlier gradients, as in training."""
        self.model.zero_grad(set_to_none=True)
        start = time.perf_counter(), time.process_time()
        self.loss().backward()
        self.seconds.append(time.perf_counter() - start[0])
        self.processor.append(time.process_time() - start[1])


def load(config: str, fpn_channels: int, *overrides: str) -> CfgNode:
    """Returns the config of a variant; the files have the auxiliary path, which a name without "aux" switches off."""
    with_path = config.endswith("_aux")
    overrides = (*overrides, "MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", str(fpn_channels))
    overrides = (*overrides, "MODEL.AUX.ENABLED", str(with_path))
    return load_config(CONFIGS / f"retinanet_r18_{config.removesuffix('_aux')}_aux.yaml", overrides)


def build(name: str, fpn_channels: int, batch: list[dict[str, Any]], make_conv: MakeConv | None = None) -> Variant:
    """Returns a calibrated detector and its batch; with ``make_conv``, a peer's detector."""
    torch.manual_seed(0)
    method = DOREFA if name.startswith("DoReFa") else ()
    model = build_model(load(PEERS_FROM if make_conv else VARIANTS[name], fpn_channels, *method))
    if make_conv:
        convert(model, load(PEERS_LIKE, fpn_channels), make_conv)
    if name.endswith("channels last"):
        model.to(memory_format=torch.channels_last)
        model.backbone.register_forward_pre_hook(
            lambda _, images: images[0].contiguous(memory_format=torch.channels_last)
        )
    variant = Variant(model, batch, is_ours=make_conv is None and not name.startswith("float"))

    def run() -> None:
        with torch.no_grad():
            variant.loss()

    if make_conv:
        run()
        start_learning(model)
    else:
        calibrate(model, run, method="minmax")
    return variant


def saved_bytes(variant: Variant) -> int:
    """Returns the bytes that a forward pass leaves alive: the tensors that backward needs, and the loss."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loss = variant.loss()
    net = sum(event.self_cpu_memory_usage for event in record.key_averages())
    loss.backward()
    return net


def peak_bytes(variant: Variant) -> int:
    """Returns the most bytes of tensors alive at a moment of a step, without those alive before it."""
    variant.model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        variant.loss().backward()
    alive = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def spread(values: list[float]) -> str:
    """Returns median and range of ratios."""
    return f"{statistics.median(values):.2f}x ({min(values):.2f} to {max(values):.2f})"


def auxiliary_share(variant: Variant, size: int) -> float:
    """Returns the multiply-accumulates of the auxiliary path, divided by those of the detector."""
    rows = make_plan(variant.model, (size, size))
    own = sum(row.macs for row in rows if row.name.startswith("auxiliary."))
    return own / (sum(row.macs for row in rows) - own)


def train_one(size: int, num_images: int, fpn_channels: int, rounds: int, others: dict[str, MakeConv]) -> None:
    """Prints the table of one input size, batch and width, with peers if there are any."""
    batch = make_batch(num_images, size, size)
    variants = {name: build(name, fpn_channels, batch) for name in VARIANTS}
    variants |= {name: build(name, fpn_channels, batch, make_conv) for name, make_conv in others.items()}
    for number in range(-2, rounds):
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr)
        for variant in variants.values():
            variant.step()
            if number < 0:  # the first steps are slower than the others
                variant.seconds.clear()
                variant.processor.clear()
    kept = {name: saved_bytes(variant) for name, variant in variants.items()}
    peak = {name: peak_bytes(variant) for name, variant in variants.items()}
    base = variants["float"]
    rows = []
    for name, variant in variants.items():
        rows.append(
            [
                name,
                statistics.median(variant.seconds) / num_images,
                spread([t / f for t, f in zip(variant.seconds, base.seconds, strict=True)]),
                spread([t / f for t, f in zip(variant.processor, base.processor, strict=True)]),
                kept[name] / num_images / 1e6,
                f"{kept[name] / kept['float']:.2f}x",
                f"{peak[name] / peak['float']:.2f}x",
            ]
        )
    print(f"\nFPN {fpn_channels}, {size}x{size}, batch {num_images}")
    header = ["training step", "s / image", "time", "processor time", "MB / image kept", "kept", "peak"]
    print(tabulate(rows, header, floatfmt=".3f"))
    for method in ("LSQ w4a4", "DoReFa w4a4"):
        plain, auxiliary = variants[method], variants[f"{method} + auxiliary"]
        extra = [a / p - 1 for a, p in zip(auxiliary.processor, plain.processor, strict=True)]
        print(
            f"{method}: the auxiliary path has {auxiliary_share(auxiliary, size):.1%} of the detector's MACs and adds "
            f"{statistics.median(extra):.1%} ({min(extra):.1%} to {max(extra):.1%}) of its processor time"
        )


def train(args: argparse.Namespace) -> None:
    """Measures the time of a training step, and the bytes kept for backward and at the peak."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    largest = largest_integer_weight(255)
    integer = "in float32" if not largest else "in int8" if largest == 128 else "in int8 without VNNI"
    print(
        f"RetinaNet, ResNet-18, BN; {Machine.here()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"forward of quantized convs {integer}, median of {args.rounds} rounds (range)"
    )
    others = peers() if args.peers else {}
    for fpn_channels, size, num_images in itertools.product(args.fpn_channels, args.size, args.batch):
        if num_images * (size // 128) ** 2 > 1:
            train_one(size, num_images, fpn_channels, args.rounds, others)
        else:
            print(f"\n{size}x{size}, batch {num_images}: left out, one value a channel at P7 is too few for its BN")
