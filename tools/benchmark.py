#!/usr/bin/env python
"""Measures quantized detectors beside the float model, in one run.

    python tools/benchmark.py train [--size 128 256] [--batch 1 4] [--fpn-channels 64 256] [--rounds 7] [--threads 2]
        [--peers]
    python tools/benchmark.py export --model DIR --config-file X --weights W [--size 320] [--threads 2] [--rounds 30]

Every speed is a ratio against the float detector of the same structure; rounds visit all variants in turn, so that a
slow moment of the machine hits all of them, and a ratio is taken within its round. Where others share the machine,
`--threads 1` and, in training, the column of processor time are the ones to read.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from peers import MakeConv, convert, peers, start_learning
from tabulate import tabulate
from torch import nn
from torch.profiler import ProfilerActivity, profile

from aqdet.checkpoint import load_detector
from aqdet.config import load_config
from aqdet.engine import fit_to_machine
from aqdet.evaluation.latency import Machine, Times, interleave, peak_memory, saturating
from aqdet.modeling.plan import make_plan
from aqdet.quantization import calibrate, quantizers, set_quantization
from aqdet.quantization.integer import largest_integer_weight
from aqdet.runtime import Detector, read_description, write_description
from aqdet.runtime.detector import LevelOutputs
from aqdet.runtime.folder import DESCRIPTION, MODEL, Description
from aqdet.runtime.preprocess import make_batch as make_runtime_batch
from aqdet.runtime.preprocess import read_image

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "BCCD"
VARIANTS = {
    "float": "fp_bn",
    "float, channels last": "fp_bn",
    "LSQ w4a4": "lsq_w4a4",
    "LSQ w4a4 + auxiliary": "lsq_w4a4_aux",
    "DoReFa w4a4": "dorefa_w4a4",
    "DoReFa w4a4 + auxiliary": "dorefa_w4a4_aux",
}
PEERS_FROM, PEERS_LIKE = "fp_bn", "lsq_w4a4"
EAGER, ORT_FLOAT = "PyTorch eager", "ONNX Runtime float32"


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


@dataclasses.dataclass
class Variant:
    """A detector, and what its steps took."""

    model: nn.Module
    batch: list[dict[str, Any]]
    seconds: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)

    def loss(self) -> torch.Tensor:
        """Forward alone."""
        with EventStorage(0):
            return sum(self.model(self.batch).values())

    def step(self) -> None:
        """Forward and backward, from gradients that are not there, as in training."""
        self.model.zero_grad(set_to_none=True)
        start = time.perf_counter(), time.process_time()
        self.loss().backward()
        self.seconds.append(time.perf_counter() - start[0])
        self.processor.append(time.process_time() - start[1])


def load(config: str, fpn_channels: int) -> CfgNode:
    """The config of a variant."""
    overrides = ["MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", str(fpn_channels)]
    return load_config(CONFIGS / f"retinanet_r18_{config}.yaml", overrides)


def build(name: str, fpn_channels: int, batch: list[dict[str, Any]], make_conv: MakeConv | None = None) -> Variant:
    """A calibrated detector and its batch; that of a peer if there is a ``make_conv``."""
    torch.manual_seed(0)
    model = build_model(load(PEERS_FROM if make_conv else VARIANTS[name], fpn_channels))
    if make_conv:
        convert(model, load(PEERS_LIKE, fpn_channels), make_conv)
    if name.endswith("channels last"):
        model.to(memory_format=torch.channels_last)
        model.backbone.register_forward_pre_hook(
            lambda _, images: images[0].contiguous(memory_format=torch.channels_last)
        )
    variant = Variant(model, batch)

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
    """Bytes that are alive after a forward and were not before: what backward needs, and the loss."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loss = variant.loss()
    net = sum(event.self_cpu_memory_usage for event in record.key_averages())
    loss.backward()
    return net


def peak_bytes(variant: Variant) -> int:
    """Most bytes of tensors that are alive at a moment of a step, beside those that were before it."""
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
    """Median and range of ratios."""
    return f"{statistics.median(values):.2f}x ({min(values):.2f} to {max(values):.2f})"


