"""Post-training quantization: a quantized detector from a full-precision one, without a step of training."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import load_detector
from ..config import detector_only
from ..layers import QuantConv2d
from ..modeling.architecture import COUNTERPARTS
from ..modeling.exportable import export_obstacles
from ..modeling.meta_arch.dense import LowPrecisionDense
from ..quantization import CALIBRATION_METHODS, quantizers
from ..quantization.calibration import observe, set_ranges
from .hooks.precise_bn import estimate_bn
from .reconstruction import reconstruct_weights

logger = logging.getLogger(__name__)

ARCHITECTURES = {"RetinaNet": "QuantRetinaNet"}
"""Detectron2's meta-architectures that can be quantized under another name."""
MOST_WEIGHT_BITS = 7
"""Bits of weights beside 8-bit inputs; 8-bit weights would ship as two int8 convolutions (``int8_weights.py``)."""
HELD_OUT = 4
"""One batch of so many is held out of calibration, and judges what was tried."""
_SECONDS_BETWEEN_LINES = 5.0
Batch = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way to quantize, and the error of its outputs, see :func:`output_error`."""

    name: str
    error: float


@dataclasses.dataclass(frozen=True)
class PostTraining:
    """The result of post-training quantization.

    Attributes:
        model: The quantized detector, in evaluation mode.
        float_model: The detector that it was made from.
        attempts: All attempts, in order.
        chosen: The name of the attempt that ``model`` is.
    """

    model: nn.Module
    float_model: nn.Module
    attempts: tuple[Attempt, ...]
    chosen: str


def quantized_overrides(cfg: CfgNode, bits: int) -> list[str]:
    """Returns ``KEY VALUE`` pairs that turn a full-precision detector's config into a quantized one's.

    Args:
        cfg: The config of a detector of aqdet, or of one of Detectron2's that aqdet can quantize.
        bits: Bits of the weights and inputs of inner layers. Weights have at most :data:`MOST_WEIGHT_BITS`, which need
            half the bytes and half the time of 8 bits.
    """
    architecture, backbone = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME
    pairs = []
    if architecture in ARCHITECTURES:
        pairs += ["MODEL.META_ARCHITECTURE", ARCHITECTURES[architecture]]
    if backbone in COUNTERPARTS:
        pairs += ["MODEL.BACKBONE.NAME", COUNTERPARTS[backbone]]
    return [
        *pairs,
        *("MODEL.QUANT.ENABLED", "True"),
        *("MODEL.QUANT.WEIGHT.NUM_BITS", str(min(bits, MOST_WEIGHT_BITS)), "MODEL.QUANT.INPUT.NUM_BITS", str(bits)),
    ]


def check_quantizable(cfg: CfgNode) -> None:
    """Checks that a config describes a quantized detector that can be exported.

    Raises:
        ValueError: In one line, naming the key and the way out.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY or not issubclass(META_ARCH_REGISTRY.get(name), LowPrecisionDense):
        known = sorted(ours for ours, kind in META_ARCH_REGISTRY if issubclass(kind, LowPrecisionDense))
        raise ValueError(
            f"MODEL.META_ARCHITECTURE must be one of {', '.join([*ARCHITECTURES, *known])} to be quantized and "
            f"exported without training, got {name!r}"
        )
    for obstacle in export_obstacles(cfg):
        raise ValueError(obstacle)


