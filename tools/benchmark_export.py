"""Measurement of an exported detector beside its float model, which ``benchmark.py export`` runs."""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from latency import Times, interleave, peak_memory, saturating
from machine import Machine
from post_training_peers import INSTALL_NNCF, write_nncf, write_post_training
from tabulate import tabulate
from torch import nn

from aqdet.checkpoint import load_detector
from aqdet.config import load_config
from aqdet.engine import fit_to_machine
from aqdet.evaluation import build_evaluator
from aqdet.evaluation.exported import ExportedDetector
from aqdet.export.gate import dataset_records
from aqdet.quantization import quantizers, set_quantization
from aqdet.runtime import Detector, read_description, write_description
from aqdet.runtime.detector import LevelOutputs
from aqdet.runtime.folder import DESCRIPTION, MODEL, Description
from aqdet.runtime.image import read_image
from aqdet.runtime.preprocess import make_batch as make_runtime_batch
from aqdet.utils.files import is_image

EAGER, ORT_FLOAT = "PyTorch eager", "ONNX Runtime float32"
ORT_INT8, NNCF_INT8 = "ONNX Runtime int8, post-training", "OpenVINO int8, NNCF post-training"
MOST_CALIBRATION = 64
"""Largest number of images that post-training quantization is calibrated on."""


class Dense(nn.Module):
    """The part of a detector that an exported graph has: image normalisation, backbone and head.

    Args:
        model: A Detectron2 dense detector.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Maps uint8 ``(N, 3, H, W)`` to logits, deltas and, for FCOS, centerness of each level in turn."""
        features = self.model.backbone((image - self.model.pixel_mean) / self.model.pixel_std)
        outputs = self.model.head([features[name] for name in self.model.head_in_features])
        return tuple(output for level in zip(*outputs, strict=True) for output in level)


def load_float(config: str, weights: str, opts: list[str], float_weights: str | None = None) -> Dense:
    """Returns the detector of a checkpoint with its quantizers off, or that of ``float_weights`` without any."""
    cfg = load_config(config, opts)
    fit_to_machine(cfg)
    if float_weights:
        model = load_detector(cfg, float_weights, device="cpu", quantized=False, key="--float-weights")
    else:
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
        dynamic_axes={name: {0: "N", 2: f"h_{name}", 3: f"w_{name}"} for name in ("image", *names)},
    )
    write_description(folder, content, files=(MODEL,))


