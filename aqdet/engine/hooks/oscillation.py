"""The hook that measures, dampens and freezes weights that flip between two codes (Nagel et al., 2203.11086)."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ...layers import output_first
from ...modeling.scaffold import SCAFFOLD_PREFIXES
from ...quantization import Quantizer, quantize
from ...quantization.functional import broadcast_scale
from ...utils.distributed import unwrap

logger = logging.getLogger(__name__)
LAYOUT = "output channels first"
"""Key of states since a transposed convolution's history has that order, as its quantizer has."""

MAX_BITS = 4
"""Largest number of bits of a layer that is treated, as in the authors' code; with more bits, flips are small."""
OSCILLATING = 0.005
"""Frequency above which a weight counts as oscillating, as in the paper's tables."""
LOG_PERIOD = 20


@dataclasses.dataclass
class WeightHistory:
    """The history of one layer's weight; every tensor has the weight's shape.

    Attributes:
        codes: int8, the codes after the last step.
        direction: int8, the sign of the last change of each code, 0 before the first one.
        frequency: The moving average of "the code changed back".
        average: The moving average of the code.
        frozen: bool, whether each weight is frozen.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor

    @classmethod
    def start(cls, codes: Tensor) -> WeightHistory:
        """Starts the history with integer codes."""
        zero = torch.zeros_like(codes, dtype=torch.float32)
        return cls(codes.to(torch.int8), zero.to(torch.int8), zero, codes.float(), zero.bool())

    def update(self, codes: Tensor, momentum: float, threshold: float) -> Tensor:
        """Adds the codes after a step, and freezes weights that oscillate.

        A code oscillates when it changes in the direction opposite to its last change. A weight whose frequency is
        above ``threshold``, unless that is 0, is frozen to the rounded average of its code.

        Returns:
            The share of weights whose code changed, 0-dim.
        """
        codes = torch.where(self.frozen, self.codes, codes.to(torch.int8))
        change = (codes - self.codes).sign()
        oscillated = change * self.direction == -1
        self.frequency.lerp_(oscillated.float(), momentum)
        self.direction = torch.where(change != 0, change, self.direction)
        if threshold > 0:
            new = (self.frequency > threshold) & ~self.frozen
            codes = torch.where(new, self.average.round().to(torch.int8), codes)
            self.frozen |= new
        self.average.lerp_(codes.float(), momentum)
        self.codes = codes
        return (change != 0).float().mean()


class OscillationHook(HookBase):
    """Logs, dampens and freezes the oscillations of quantized weights of at most 4 bits.

    After each step, the flips of every weight are counted. Every 20 iterations each layer's share of
    oscillating weights is logged as ``oscillation/<layer>``, the mean share of codes that a step changes as
    ``flips/<layer>``, and with freezing ``frozen/<layer>``; ``.../all`` is over all weights.

    Dampening adds the loss ``weight * |q(w) - clip(w)|^2``, summed over all weights, which pulls them to their
    quantized values; scales get no gradient of it. Its weight rises from 0 by a cosine, as in the paper.
    A frozen weight keeps its code from then on: after each step it is set to that code times the current scale. The
    threshold falls by a cosine from ``threshold_start``.

    Args:
        model: The model with its quantizers, not wrapped for distribution.
        dampening: ``DAMPENING``, the weight of the loss at the end; 0 for no dampening.
        threshold: ``FREEZE_THRESHOLD``, the threshold at the end of training; 0 for no freezing.
        threshold_start: ``FREEZE_THRESHOLD_START``.
        momentum: ``MOMENTUM`` of the moving averages.

    Raises:
        ValueError: If a key of ``MODEL.QUANT.OSCILLATION`` is not valid, which it names, or if no weight has a uniform
            grid of at most 4 bits.
    """

    def __init__(
        self, model: nn.Module, *, dampening: float, threshold: float, threshold_start: float, momentum: float
    ) -> None:
        for key, value, valid in (
            ("DAMPENING", dampening, dampening >= 0),
            ("FREEZE_THRESHOLD", threshold, 0 <= threshold < 1),
            ("FREEZE_THRESHOLD_START", threshold_start, threshold_start >= threshold),
            ("MOMENTUM", momentum, 0 < momentum < 1),
        ):
            if not valid:
                raise ValueError(
                    f"MODEL.QUANT.OSCILLATION.{key} is out of range: {value} (DAMPENING from 0, FREEZE_THRESHOLD "
                    "from 0 to below 1 and not above FREEZE_THRESHOLD_START, MOMENTUM between 0 and 1)"
                )
        self._dampening = dampening
        self._threshold = threshold, threshold_start
        self._momentum = momentum
        self._layers = _layers(model)
        self._history: dict[str, WeightHistory] = {}
        self._flips: dict[str, Tensor] = {}
        self._num_steps = 0
        self._handle = model.register_forward_hook(self._add_loss) if dampening > 0 else None

    def _progress(self, iteration: int) -> float:
        """Returns a factor that rises from 0 to 1 over the training by a cosine."""
        return 0.5 * (1 - math.cos(math.pi * min(iteration / max(self.trainer.max_iter, 1), 1.0)))

    def _add_loss(self, model: nn.Module, _: Any, losses: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return losses
        loss = sum(dampening_loss(output_first(layer), layer.weight_quantizer) for layer in self._layers.values())
        factor = self._dampening * self._progress(get_event_storage().iter)
        return {**losses, "loss_dampening": factor * loss}

    @torch.no_grad()
    def before_train(self) -> None:
        """Starts from the codes after calibration, or from the history of the resumed run."""
        for name, layer in self._layers.items():
            device = layer.weight.device
            if name in self._history:
                history = self._history[name]
                for field in dataclasses.fields(history):
                    setattr(history, field.name, getattr(history, field.name).to(device))
            else:
                codes = layer.weight_quantizer.to_integer(output_first(layer)).codes
                self._history[name] = WeightHistory.start(codes)
            self._flips[name] = self._flips.get(name, torch.zeros(())).to(device)

    @torch.no_grad()
    def after_step(self) -> None:
        """Updates the history, sets frozen weights to their codes, and logs every 20 iterations."""
        end, start = self._threshold
        threshold = 0.0
        if end > 0:
            threshold = start + (end - start) * self._progress(self.trainer.iter + 1)
        for name, layer in self._layers.items():
            history = self._history[name]
            weight = output_first(layer)
            integer = layer.weight_quantizer.to_integer(weight)
            self._flips[name] += history.update(integer.codes, self._momentum, threshold)
            if end > 0:
                weight.copy_(torch.where(history.frozen, history.codes * integer.scale, weight))
        self._num_steps += 1
        if (self.trainer.iter + 1) % LOG_PERIOD == 0 or self.trainer.iter + 1 == self.trainer.max_iter:
            self._log()

    def _log(self) -> None:
        shares: dict[str, dict[str, float]] = {}
        for name, history in self._history.items():
            shares[name] = {
                "oscillation": (history.frequency > OSCILLATING).float().mean().item(),
                "flips": self._flips[name].item() / self._num_steps,
            }
            if self._threshold[0] > 0:
                shares[name]["frozen"] = history.frozen.float().mean().item()
            self._flips[name].zero_()
        self._num_steps = 0
        sizes = {name: history.codes.numel() for name, history in self._history.items()}
        total = sum(sizes.values())
        shares["all"] = {
            kind: sum(shares[name][kind] * size for name, size in sizes.items()) / total
            for kind in next(iter(shares.values()))
        }
        for name, values in shares.items():
            for kind, value in values.items():
                self.trainer.storage.put_scalar(f"{kind}/{name}", value, smoothing_hint=False)

    def after_train(self) -> None:
        """Removes the dampening loss from the model."""
        if self._handle is not None:
            self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Returns the history of every layer, and the counts since the last log."""
        fields = [field.name for field in dataclasses.fields(WeightHistory)]
        history = {name: {field: getattr(h, field) for field in fields} for name, h in self._history.items()}
        return {"history": history, "flips": dict(self._flips), "num_steps": self._num_steps, LAYOUT: True}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._history = {
            name: WeightHistory(**{field: value.clone() for field, value in values.items()})
            for name, values in state["history"].items()
            if name in self._layers
        }
        for name, history in self._history.items():
            if LAYOUT not in state and isinstance(self._layers[name], nn.ConvTranspose2d):
                for field in dataclasses.fields(history):
                    setattr(history, field.name, getattr(history, field.name).transpose(0, 1))
        self._flips = {name: value.clone() for name, value in state["flips"].items() if name in self._layers}
        self._num_steps = state["num_steps"]