def quantize_detector(
    cfg: CfgNode,
    weights: str,
    batches: Sequence[Batch],
    *,
    methods: Sequence[str] = CALIBRATION_METHODS,
    reconstruct: bool = False,
    progress: Callable[[str], object] = logger.info,
) -> PostTraining:
    """Quantizes a full-precision detector from some images alone.

    Every calibration method is tried, and then corrections of the shifts that quantization causes: biases correct the
    outputs' means (1906.04721), BN statistics are estimated again, and weights are rounded by the layers' outputs. The
    attempt is chosen whose outputs on held-out images are nearest to the full-precision detector's.

    Args:
        cfg: The config of the quantized detector, see :func:`quantized_overrides`; it is not changed.
        weights: The full-precision checkpoint.
        batches: Images in the form of Detectron2's detectors, without ground truth. Every fourth batch is held out, of
            fewer than four the last; a single batch serves for both purposes.
        methods: Names from :data:`aqdet.quantization.CALIBRATION_METHODS`.
        reconstruct: Whether to try :mod:`~aqdet.engine.reconstruction` too.
        progress: A function that is called with lines of text.

    Raises:
        FileNotFoundError, ValueError: In one line, for a checkpoint that does not fit, or no batches.
    """
    if not batches:
        raise ValueError("post-training quantization needs at least one image")
    float_model, model = _load(cfg, weights)
    num_classes: Any = float_model.num_classes
    held = list(batches[HELD_OUT - 1 :: HELD_OUT]) or list(batches[-1:])
    calibration = [batch for index, batch in enumerate(batches) if index % HELD_OUT != HELD_OUT - 1]
    if 1 < len(batches) < HELD_OUT:
        calibration = calibration[:-1]
    corrections = _corrections(float_model, model, reconstruct)
    rounds = len(calibration) * (1 + sum(len(name.split(", ")) for name in corrections))
    counter = _Counter(rounds + len(held) * (1 + len(methods) + len(corrections)), progress)

    def run() -> None:
        for batch in counter.over(calibration, "calibrating"):
            predict(model, batch)

    with torch.no_grad():
        observed = observe(model, run)
        wanted = [predict(float_model, batch) for batch in counter.over(held, "float outputs")]

        def error_of(candidate: nn.Module, name: str) -> Attempt:
            pairs = zip(wanted, counter.over(held, name), strict=True)
            errors = [output_error(own, predict(candidate, batch), num_classes) for own, batch in pairs]
            attempt = Attempt(name, sum(errors) / len(errors))
            progress(f"{name}: error of the outputs {attempt.error:.5f}")
            return attempt

        attempts = []
        for method in methods:
            set_ranges(model, observed, method)
            attempts.append(error_of(model, method))
        best = min(attempts, key=lambda attempt: attempt.error)
        method = best.name
        set_ranges(model, observed, method)
        plain = copy.deepcopy(model)
        for name, correct in corrections.items():
            trial = copy.deepcopy(plain)
            try:
                correct(trial, functools.partial(counter.over, calibration, name))
            except ValueError as error:  # a BN gets one value a channel from a batch
                progress(f"{name}: left out, {error}")
                continue
            attempts.append(error_of(trial, f"{method}, {name}"))
            if attempts[-1].error < best.error:
                best, model = attempts[-1], trial
    return PostTraining(model.eval(), float_model, tuple(attempts), best.name)


def _load(cfg: CfgNode, weights: str) -> tuple[nn.Module, nn.Module]:
    """Returns the full-precision detector, and the quantized one with the same weights and without ranges."""
    float_model = load_detector(cfg, weights, quantized=False, whole=True)
    cfg = detector_only(cfg)
    cfg.MODEL.QUANT.ENABLED = True
    model = build_model(cfg)
    own = tuple(f"{name}." for name, _ in quantizers(model))
    left = model.load_state_dict(float_model.state_dict(), strict=False)
    assert not left.unexpected_keys and all(key.startswith(own) for key in left.missing_keys), left
    return float_model, model.eval()


def predict(model: Any, batch: Batch) -> list[list[Tensor]]:
    """Returns a dense detector's predictions before decoding: for each kind, a tensor ``(N, C, H, W)`` a level."""
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    return [list(kind) for kind in model.head([features[name] for name in model.head_in_features])]