def auxiliary_share(variant: Variant, size: int) -> float:
    """Multiply-accumulates of the auxiliary path over those of the rest."""
    rows = make_plan(variant.model, (size, size))
    own = sum(row.macs for row in rows if row.path.startswith("auxiliary."))
    return own / (sum(row.macs for row in rows) - own)


def train_one(size: int, num_images: int, fpn_channels: int, rounds: int, others: dict[str, MakeConv]) -> None:
    """Prints the table of one input size, batch and width, with peers where there are any."""
    batch = make_batch(num_images, size)
    variants = {name: build(name, fpn_channels, batch) for name in VARIANTS}
    variants |= {name: build(name, fpn_channels, batch, make_conv) for name, make_conv in others.items()}
    for number in range(-2, rounds):
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr)
        for variant in variants.values():
            variant.step()
            if number < 0:  # the first steps are not like the others
                variant.seconds.clear(), variant.processor.clear()
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
    """Time of a training step, and bytes kept for backward and at the peak."""
    torch.set_num_threads(args.threads)
    largest = largest_integer_weight(255)
    integer = "in float32" if not largest else "in int8" if largest == 128 else "in int8 without VNNI"
    print(
        f"RetinaNet, ResNet-18, BN; {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; forward of quantized convs {integer}, median of {args.rounds} rounds (range)"
    )
    others = peers() if args.peers else {}
    for fpn_channels, size, num_images in itertools.product(args.fpn_channels, args.size, args.batch):
        if num_images * (size // 128) ** 2 > 1:
            train_one(size, num_images, fpn_channels, args.rounds, others)
        else:
            print(f"\n{size}x{size}, batch {num_images}: left out, one value a channel at P7 is too few for its BN")


class Dense(nn.Module):
    """A detector's image normalisation, backbone and head, as an exported graph has them.

    Args:
        model: a Detectron2 dense detector.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 ``(N, 3, H, W)`` to logits, deltas and, for FCOS, centerness of each level in turn."""
        features = self.model.backbone((image - self.model.pixel_mean) / self.model.pixel_std)
        outputs = self.model.head([features[name] for name in self.model.head_in_features])
        return tuple(output for level in zip(*outputs, strict=True) for output in level)


def load_float(config: str, weights: str, opts: list[str]) -> Dense:
    """The detector of a checkpoint with its quantizers off."""
    cfg = load_config(config, opts)
    fit_to_machine(cfg)
    model = load_detector(cfg, weights, device="cpu")
    set_quantization(model, False)
    return Dense(model).eval()


def write_float(dense: Dense, exported: Path, folder: Path, batch: np.ndarray) -> None:
    """Writes the float network of one input size as a folder for the runtime, with the decoding of ``exported``.

    Each level's batch norm is folded into a copy of the head's convs, which makes the file larger than the weights.
    """
    content = json.loads((exported / DESCRIPTION).read_text())
    names = [name for level in read_description(exported).levels for name in level.outputs]
    torch.onnx.export(
        dense,
        (torch.from_numpy(batch),),
        str(folder / MODEL),
        input_names=["image"],
        output_names=names,
        opset_version=17,
        dynamo=False,
    )
    write_description(folder, content, files=(MODEL,))


def float_bytes(model: nn.Module) -> int:
    """Bytes of the float32 detector's state dict as a file."""
    prefixes = tuple(f"{name}." for name, _ in quantizers(model))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


def make_image(path: str, size: int) -> np.ndarray:
    """A BGR image ``(size, size, 3)``: of a file, or of random blocks."""
    if path:
        return cv2.resize(read_image(path), (size, size), interpolation=cv2.INTER_AREA)
    blocks = np.random.default_rng(0).integers(0, 256, (size // 16 + 1, size // 16 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(np.kron(blocks, np.ones((16, 16, 1), np.uint8))[:size, :size])


class OpenVinoDetector(Detector):
    """An exported detector whose network runs in OpenVINO."""

    def __init__(self, folder: Path, threads: int) -> None:
        import openvino

        super().__init__(folder, threads=threads)
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._compiled = openvino.Core().compile_model(str(folder / MODEL), "CPU", settings)

    def run(self, batch: np.ndarray) -> LevelOutputs:
        """See :meth:`aqdet.runtime.Detector.run`."""
        values = self._compiled(batch)
        return [tuple(values[name] for name in level.outputs) for level in self.description.levels]


@dataclasses.dataclass(frozen=True)
class Form:
    """A detector in the runtime, the folder it comes from, and the code that measures its memory."""

    name: str
    folder: Path
    detector: Detector
    memory_code: str


# Each runs the network of a folder (1) on a batch (2) in some threads (3), without torch.
ONNX_RUNTIME_MEMORY = """
import sys
sys.modules["detectron2"] = None
import numpy
from aqdet.runtime import Detector
detector = Detector(sys.argv[1], threads=int(sys.argv[3]))
for _ in range(5):
    detector.run(numpy.load(sys.argv[2]))
"""
OPENVINO_MEMORY = """
import sys
import numpy, openvino
settings = {"INFERENCE_NUM_THREADS": int(sys.argv[3]), "PERFORMANCE_HINT": "LATENCY"}
compiled = openvino.Core().compile_model(sys.argv[1] + "/model.onnx", "CPU", settings)
for _ in range(5):
    compiled(numpy.load(sys.argv[2]))
"""
# The detector of a config (4), weights (5) and overrides (6 ...); the folder of this script is (1).
EAGER_MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, torch
from benchmark import load_float
torch.set_num_threads(int(sys.argv[3]))
dense = load_float(sys.argv[4], sys.argv[5], sys.argv[6:])
with torch.inference_mode():
    for _ in range(5):
        dense(torch.from_numpy(numpy.load(sys.argv[2])))
"""


def check_export(args: argparse.Namespace, description: Description) -> None:
    """Refuses arguments that do not belong together."""
    if args.size < 1 or args.size % description.size_divisibility:
        raise ValueError(f"--size must be a multiple of {description.size_divisibility}, got {args.size}")
    if not os.path.isfile(args.weights):
        raise FileNotFoundError(f"--weights {args.weights} does not exist")
    with open(args.weights, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != description.source["weights_sha256"]:
            raise ValueError(f"{args.model} was exported from other weights than {args.weights}: name those")


def make_forms(args: argparse.Namespace, float_folder: Path, exported: Detector) -> list[Form]:
    """The forms that run in the runtime."""
    folder = Path(args.model)
    forms = [
        Form(ORT_FLOAT, float_folder, Detector(float_folder, threads=args.threads), ONNX_RUNTIME_MEMORY),
        Form("exported, ONNX Runtime", folder, exported, ONNX_RUNTIME_MEMORY),
    ]
    if importlib.util.find_spec("openvino"):
        forms.append(Form("exported, OpenVINO", folder, OpenVinoDetector(folder, args.threads), OPENVINO_MEMORY))
    else:
        print("OpenVINO is not installed: left out")
    return forms


def export(args: argparse.Namespace) -> None:
    """Latency, memory and size of an exported detector beside its float model."""
    exported = Detector(args.model, threads=args.threads)
    description = exported.description
    check_export(args, description)
    torch.set_num_threads(args.threads)
    dense = load_float(args.config_file, args.weights, args.opts)
    image = make_image(args.image, args.size)
    # The image has its size already: its channels are ordered, but it is not resized.
    as_it_is = dataclasses.replace(description, min_size=0)
    batch, _ = make_runtime_batch([image], as_it_is)
    inputs = [{"image": torch.from_numpy(batch[0]), "height": args.size, "width": args.size}]
    networks: dict[str, Callable[[], object]] = {EAGER: lambda: dense(torch.from_numpy(batch))}
    wholes: dict[str, Callable[[], object]] = {EAGER: lambda: dense.model(inputs)}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        batch_file = str(Path(scratch) / "batch.npy")
        np.save(batch_file, batch)
        write_float(dense, Path(args.model), Path(scratch), batch)
        forms = make_forms(args, Path(scratch), exported)
        found = {EAGER: len(dense.model(inputs)[0]["instances"])}
        for form in forms:
            form.detector.description = as_it_is
            networks[form.name] = lambda run=form.detector.run: run(batch)
            wholes[form.name] = lambda detector=form.detector: detector(image)
            found[form.name] = len(form.detector(image))
        tasks = {("network", name): task for name, task in networks.items()}
        times = interleave(tasks | {("all", name): task for name, task in wholes.items()}, args.rounds)
        rest = [batch_file, str(args.threads)]
        checkpoint = [args.config_file, args.weights, *args.opts]
        memory = {EAGER: peak_memory(EAGER_MEMORY, str(Path(__file__).parent), *rest, *checkpoint)}
        memory |= {form.name: peak_memory(form.memory_code, str(form.folder), *rest) for form in forms}
        disk = {EAGER: float_bytes(dense.model)}
        disk |= {form.name: (form.folder / MODEL).stat().st_size for form in forms}
    rows = []
    for name in networks:
        row: list[Any] = [name]
        for part in ("network", "all"):
            own = times[part, name]
            row += [own.median * 1e3, ratio(own, times[part, ORT_FLOAT]), ratio(own, times[part, EAGER])]
        rows.append([*row, found[name], memory[name] and memory[name] / 1e6, disk[name] / 1e6])
    machine = Machine.here()
    print(
        f"{args.size}x{args.size}, 1 image; {machine}; {args.threads} threads, torch {torch.__version__}; "
        f"median of {args.rounds} rounds (range); speeds relative to ONNX Runtime float32 and to eager"
    )
    header = ["", "network, ms", "/ ORT", "/ eager", "image to boxes, ms", "/ ORT", "/ eager"]
    print(tabulate(rows, [*header, "objects", "peak MB", "MB on disk"], floatfmt=".1f"))
    packed = (Path(args.model) / "model.safetensors").stat().st_size
    print(f"packed weights: {packed / 1e6:.2f} MB, 1/{disk[EAGER] / packed:.1f} of the float32 state dict")
    print_saturation(machine, saturating(description.layers))


def print_saturation(machine: Machine, layers: list[str]) -> None:
    """Whether 8-bit sums are exact on this machine, and would be on one without VNNI."""
    if not layers:
        print("8-bit sums cannot saturate, with or without VNNI")
    elif machine.vnni:
        print(
            f"8-bit sums are exact here; without VNNI those of {len(layers)} layers can saturate: {', '.join(layers)}"
        )
    else:
        print(
            f"WARNING: no VNNI: 8-bit sums of {len(layers)} layers can saturate in int16 and give other values than "
            f"the reference: {', '.join(layers)}"
        )


def ratio(own: Times, other: Times) -> str:
    """How many times as fast, with the range."""
    middle, low, high = own.speed_up(other)
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("train", help=train.__doc__)
    sub.add_argument("--size", type=int, nargs="+", default=[256], help="height and width of the images")
    sub.add_argument("--batch", type=int, nargs="+", default=[4])
    sub.add_argument("--fpn-channels", type=int, nargs="+", default=[64])
    sub.add_argument("--rounds", type=int, default=7)
    sub.add_argument("--threads", type=int, default=torch.get_num_threads())
    sub.add_argument("--peers", action="store_true", help="compare with the implementations of tools/peers.py too")
    sub.set_defaults(run=train)
    sub = commands.add_parser("export", help=export.__doc__)
    sub.add_argument("--model", required=True, metavar="DIR", help="exported detector")
    sub.add_argument("--config-file", required=True, help="that it was exported with")
    sub.add_argument("--weights", required=True, help="that it was exported from")
    sub.add_argument("--image", default="", help="image to run on, resized to a square; random blocks if absent")
    sub.add_argument("--size", type=int, default=320, help="height and width of the image")
    sub.add_argument("--threads", type=int, default=os.cpu_count(), help="of the networks")
    sub.add_argument("--rounds", type=int, default=30)
    sub.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, as for train_net.py")
    sub.set_defaults(run=export)
    args = parser.parse_args()
    try:
        args.run(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