def calibration_batches(args: argparse.Namespace, description: Description, batch: np.ndarray) -> list[np.ndarray]:
    """Returns the images of ``--calibration``, resized for the network, or the measured one alone without them."""
    if not args.calibration:
        print("int8 is calibrated on the measured image alone: name --calibration images for its AP")
        return [batch]
    folder = Path(args.calibration)
    files = sorted(file for file in folder.iterdir() if is_image(file)) if folder.is_dir() else [folder]
    if not files:
        raise ValueError(f"--calibration {folder} has no images")
    number = min(MOST_CALIBRATION, len(files))
    chosen = [str(files[i * len(files) // number]) for i in range(number)]
    return [make_runtime_batch([read_image(file)], description)[0] for file in chosen]


def average_precision(cfg: CfgNode, model: nn.Module) -> float | None:
    """Returns the AP of a detector on the only dataset of ``DATASETS.TEST``; None if there is no AP."""
    (dataset,) = cfg.DATASETS.TEST
    with tempfile.TemporaryDirectory() as scratch:
        evaluator = build_evaluator(cfg, dataset, scratch)
        loader = build_detection_test_loader(cfg, dataset)
        with contextlib.redirect_stdout(io.StringIO()):  # output of pycocotools
            results = inference_on_dataset(model, loader, evaluator)
    metrics: dict[str, Any] = next(iter(results.values()), {})
    return metrics.get("AP")


def float_bytes(model: nn.Module) -> int:
    """Returns the bytes of the float32 detector's state dict as a file."""
    prefixes = tuple(f"{name}." for name, _ in quantizers(model))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


def make_image(path: str | None, size: int) -> np.ndarray:
    """Returns a BGR image ``(size, size, 3)`` from a file, or of random blocks."""
    if path:
        return cv2.resize(read_image(path), (size, size), interpolation=cv2.INTER_AREA)
    blocks = np.random.default_rng(0).integers(0, 256, (size // 16 + 1, size // 16 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(np.kron(blocks, np.ones((16, 16, 1), np.uint8))[:size, :size])


class OpenVinoDetector(Detector):
    """A detector of a folder whose network runs in OpenVINO.

    Args:
        folder: Exported detector, for all but the network.
        threads: Number of threads of OpenVINO.
        network: File of the network; None for that of the folder.
    """

    def __init__(self, folder: Path, threads: int, network: Path | None = None) -> None:
        import openvino

        super().__init__(folder, threads=threads)
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._compiled = openvino.Core().compile_model(str(network or folder / MODEL), "CPU", settings)

    def run(self, batch: np.ndarray) -> LevelOutputs:
        """See :meth:`aqdet.runtime.Detector.run`."""
        values = self._compiled(batch)
        return [tuple(values[name] for name in level.outputs) for level in self.description.levels]


@dataclasses.dataclass(frozen=True)
class Form:
    """A detector in the runtime, its folder or network, and the code that measures its memory."""

    name: str
    source: Path
    detector: Detector
    memory_code: str

    @property
    def bytes(self) -> int:
        """Size of the network's file, or files where OpenVINO keeps weights in another one."""
        network = self.source / MODEL if self.source.is_dir() else self.source
        return sum(path.stat().st_size for path in {network, network.with_suffix(".bin")} if path.is_file())


# These programs run the network of a folder or file (1) on a batch (2) in some threads (3), without torch.
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
compiled = openvino.Core().compile_model(sys.argv[1], "CPU", settings)
for _ in range(5):
    compiled(numpy.load(sys.argv[2]))
"""
# The detector of a config (4), weights (5) and overrides (6 ...); the folder of this script is (1).
EAGER_MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, torch
from benchmark_export import load_float
torch.set_num_threads(int(sys.argv[3]))
dense = load_float(sys.argv[4], sys.argv[5], sys.argv[6:])
with torch.inference_mode():
    for _ in range(5):
        dense(torch.from_numpy(numpy.load(sys.argv[2])))
"""


def check_export(args: argparse.Namespace, description: Description) -> None:
    """Raises an error for arguments that do not fit together, and for a detector that cannot be measured."""
    if description.regions is not None:
        raise ValueError(
            f"{args.model} is a two-stage detector, three graphs around a RoiAlign, of which this measures none: "
            "it takes dense detectors (RetinaNet, FCOS)"
        )
    if args.size < 1 or args.size % description.size_divisibility:
        raise ValueError(f"--size must be a multiple of {description.size_divisibility}, got {args.size}")
    with open(args.weights, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != description.source["weights_sha256"]:
            raise ValueError(f"{args.model} was exported from other weights than {args.weights}: name those")


def make_forms(
    args: argparse.Namespace, float_folder: Path, exported: Detector, batches: list[np.ndarray], scratch: Path
) -> list[Form]:
    """Returns the forms that run in the runtime, those that are quantized after training made here.

    Args:
        args: Of the program.
        float_folder: Folder with the float network.
        exported: The detector that is measured.
        batches: Images that post-training quantization is calibrated on.
        scratch: Folder to write into.
    """
    folder, threads = Path(args.model), args.threads
    write_post_training(float_folder, scratch / "int8", batches)
    forms = [
        Form(ORT_FLOAT, float_folder, Detector(float_folder, threads=threads), ONNX_RUNTIME_MEMORY),
        Form(ORT_INT8, scratch / "int8", Detector(scratch / "int8", threads=threads), ONNX_RUNTIME_MEMORY),
        Form("exported, ONNX Runtime", folder, exported, ONNX_RUNTIME_MEMORY),
    ]
    if not importlib.util.find_spec("openvino"):
        print("OpenVINO is not installed: left out")
        return forms
    if importlib.util.find_spec("nncf"):
        network = scratch / "nncf" / "model.xml"
        write_nncf(float_folder, network, batches)
        detector = OpenVinoDetector(float_folder, threads, network)
        forms.append(Form(NNCF_INT8, network, detector, OPENVINO_MEMORY))
    else:
        print(INSTALL_NNCF)
    detector = OpenVinoDetector(folder, threads)
    return [*forms, Form("exported, OpenVINO", folder / MODEL, detector, OPENVINO_MEMORY)]


def export(args: argparse.Namespace) -> None:
    """Measures latency, memory and size of an exported detector beside its float model."""
    exported = Detector(args.model, threads=args.threads)
    description = exported.description
    check_export(args, description)
    cfg = load_config(args.config_file, args.opts)
    if args.dataset:
        cfg, _ = dataset_records(cfg, args.dataset)
    torch.set_num_threads(args.threads)
    dense = load_float(args.config_file, args.weights, args.opts, args.float_weights)
    image = make_image(args.image, args.size)
    # The image has the network's size: its channels are ordered, but it is not resized.
    as_it_is = dataclasses.replace(description, min_size=0)
    batch, _ = make_runtime_batch([image], as_it_is)
    inputs = [{"image": torch.from_numpy(batch[0]), "height": args.size, "width": args.size}]
    networks: dict[str, Callable[[], object]] = {EAGER: lambda: dense(torch.from_numpy(batch))}
    wholes: dict[str, Callable[[], object]] = {EAGER: lambda: dense.model(inputs)}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        batch_file = str(Path(scratch) / "batch.npy")
        np.save(batch_file, batch)
        float_folder = Path(scratch) / "float"
        float_folder.mkdir()
        write_float(dense, Path(args.model), float_folder, batch)
        batches = calibration_batches(args, description, batch)
        forms = make_forms(args, float_folder, exported, batches, Path(scratch))
        found = {EAGER: len(dense.model(inputs)[0]["instances"])}
        quality: dict[str, float | None] = {}
        if args.dataset:
            quality[EAGER] = average_precision(cfg, dense.model)
            for form in forms:
                print(f"AP of {form.name}", file=sys.stderr)
                quality[form.name] = average_precision(cfg, ExportedDetector(form.detector))
        for form in forms:
            form.detector.description = as_it_is
            networks[form.name] = functools.partial(form.detector.run, batch)
            wholes[form.name] = functools.partial(form.detector, image)
            found[form.name] = len(form.detector(image))
        tasks = {("network", name): task for name, task in networks.items()}
        times = interleave(tasks | {("all", name): task for name, task in wholes.items()}, args.rounds)
        rest = [batch_file, str(args.threads)]
        checkpoint = [args.config_file, args.weights, *args.opts]
        memory = {EAGER: peak_memory(EAGER_MEMORY, str(Path(__file__).parent), *rest, *checkpoint)}
        memory |= {form.name: peak_memory(form.memory_code, str(form.source), *rest) for form in forms}
        disk = {EAGER: float_bytes(dense.model)}
        disk |= {form.name: form.bytes for form in forms}
    rows = []
    for name in networks:
        row: list[Any] = [name]
        for part in ("network", "all"):
            own = times[part, name]
            row += [own.median * 1e3, ratio(own, times[part, ORT_FLOAT]), ratio(own, times[part, EAGER])]
        peak = memory[name]
        row += [found[name], None if peak is None else peak / 1e6, disk[name] / 1e6]
        rows.append([*row, *[quality.get(name)] * bool(args.dataset)])
    machine = Machine.here()
    print(
        f"{args.size}x{args.size}, 1 image; {machine}; {args.threads} threads, torch {torch.__version__}; "
        f"median of {args.rounds} rounds (range); speeds relative to ONNX Runtime float32 and to eager"
    )
    header = ["", "network, ms", "/ ORT", "/ eager", "image to boxes, ms", "/ ORT", "/ eager"]
    header += ["objects", "peak MB", "MB on disk", *[f"AP on {args.dataset}"] * bool(args.dataset)]
    print(tabulate(rows, header, floatfmt=".1f"))
    packed = (Path(args.model) / MODEL).stat().st_size
    print(f"exported file: {packed / 1e6:.2f} MB, 1/{disk[EAGER] / packed:.1f} of the float32 state dict")
    print_saturation(machine, saturating(description.layers))


def print_saturation(machine: Machine, layers: list[str]) -> None:
    """Prints whether 8-bit sums are exact on this machine, and would be on one without VNNI."""
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
    """Returns a text on how many times as fast a form is, with the range."""
    middle, low, high = own.speed_up(other)
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"
