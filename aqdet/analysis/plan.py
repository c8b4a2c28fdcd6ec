"""The quantization plan of a detector as a table: the quantizers of each layer, and its costs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.layers import CycleBatchNormList
from torch import nn

from ..layers import LAYER_KINDS, Layer, QuantAdd, StreamQuantizer, quantized_form, weighted_layers
from ..modeling.meta_arch.rcnn import QuantGeneralizedRCNN
from ..modeling.scaffold import SCAFFOLD_PREFIXES
from ..quantization import Quantizer

FLOAT_BITS = 32
IMAGE_BITS = 8
KINDS: dict[type[nn.Module], str] = {nn.Conv2d: "conv", nn.ConvTranspose2d: "deconv", nn.Linear: "linear"}


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One layer, or one tensor that several layers read.

    Attributes:
        name: The dotted name.
        kind: ``"conv"``, ``"deconv"``, ``"linear"``, ``"sum"`` or ``"stream"``.
        part: ``"float"``, ``"quantized"`` or ``"auxiliary"``, which is the whole scaffold.
        weight, input: Quantizer, bits, signedness and granularity, as text.
        norm: The class of the norm after it, with the number of levels if there are several; or ``"-"``.
        parameters: The number of parameters, with the norm's.
        weight_bits: The size of the layer's packed weights, bias, norm and scales in bits.
        macs: Multiply-accumulates for one image, over all calls of the layer.
        bit_ops: ``macs`` times the bits of the weight times the bits of the input.
    """

    name: str
    kind: str
    part: str
    weight: str
    input: str
    norm: str
    parameters: int
    weight_bits: int
    macs: int
    bit_ops: int


def _describe(quantizer: Quantizer | None, otherwise: str) -> str:
    if quantizer is None:
        return otherwise
    spec = quantizer.spec
    sign = ("s" if spec.signed else "u") if spec.role == "input" else ""
    return f"{spec.quantizer} {sign}{spec.num_bits}" + "/ch" * spec.per_channel + " centered" * spec.centered


def _norm_name(module: nn.Module | None) -> str:
    if module is None:
        return "-"
    if isinstance(module, CycleBatchNormList):
        return f"{type(module[0]).__name__} x{len(module)} levels"
    return type(module).__name__


