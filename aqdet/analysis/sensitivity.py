"""The cost of few bits in each part of a detector, measured by quantizing that part alone."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import AqdetCheckpointer
from ..config import detector_only
from ..modeling import QuantPolicy, quantizable_layers
from ..quantization import Quantizer, calibrate, set_quantization
from .plan import make_plan

GROUPS = ("layer", "block", "part")
_PART = re.compile(r"(?:^|\.)(stem|res\d|fpn|head\.[a-z]+)")
_BLOCK = re.compile(r"(?:^|\.)(stem|res\d\.\d+|fpn_[a-z]+\d|head\.[a-z_]+(?:\.\d+)?)")


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The measured costs of few bits in a detector.

    Attributes:
        baseline: The loss, or AP, in full precision.
        layers: Name of each group -> names of its layers.
        macs: Name of each layer -> multiply-accumulates for one image.
        weights: Name of each layer -> number of weights.
        costs: Name of each group -> bits -> increase of the loss, or decrease of the AP, when the weights and inputs of
            that group alone are quantized.
    """

    baseline: float
    layers: dict[str, list[str]]
    macs: dict[str, int]
    weights: dict[str, int]
    costs: dict[str, dict[int, float]]


def group_of(name: str, by: str) -> str:
    """Returns the group of a layer: itself, its residual block, or its part of the detector.

    Args:
        name: The dotted name of the layer.
        by: One of :data:`GROUPS`.
    """
    pattern = {"block": _BLOCK, "part": _PART}.get(by)
    match = pattern.search(name) if pattern else None
    return match.group(1) if match else name


class PartlyQuantized:
    """A full-precision detector whose layers can be quantized one by one to chosen bits, without training.

    Only layers with the bits that ``MODEL.QUANT`` gives to most layers take part: the stem, the prediction layers, the
    tensors that several layers read and the layers that a rule of ``MODEL.QUANT.RULES`` decides stay in full precision.

    Args:
        cfg: The config of the quantized detector; it is not changed.
        weights: The checkpoint of the full-precision detector.
        batches: Training batches for the ranges and the loss.
        bits: The bit widths to choose from.

    Raises:
        ValueError: In one line, if the checkpoint does not fit or comes from a quantized training, or no layer is left.

    Attributes:
        layers: Names of the layers that take part.
        kept: Names of the layers that a rule decides.
    """

    def __init__(
        self, cfg: CfgNode, weights: str, batches: Sequence[list[dict[str, Any]]], bits: Iterable[int]
    ) -> None:
        self._batches = batches
        self._models: dict[int, nn.Module] = {}
        for width in bits:
            own = detector_only(cfg)
            own.MODEL.QUANT.ENABLED = True
            own.MODEL.QUANT.WEIGHT.NUM_BITS = own.MODEL.QUANT.INPUT.NUM_BITS = width
            model = build_model(own)
            node = own.CHECKPOINT
            AqdetCheckpointer(model, allow_keys=node.ALLOW_KEYS, allow_pickle=node.ALLOW_PICKLE).load(weights)
            model.train()
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()  # a batch's own statistics would hide a part of the error
            calibrate(model, functools.partial(self._losses, model), method=own.MODEL.QUANT.CALIBRATION.METHOD)
            set_quantization(model, False)
            self._models[width] = model
        any_model = next(iter(self._models.values()))
        policy = QuantPolicy.from_config(cfg)
        named = list(quantizable_layers(any_model))
        self.kept = [name for name, _ in named if policy.winning_rule(name) is not None]
        self.layers = [
            name
            for name, layer in named
            if layer.quant_site.role == "inner" and name not in self.kept  # type: ignore[union-attr]
        ]
        if not self.layers:
            raise ValueError(
                "MODEL.QUANT.RULES decide for all layers, so that there is none to measure: take a config without"
            )

    @property
    def models(self) -> Mapping[int, nn.Module]:
        """Bits -> the detector with all its quantizers switched off."""
        return self._models

    @torch.no_grad()
    def _losses(self, model: nn.Module) -> float:
        """Returns the mean of the summed losses over the batches; the model stays as it was."""
        before = vars(model).pop("loss_normalizer", None)  # a running mean that each forward pass moves
        with EventStorage(0):
            losses = [float(sum(model(batch).values())) for batch in self._batches]
        vars(model).pop("loss_normalizer", None)
        if before is not None:
            model.loss_normalizer = before
        return sum(losses) / len(losses)

    def measure(self, layers: Iterable[str], bits: int, metric: Callable[[nn.Module], float] | None = None) -> float:
        """Measures the detector with some layers quantized and all else in full precision.

        Args:
            layers: The names of the layers.
            bits: The bits of their weights and inputs, one of the constructor's.
            metric: A function of the model; by default the mean loss over the batches.
        """
        model = self._models[bits]
        chosen: list[Any] = [model.get_submodule(name) for name in layers]
        found: list[Quantizer] = [
            q for layer in chosen for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None
        ]
        try:
            for quantizer in found:
                quantizer.enabled = True
            return (metric or self._losses)(model)
        finally:
            for quantizer in found:
                quantizer.enabled = False


def measure_sensitivity(
    detector: PartlyQuantized,
    *,
    by: str = "layer",
    size: tuple[int, int],
    metric: Callable[[nn.Module], float] | None = None,
    progress: Callable[[list[tuple[str, int]]], Iterable[tuple[str, int]]] = lambda pairs: pairs,
) -> Sensitivity:
    """Quantizes one group of layers after another, at each bit width.

    Args:
        detector: The detector.
        by: One of :data:`GROUPS`.
        size: Height and width in pixels of the image for which MACs are counted.
        metric: A function of the model that is larger for a better one, such as AP; by default the loss over the
            detector's batches is used, which is smaller for a better one.
        progress: A function that wraps the list of measurements, ``(group, bits)``.

    Raises:
        ValueError: If ``by`` is unknown, with the valid names.
    """
    if by not in GROUPS:
        raise ValueError(f"layers are grouped by one of {', '.join(GROUPS)}, got {by!r}")
    groups: dict[str, list[str]] = {}
    for name in detector.layers:
        groups.setdefault(group_of(name, by), []).append(name)
    bits, model = next(iter(detector.models.items()))
    baseline = detector.measure([], bits, metric)
    costs: dict[str, dict[int, float]] = {name: {} for name in groups}
    for group, width in progress([(group, width) for group in groups for width in detector.models]):
        measured = detector.measure(groups[group], width, metric)
        costs[group][width] = measured - baseline if metric is None else baseline - measured
    was_training = [(module, module.training) for module in model.modules()]
    rows = {row.name: row for row in make_plan(model, size)}
    for module, training in was_training:
        module.training = training
    weights = {name: int(model.get_submodule(name).weight.numel()) for name in detector.layers}  # type: ignore[union-attr,operator]
    return Sensitivity(baseline, groups, {name: rows[name].macs for name in detector.layers}, weights, costs)
