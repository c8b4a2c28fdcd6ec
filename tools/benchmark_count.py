"""Counts what a training step would take of a GPU, without one; run by ``benchmark.py count``."""

import argparse
import contextlib
import dataclasses
import logging
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from pretended_gpu import Ledger, PretendedTensor, counting, pretending, storage_of, to_pretended
from pretended_processes import processes
from tabulate import tabulate
from torch import Tensor
from torch.utils._pytree import tree_leaves

from aqdet.config import load_config
from aqdet.engine.checked_trainer import CheckedTrainer
from aqdet.engine.forward_state import ForwardState
from aqdet.engine.solver import build_optimizer
from aqdet.modeling.meta_arch.dense import LowPrecisionDense
from aqdet.modeling.scaffold import aligning
from aqdet.quantization import calibrate, quantizers, use_kernels

BANDWIDTH = 4e12
"""Bytes a second of the memory of a GPU of today."""
PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm")


@dataclasses.dataclass
class Count:
    """The cost of the network in one training step, from the image to the predictions and back.

    Attributes:
        launches: kernels.
        moved: bytes that they read and write.
        moved_by_products: the part of it of convolutions and matrix products.
        flops: operations of convolutions and matrix products.
        kept: bytes that backward needs, beside parameters.
        collectives: exchanges of synchronized batch norms.
        waits: for the GPU, of these.
        by_operation: operation to launches and bytes.
    """

    launches: int
    moved: int
    moved_by_products: int
    flops: int
    kept: int
    collectives: int
    waits: int
    by_operation: dict[str, tuple[int, int]]


def _build(cfg: CfgNode) -> Any:
    torch.manual_seed(0)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    if not issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), LowPrecisionDense):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r}: counts QuantRetinaNet and QuantFCOS"
        )
    return build_model(cfg).train()


def _predict(model: Any, images: Tensor) -> list[Tensor]:
    """Returns all predictions of all heads."""
    auxiliary, extra_head = getattr(model, "auxiliary", None), getattr(model, "extra_head", None)
    with contextlib.nullcontext() if auxiliary is None else auxiliary.tapping(model.backbone):
        features = model.backbone(images)
        features = [features[name] for name in model.head_in_features]
        heads = [head for head in (model.head, auxiliary, extra_head) if head is not None]
        return [t for head in heads for t in tree_leaves(head(features))]


def count_network(
    cfg: CfgNode, size: tuple[int, int], num_images: int, kernels: str = "fused", num_processes: int = 1
) -> Count:
    """Counts forward and backward of the network of a config, at any size in seconds, without values.

    The losses and the optimizer are left out, whose operations depend on the values.

    Args:
        cfg: config; ``SOLVER.AMP.ENABLED`` has it in float16.
        size: height and width of the images, multiples of 32.
        num_images: images of one process.
        kernels: set of kernels, see :mod:`aqdet.quantization.kernels`.
        num_processes: processes that synchronized norms share a batch with; one has norms of its own.

    Raises:
        ValueError: if the detector is not a dense one.
    """
    model = _build(cfg)
    for _, quantizer in quantizers(model):
        quantizer._ready = True  # its range has no value anyway
    parameters: set[Any] = set()
    kept: dict[Any, tuple[Tensor, int]] = {}  # with the tensor, so that no other gets its memory

    def keep(tensor: Tensor) -> Tensor:
        storage = storage_of(tensor)
        if storage._cdata not in parameters:
            kept[storage._cdata] = tensor, storage.nbytes()
        return tensor

    amp = torch.float16 if cfg.SOLVER.AMP.ENABLED else None
    with processes(num_processes), pretending(meta=True) as ledger, use_kernels(kernels):
        to_pretended(model)
        parameters.update(storage_of(p)._cdata for p in model.parameters())
        images = PretendedTensor(torch.empty(num_images, 3, *size, device="meta"))
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cuda", dtype=amp or torch.float16, enabled=amp is not None),
        ):
            predictions = _predict(model, images)
        torch.autograd.backward(predictions, [torch.empty_like(p) for p in predictions])
    operations = {name: (number, ledger.bytes[name]) for name, number in ledger.launches.items()}
    return Count(
        launches=ledger.launches.total(),
        moved=ledger.bytes.total(),
        moved_by_products=sum(ledger.bytes[name] for name in PRODUCTS),
        flops=ledger.flops,
        kept=sum(size for _, size in kept.values()),
        collectives=ledger.collectives.total(),
        waits=ledger.waits.total(),
        by_operation=operations,
    )


def make_batch(num_images: int, size: int) -> list[dict[str, Any]]:
    """Makes random images with two boxes each, on the CPU as a data loader gives them."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for index in range(num_images):
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 5, 40, 38], [20.0, 10, 60, 61]]))
        instances.gt_classes = torch.tensor([0, 1])
        image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "label": index, "height": size, "width": size})
    return batch


def count_step(cfg: CfgNode, kernels: str = "fused") -> Ledger:
    """Counts a whole iteration on small images on a pretended GPU: with losses, checks and the optimizer.

    Mixed precision is left out, whose scaler runs on a GPU alone.

    Raises:
        DeviceMismatch: where a GPU would refuse the step.
    """
    model = _build(cfg)
    batch = make_batch(num_images=2, size=64)
    with pretending(), use_kernels(kernels), EventStorage(0):
        to_pretended(model)

        def run() -> None:
            with torch.no_grad(), aligning(model):
                model(batch)

        if cfg.MODEL.QUANT.ENABLED:
            calibrate(model, run, method="minmax")
        state = ForwardState(model)
        trainer = CheckedTrainer(model, [batch, batch], build_optimizer(cfg, model))
        trainer.iter = trainer.start_iter = 0
        for _ in range(2):  # the first one makes the optimizer's state too
            with counting() as ledger:
                state.get()
                trainer.run_step()
    return ledger


def count(args: argparse.Namespace) -> None:
    """Launches, bytes, waits and collectives of a training step on a GPU, without one."""
    logging.disable(logging.WARNING)
    rows = []
    for file in args.config_file:
        cfg = load_config(file, ["MODEL.DEVICE", "cpu", *args.opts])
        network = count_network(cfg, tuple(args.size), args.batch, args.kernels, args.processes)
        step = count_step(cfg, args.kernels)
        rows.append(
            [
                os.path.splitext(os.path.basename(file))[0],
                network.launches,
                network.moved / 1e9,
                network.moved / BANDWIDTH * 1e3,
                network.moved_by_products / 1e9,
                network.flops / 1e12,
                network.kept / 1e9,
                network.collectives,
                network.waits,
                step.launches.total(),
                step.waits.total(),
            ]
        )
        if args.details:
            print(f"\n{file}")
            ordered = sorted(network.by_operation.items(), key=lambda item: -item[1][1])
            table = [[name, number, moved / 1e9] for name, (number, moved) in ordered[: args.details]]
            print(tabulate(table, ["operation", "launches", "GB moved"], floatfmt=".2f"))
            for (what, place), number in step.waits.most_common():
                print(f"waits {number} times: {what} at {place}")
    height, width = args.size
    overrides = " ".join(args.opts) or "no overrides"
    print(f"\n{args.processes} processes, {args.batch} images of {height}x{width} each, {overrides}")
    header = [
        "config",
        "launches",
        "GB moved",
        f"ms at {BANDWIDTH / 1e12:g} TB/s",
        "GB by products",
        "TFLOP",
        "GB kept",
        "collectives",
        "their waits",
        "launches of an iteration",
        "waits",
    ]
    print(tabulate(rows, header, floatfmt=".2f"))
