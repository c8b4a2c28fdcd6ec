"""Numbers that say training has gone wrong: a loss that is not finite, scales at their floor, weights on one level."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer
from detectron2.layers import CycleBatchNormList
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..quantization import Quantizer, quantizers
from ..quantization.functional import SCALE_EPS

logger = logging.getLogger(__name__)

_MAX_LISTED = 5
_MIN_GRAD_SCALE = 2.0**-16
"""32 steps in a row were skipped when mixed precision, which starts at ``2^16``, is at this."""


class NonFiniteLoss(FloatingPointError):
    """A loss, or its gradient, is infinite or not a number."""


class _CheckedLosses:
    """Checks the losses of all processes where Detectron2 checks those of the main one: before the weights move."""

    def _write_metrics(self, loss_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        values = {name: float(value.detach()) for name, value in loss_dict.items()}
        wrong = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
        found = [text for text in comm.all_gather(wrong or self._wrong_gradients()) if text]
        if found:
            raise NonFiniteLoss(found[0])
        super()._write_metrics(loss_dict, *args, **kwargs)  # type: ignore[misc]

    def _wrong_gradients(self) -> str:
        return ""


class CheckedTrainer(_CheckedLosses, SimpleTrainer):
    """Detectron2's, which raises :class:`NonFiniteLoss` in all processes if a loss of one is not finite.

    Nor may the gradient be, which happens with a finite loss too: by values that the loss masks.
    """

    def _wrong_gradients(self) -> str:
        groups = self.optimizer.param_groups
        norm = nn.utils.get_total_norm(p.grad for group in groups for p in group["params"] if p.grad is not None)
        if torch.isfinite(norm):
            return ""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        wrong = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
        if wrong:
            return f"gradients of {len(wrong)} parameters, {wrong[-1]} among them"
        largest = max(gradients, key=lambda name: gradients[name].abs().max().item())
        return f"norm of the gradient, which is largest in {largest}"


class CheckedAMPTrainer(_CheckedLosses, AMPTrainer):
    """As :class:`CheckedTrainer` in mixed precision, where the scaler skips gradients that are not finite.

    If it does so in step after step, nothing trains any more, which the losses do not show.
    """

    def _wrong_gradients(self) -> str:
        scale = self.grad_scaler.get_scale()
        if scale >= _MIN_GRAD_SCALE:
            return ""
        return f"gradients in step after step, until mixed precision scaled the loss by {scale:.1e}"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the first tensor that is not finite comes from.

    Attributes:
        what: ``"output of <module>"`` or ``"parameter <name>"``.
        level: pyramid level or stage, ``""`` if there is none.
        around: quantizers around it in the order of computation.
    """

    what: str
    level: str
    around: tuple[str, ...]