def output_error(wanted: list[list[Tensor]], found: list[list[Tensor]], num_classes: int) -> float:
    """Returns the error of a detector's predictions, relative to the size of the full-precision predictions.

    The error is the sum of two squared differences, each divided by the squared full-precision predictions: that of the
    class probabilities (times the centerness, where there is one), and that of the box deltas where the full-precision
    detector sees objects.

    Args:
        wanted, found: Predictions in full precision and of the detector, see :func:`predict`.
        num_classes: The number of classes.
    """
    shares = []
    scores = _scores(wanted), _scores(found)
    difference = sum(float((a - b).square().sum()) for a, b in zip(*scores, strict=True))
    shares.append(difference / max(sum(float(score.square().sum()) for score in scores[0]), 1e-12))
    difference = size = 0.0
    for score, own, other in zip(scores[0], wanted[1], found[1], strict=True):
        n, channels, height, width = score.shape
        weight = score.view(n, channels // num_classes, num_classes, height, width).amax(2, keepdim=True)
        shape = (n, weight.shape[1], -1, height, width)
        difference += float((weight * (own - other).view(shape).square()).sum())
        size += float((weight * own.view(shape).square()).sum())
    shares.append(difference / max(size, 1e-12))
    return sum(shares)


def _scores(predictions: list[list[Tensor]]) -> list[Tensor]:
    scores = [logits.sigmoid() for logits in predictions[0]]
    if len(predictions) > 2:
        scores = [score * centerness.sigmoid() for score, centerness in zip(scores, predictions[2], strict=True)]
    return scores


# --- corrections ---

Loader = Callable[[], Iterator[Batch]]


def _corrections(
    float_model: nn.Module, model: nn.Module, reconstruct: bool
) -> dict[str, Callable[[nn.Module, Loader], None]]:
    """Returns the corrections of shifts that quantization causes, by name."""

    def biases(trial: nn.Module, batches: Loader) -> None:
        correct_biases(trial, float_model, batches())

    def both(trial: nn.Module, batches: Loader) -> None:
        reestimate_bn(trial, batches)
        correct_biases(trial, float_model, batches())

    def reconstructed(after: Callable[[nn.Module, Loader], None], trial: nn.Module, batches: Loader) -> None:
        reconstruct_weights(trial, lambda: [predict(trial, batch) for batch in batches()])
        after(trial, batches)

    found: dict[str, Callable[[nn.Module, Loader], None]] = {"biases corrected": biases}
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        found |= {"BN estimated again": reestimate_bn, "BN estimated again, biases corrected": both}
    if reconstruct:
        # Not by itself: its error of the outputs would be the smallest, but AP was lower than with the others after it.
        last = list(found)[-1]
        found[f"weights rounded by outputs, {last}"] = functools.partial(reconstructed, found[last])
    return found


def reestimate_bn(model: nn.Module, batches: Loader) -> None:
    """Estimates the BN statistics of a model in evaluation mode from images without ground truth."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
    try:
        estimate_bn(model, batches, sys.maxsize)
    finally:
        for norm in norms:
            norm.eval()


@torch.no_grad()
def correct_biases(model: nn.Module, float_model: nn.Module, batches: Iterable[Batch]) -> None:
    """Moves each channel's mean output back to its full-precision value, layer after layer.

    A layer is corrected on inputs from corrected layers (Nagel et al., 1906.04721), by the bias of its norm, or of its
    convolution if it has no norm. A prediction layer that runs on several levels has one bias for all of them.

    Args:
        model: The quantized detector, which is changed in place.
        float_model: The same detector in full precision.
        batches: Batches of images.
    """
    sites = dict(_sites(model))
    theirs = {name: float_model.get_submodule(name) for name in sites}
    means: dict[str, list[Tensor]] = {}
    shifts: dict[str, Tensor] = {}
    positions: dict[str, int] = {}

    def record(name: str, output: Tensor) -> None:
        means.setdefault(name, []).append(output.mean((0, 2, 3)))

    def correct(name: str, output: Tensor) -> Tensor:
        shift = output.mean((0, 2, 3)) - means[name].pop(0)
        number = output[:, 0].numel()
        shifts[name] = shifts.get(name, torch.zeros_like(shift)) + shift * number
        positions[name] = positions.get(name, 0) + number
        return output - shift.view(1, -1, 1, 1)

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: record(name, output))
        for name, module in theirs.items()
    ]
    handles += [
        module.register_forward_hook(lambda _, __, output, name=name: correct(name, output))
        for name, module in sites.items()
    ]
    try:
        for batch in batches:
            predict(float_model, batch)
            predict(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, module in sites.items():
        bias: Any = module.bias
        bias.sub_(shifts[name] / positions[name])


def _sites(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Returns the modules with a bias whose output is a convolution's before its activation."""
    for name, module in model.named_modules():
        if not isinstance(module, QuantConv2d):
            continue
        norm = module.norm
        if norm is not None and isinstance(getattr(norm, "bias", None), Tensor):
            yield f"{name}.norm", norm
        elif norm is None and module.bias is not None and module.activation is None:
            yield name, module


class _Counter:
    """Counts the batches that are done, and tells how many are left and how long they take."""

    def __init__(self, total: int, progress: Callable[[str], object]) -> None:
        self._total, self._progress = total, progress
        self._done = 0
        self._start = self._printed = time.monotonic()

    def over(self, batches: Sequence[Batch], text: str) -> Iterator[Batch]:
        """Yields batches and counts each one when it is done."""
        for batch in batches:
            yield batch
            self._done += 1
            now = time.monotonic()
            if now - self._printed > _SECONDS_BETWEEN_LINES:
                self._printed = now
                left = int((now - self._start) / self._done * max(self._total - self._done, 0))
                self._progress(
                    f"{text}: batch {self._done} of {self._total}, ETA {left // 60}:{left % 60:02d} min",
                )