def dampening_loss(weight: Tensor, quantizer: Quantizer) -> Tensor:
    """Returns ``|q(w) - clip(w)|^2`` with constant q(w): a 0-dim tensor, differentiable in the weight alone.

    Clipped weights get no gradient, so that the learned range is not disturbed.
    """
    grid = quantizer.grid()
    assert grid is not None
    scale = broadcast_scale(grid.scale.detach(), weight)
    target = quantize(weight.detach(), scale, grid.quant_min, grid.quant_max) * scale
    clipped = weight.clamp(scale * grid.quant_min, scale * grid.quant_max)
    return (target - clipped).square().sum()


def _layers(model: nn.Module) -> dict[str, Any]:
    """Returns the layers of the detector, by name, whose weight is on a uniform grid of few bits."""
    layers, left_out = {}, []
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if name.startswith(SCAFFOLD_PREFIXES):
            continue
        if isinstance(quantizer, Quantizer) and quantizer.spec.num_bits <= MAX_BITS:
            if quantizer.grid() is None:
                left_out.append(f"{name} ({quantizer.spec.quantizer})")
            else:
                layers[name] = module
    if not layers:
        raise ValueError(
            "MODEL.QUANT.OSCILLATION is on, but no layer has weights on a uniform grid of at most "
            f"{MAX_BITS} bits: MODEL.QUANT.ENABLED must be True, and WEIGHT.QUANTIZER lsq, lsqplus or pact"
        )
    if left_out:
        logger.warning("Oscillations of %d layers are not tracked, %s among them", len(left_out), left_out[0])
    return layers


def build_oscillation_hook(cfg: CfgNode, model: nn.Module) -> OscillationHook | None:
    """Builds the hook of ``MODEL.QUANT.OSCILLATION``; None if all of it is off.

    Raises:
        ValueError: As :class:`OscillationHook` does.
    """
    node = cfg.MODEL.QUANT.OSCILLATION
    if not (node.TRACK or node.DAMPENING or node.FREEZE_THRESHOLD):
        return None
    return OscillationHook(
        unwrap(model),
        dampening=node.DAMPENING,
        threshold=node.FREEZE_THRESHOLD,
        threshold_start=node.FREEZE_THRESHOLD_START,
        momentum=node.MOMENTUM,
    )