def _following_norms(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Returns the norms that follow a convolution in a ``Sequential`` and are not inside it."""
    norms: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            layers = list(module)
            for conv, after in zip(layers, layers[1:], strict=False):
                is_norm = not isinstance(after, (*LAYER_KINDS, nn.Flatten, nn.ReLU, nn.Sequential))
                if isinstance(conv, nn.Conv2d) and is_norm:
                    norms[conv] = after
    return norms


def _layers(model: nn.Module) -> dict[str, Any]:
    """Returns the layers with a weight by name; raises an error for a class that the plan does not know."""
    layers = dict(weighted_layers(model))
    for name, layer in layers.items():
        if quantized_form(layer) is None:
            raise ValueError(f"layer {name} ({type(layer).__name__}) has a weight, and there is no plan of its class")
    return layers


@contextlib.contextmanager
def _counting(model: nn.Module, macs: dict[str, int], times: int = 1) -> Iterator[None]:
    def count(name: str) -> Any:
        def hook(layer: Layer, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            # A transposed convolution multiplies at every input, the other layers at every output.
            values = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
            macs[name] = macs.get(name, 0) + times * values[0].numel() * layer.weight[0].numel()

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in _layers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def make_plan(model: Any, size: tuple[int, int]) -> list[PlanRow]:
    """Makes the plan of a detector or image classifier, for one image.

    Heads of a two-stage detector run for as many regions as
    :meth:`~aqdet.modeling.meta_arch.rcnn.QuantGeneralizedRCNN.layer_calls` says.

    Args:
        model: The model, calibrated or not. Its state is not changed, but it is left in evaluation mode.
        size: Height and width of the image in pixels, multiples of the backbone's ``size_divisibility``.
    """
    macs: dict[str, int] = {}
    active = [m for m in model.modules() if isinstance(m, Quantizer)]
    enabled = [quantizer.enabled for quantizer in active]
    model.eval()
    for quantizer in active:
        quantizer.enabled = False
    try:
        scaffold = model.scaffold
        path = scaffold.auxiliary
        with contextlib.nullcontext() if path is None else path.tapping(model.backbone):
            with _counting(model, macs):
                features = model.backbone(torch.zeros(1, 3, *size, device=next(model.parameters()).device))
                levels = [features[name] for name in model.head_in_features]
                if isinstance(model, QuantGeneralizedRCNN):
                    calls = model.layer_calls(features)
                else:
                    heads = [head for head in (model.head, path, scaffold.extra_head) if head is not None]
                    calls = [(functools.partial(head, levels), 1) for head in heads]
            for call, times in calls:
                with _counting(model, macs, times):
                    call()
    finally:
        for quantizer, state in zip(active, enabled, strict=True):
            quantizer.enabled = state
    following = _following_norms(model)
    rows = []
    layers = _layers(model)
    for name, module in model.named_modules():
        if name in layers:
            rows.append(_layer_row(name, module, following.get(module), macs.get(name, 0)))
        elif name.startswith(SCAFFOLD_PREFIXES):
            continue  # sums in float
        elif isinstance(module, QuantAdd):
            text = [
                _describe(q, "on grid" if signed is None else "float")
                for q, signed in zip((module.x_quantizer, module.y_quantizer), module.signed, strict=True)
            ]
            rows.append(_shared_row(name, "sum", " + ".join(text), module))
        elif isinstance(module, StreamQuantizer):
            rows.append(_shared_row(name, "stream", _describe(module.quantizer, "float"), module))
    return rows


def _layer_row(name: str, layer: Layer, following: nn.Module | None, macs: int) -> PlanRow:
    norm = getattr(layer, "norm", None) or following
    extra = list(norm.parameters()) + [b for b in norm.buffers() if b.dim()] if norm else []
    rest = sum(t.numel() for t in extra) + (0 if layer.bias is None else layer.bias.numel())
    quantized = isinstance(layer, tuple(LAYER_KINDS.values()))
    weight_quantizer: Quantizer | None = getattr(layer, "weight_quantizer", None)
    input_quantizer: Quantizer | None = getattr(layer, "input_quantizer", None)
    weight_bits = weight_quantizer.spec.num_bits if weight_quantizer else FLOAT_BITS
    is_image = quantized and input_quantizer is None
    input_bits = input_quantizer.spec.num_bits if input_quantizer else FLOAT_BITS
    if is_image:
        input_bits = IMAGE_BITS
    constants = sum(q.num_constants for q in (weight_quantizer, input_quantizer) if q is not None)
    part = "auxiliary" if name.startswith(SCAFFOLD_PREFIXES) else "quantized" if quantized else "float"
    parameters = sum(p.numel() for p in layer.parameters(recurse=False))
    parameters += sum(p.numel() for p in norm.parameters()) if norm else 0
    return PlanRow(
        name,
        next(kind for layer_class, kind in KINDS.items() if isinstance(layer, layer_class)),
        part,
        _describe(weight_quantizer, "float 32"),
        _describe(input_quantizer, "image u8" if is_image else "float 32"),
        _norm_name(norm),
        parameters,
        layer.weight.numel() * weight_bits + (rest + constants) * FLOAT_BITS,
        macs,
        macs * weight_bits * input_bits,
    )


def _shared_row(name: str, kind: str, text: str, module: nn.Module) -> PlanRow:
    found = [q for q in module.modules() if isinstance(q, Quantizer)]
    part = "quantized" if found else "float"
    bits = sum(q.num_constants for q in found) * FLOAT_BITS
    return PlanRow(name, kind, part, "-", text, "-", 0, bits, 0, 0)


@dataclasses.dataclass(frozen=True)
class PlanTotal:
    """Sums over rows, see :class:`PlanRow`; ``weight_bytes`` is ``weight_bits / 8``."""

    layers: int
    parameters: int
    weight_bytes: int
    macs: int
    bit_ops: int


def total(rows: list[PlanRow], *parts: str) -> PlanTotal:
    """Returns the totals of the rows in the given parts."""
    chosen = [row for row in rows if row.part in parts]
    return PlanTotal(
        sum(row.kind in KINDS.values() for row in chosen),
        sum(row.parameters for row in chosen),
        sum(row.weight_bits for row in chosen) // 8,
        sum(row.macs for row in chosen),
        sum(row.bit_ops for row in chosen),
    )