def find_origin(model: nn.Module, run: Callable[[], object]) -> Origin | None:
    """Runs a model and finds the first tensor that is not finite.

    A module whose output is not finite although its inputs are is the origin. If the inputs are not finite
    either, they were made by what encloses it, a convolution around its norm for example.

    Args:
        model: not wrapped for distribution.
        run: calls the model.

    Returns:
        None if all parameters and all outputs of modules are finite.
    """
    owners: dict[str, list[str]] = {}
    for name, _ in quantizers(model):
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            around = next((own for owner, own in owners.items() if name.startswith(f"{owner}.")), [])
            return Origin(f"parameter {name}", _level_of(name), tuple(around))

    calls: Counter[str] = Counter()
    inputs_finite: dict[str, bool] = {}
    order: list[str] = []  # of layers with quantizers
    first: tuple[str, Counter[str], str] | None = None

    def before(name: str) -> None:
        calls[name] += 1
        if name in owners and name not in order:
            order.append(name)

    def after(name: str, outputs: Any) -> None:
        nonlocal first
        if first is None and not all_finite(outputs):
            while name and not inputs_finite[name]:
                name = name.rpartition(".")[0]
            first = name, calls.copy(), name if name in owners else order[-1] if order else ""

    def note_inputs(name: str, inputs: Any) -> None:
        if first is None:
            inputs_finite[name] = all_finite(inputs)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _, inputs, name=name: note_inputs(name, inputs)))
        handles.append(module.register_forward_pre_hook(lambda _, inputs, name=name: before(name)))
        handles.append(module.register_forward_hook(lambda _, inputs, outputs, name=name: after(name, outputs)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if first is None:
        return None
    layer, calls_then, nearest = first
    level = _level_by_calls(model, layer, calls_then, calls) or _level_of(layer)
    place = order.index(nearest) if nearest else 0
    around = [name for owner in order[max(place - 1, 0) : place + 2] for name in owners[owner]]
    return Origin(f"output of {layer or 'the preprocessing of images'}", level, tuple(around))


def all_finite(values: Any) -> bool:
    """Whether all floating point tensors in nested lists, tuples and dicts are finite."""
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    if isinstance(values, Mapping):
        values = list(values.values())
    return not isinstance(values, Sequence) or isinstance(values, str) or all(all_finite(value) for value in values)


def _level_by_calls(model: nn.Module, layer: str, then: Counter[str], total: Counter[str]) -> str:
    """The level of a head's layer: heads are called once a level, in order."""
    names: Sequence[str] = getattr(model, "head_in_features", ())
    while layer:
        if total[layer] > 1:
            index = then[layer] - 1
            return names[index] if total[layer] == len(names) else f"call {index + 1} of {total[layer]}"
        layer = layer.rpartition(".")[0]
    return ""


def _level_of(name: str) -> str:
    """The level or stage that is part of a layer's name."""
    match = re.search(r"\b(?:fpn_[a-z]+|p)(\d)\b", name)
    if match:
        return f"p{match.group(1)}"
    stage = re.search(r"\b(stem|res\d)\b", name)
    return stage.group(1) if stage else ""


def describe_single_value(model: nn.Module, error: ValueError) -> str:
    """Which batch norm an error of torch's is about that got one value a channel; "" for any other error.

    Args:
        model: not wrapped for distribution.
        error: as it was raised, with its traceback.
    """
    if not str(error).startswith("Expected more than 1 value per channel"):
        return ""
    callers = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module in callers]
    if not names:
        return ""
    name, level = names[0], _level_of(names[0])
    owner, _, index = name.rpartition(".")
    if isinstance(model.get_submodule(owner), CycleBatchNormList):
        name, level = owner, cast(Any, model).head_in_features[int(index)]
    where = f"{name}, level {level}," if level else name
    return (
        f"batch norm {where} gets one value a channel, a pixel of one image, and cannot normalize it: train on larger "
        "images (INPUT.MIN_SIZE_TRAIN, INPUT.MAX_SIZE_TRAIN), or on more of them in each process (SOLVER.IMS_PER_BATCH)"
    )


def describe_scales(model: nn.Module, names: Sequence[str]) -> str:
    """Names with their scales, or ranges of scales."""
    modules = dict(quantizers(model))
    texts = []
    for name in names:
        grid = modules[name].grid() if modules[name].is_calibrated else None
        if grid is not None:
            low, high = grid.scale.min().item(), grid.scale.max().item()
            texts.append(f"{name} {low:.3g}" + (f" to {high:.3g}" if high != low else ""))
    return ", ".join(texts) or "none"


class QuantizerWatchHook(HookBase):
    """Warns, once for each, of quantizers that do not learn as they should, by their names.

    These are scales at their floor, layers whose weights are all on one level, and scales or clipping ranges that have
    moved by more than a factor of ``MAX_FACTOR`` or not at all since this process began to train. The hook looks every
    ``period`` iterations and after the last one.

    Args:
        period: in iterations; a look costs about as much as quantizing the weights once.
    """

    MAX_FACTOR = 4.0

    def __init__(self, period: int = 100) -> None:
        self._period = period
        self._said: set[str] = set()
        self._started: dict[str, Tensor] = {}

    def before_step(self) -> None:
        """Notes the sizes that training starts with: they are known when calibration is done."""
        if not self._started:
            self._started = _sizes(self.trainer.model)

    def after_step(self) -> None:
        """Looks if it is time to."""
        next_iteration = self.trainer.iter + 1
        if next_iteration % self._period == 0 or next_iteration == self.trainer.max_iter:
            model = self.trainer.model
            self._warn(
                [name for name, q in quantizers(model) if _is_at_floor(q)],
                "quantizers have a scale at its floor, below which it cannot shrink",
            )
            self._warn(
                [name for name, module in model.named_modules() if _is_on_one_level(module)],
                "layers have all their weights on one level, and so no function",
            )
            moved = {
                name: torch.maximum(size / self._started[name], self._started[name] / size).max().item()
                for name, size in _sizes(model).items()
                if name in self._started
            }
            self._warn(
                [name for name, factor in moved.items() if factor > self.MAX_FACTOR],
                f"quantizers have a scale that moved by more than x{self.MAX_FACTOR:g} since training started "
                "(MODEL.QUANT.SCALE_LR, SOLVER.BASE_LR)",
            )
            if next_iteration - self.trainer.start_iter >= self._period:
                self._warn(
                    [name for name, factor in moved.items() if factor == 1 and not _may_clip_nothing(model, name)],
                    "quantizers have a scale that has not moved since training started: no gradient reaches it",
                )

    def _warn(self, names: list[str], what: str) -> None:
        new = [name for name in names if name not in self._said]
        self._said.update(new)
        if new:
            more = ", ..." * (len(new) > _MAX_LISTED)
            logger.warning("%d %s: %s%s", len(new), what, ", ".join(new[:_MAX_LISTED]), more)


def _sizes(model: nn.Module) -> dict[str, Tensor]:
    """Name to a copy of the learned scale or alpha of every quantizer that is to learn one."""
    learned = {name: next(quantizer.parameters(), None) for name, quantizer in quantizers(model) if quantizer.is_active}
    return {
        name: p.detach().abs().clamp(min=SCALE_EPS) for name, p in learned.items() if p is not None and p.requires_grad
    }


def _may_clip_nothing(model: nn.Module, name: str) -> bool:
    """Whether a quantizer's range has a gradient only where it clips, as PACT's (1805.06085), and may clip nothing."""
    return cast(Quantizer, model.get_submodule(name)).gradient == "pact"


@torch.no_grad()
def _is_at_floor(quantizer: Quantizer) -> bool:
    grid = quantizer.grid() if quantizer.is_active else None
    return grid is not None and bool((grid.scale <= SCALE_EPS).any())


@torch.no_grad()
def _is_on_one_level(module: nn.Module) -> bool:
    quantizer = getattr(module, "weight_quantizer", None)
    if not isinstance(quantizer, Quantizer) or not quantizer.is_active:
        return False
    weight = quantizer.fake_quantize(cast(Tensor, module.weight)).reshape(quantizer.num_scales, -1)
    return bool((weight == weight[:, :1]).all())
