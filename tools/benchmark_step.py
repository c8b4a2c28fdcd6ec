"""Time and memory of whole training steps of configs side by side, which ``benchmark.py step`` measures."""

import argparse
import dataclasses
import os
import statistics
import time
from typing import Any

import torch
from benchmark_train import make_batch, spread
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from aqdet.config import load_config
from aqdet.engine.launch import join_process_group
from aqdet.engine.layout import laid_out
from aqdet.engine.solver import build_optimizer
from aqdet.modeling.scaffold import aligning
from aqdet.quantization import calibrate
from aqdet.utils.distributed import distribute

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WARM_UP = 3
"""Steps of each variant that are not measured."""


@dataclasses.dataclass
class Variant:
    """A detector in training, and the measurements of its steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: list[dict[str, Any]]
    device: str
    dtype: torch.dtype
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.dtype == torch.float16)

    def step(self) -> None:
        """Runs one iteration, and waits for its end."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        is_half = self.dtype != torch.float32
        with EventStorage(0), torch.autocast(self.device, dtype=self.dtype if is_half else None, enabled=is_half):
            loss = sum(self.model(self.batch).values())
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        self.seconds.append(time.perf_counter() - start)


def compile_networks(model: nn.Module) -> None:
    """Compiles the parts of a detector that are networks: trunk and head, of the auxiliary path too.

    The rest, as the matching of anchors, is Detectron2's Python code, whose graph no compiler keeps in one piece.
    """
    path = getattr(model, "auxiliary", None)
    for network in (model.backbone, getattr(model, "head", None), getattr(path, "head", None)):
        if isinstance(network, nn.Module):
            network.compile()


def build(cfg: CfgNode, precision: str, batch: list[dict[str, Any]], compiled: bool = False) -> Variant:
    """Returns a calibrated detector in training, its networks compiled on demand."""
    torch.manual_seed(0)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.SOLVER.AMP.ENABLED = "", precision != "fp32"
    model = laid_out(build_model(cfg).train(), cfg)

    def run() -> None:
        with torch.no_grad(), aligning(model), EventStorage(0):
            model(batch)

    if cfg.MODEL.QUANT.ENABLED:
        calibrate(model, run, method="minmax")
    optimizer = build_optimizer(cfg, model)
    if compiled:
        compile_networks(model)
    return Variant(distribute(model), optimizer, batch, cfg.MODEL.DEVICE, PRECISIONS[precision])


def step(args: argparse.Namespace) -> None:
    """Measures whole training steps of configs against the first one, on the GPU or GPUs, or on the CPU.

    Raises:
        ValueError: for float16 on a CPU, which has no scaled gradients.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and "fp16" in args.precision:
        raise ValueError("--precision fp16 needs a GPU")
    join_process_group(device)
    batch = make_batch(args.batch, *args.size)
    variants = {}
    for file in args.config_file:
        cfg = load_config(file, ["MODEL.DEVICE", device, *args.opts])
        name = os.path.splitext(os.path.basename(file))[0]
        for precision in args.precision:
            variants[name, precision] = build(cfg, precision, batch)
            if args.compile:
                variants[f"{name}, compiled", precision] = build(cfg, precision, batch, compiled=True)
    for number in range(-WARM_UP, args.rounds):
        for variant in variants.values():
            variant.step()
            if number < 0:
                variant.seconds.clear()
    first = next(iter(variants))[0]
    rows = []
    for (name, precision), variant in variants.items():
        base = variants[first, precision].seconds
        ratios = [own / theirs for own, theirs in zip(variant.seconds, base, strict=True)]
        median = statistics.median(variant.seconds)
        images = args.batch * comm.get_world_size() / median
        rows.append([name, precision, median * 1e3, spread(ratios), images, variant.peak / 1e9])
    if comm.is_main_process():
        where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        height, width = args.size
        print(f"{comm.get_world_size()} processes on {where}, {args.batch} images of {height}x{width} each")
        header = ["config", "precision", "ms a step", f"to {first}", "images/s", "GB peak"]
        print(tabulate(rows, header, floatfmt=".2f"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
