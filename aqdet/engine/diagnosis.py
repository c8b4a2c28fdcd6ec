"""Explanations of a failed training step: the first tensor that is not finite, or a norm that gets one value."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from detectron2.layers import CycleBatchNormList
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.loader import OtherLoader, seed_generators
from ..quantization import quantizers
from ..utils.distributed import unwrap
from .forward_state import leaving_no_trace

if TYPE_CHECKING:
    from .trainer import Trainer


def explain_non_finite(trainer: Trainer, wrong: str) -> str:
    """Repeats the forward pass of an iteration and returns a line that names the first tensor that is not finite.

    All processes call this together, after they have restored the state from before the iteration.

    Args:
        trainer: The trainer, in the iteration.
        wrong: The losses or gradients that are not finite.
    """
    model = unwrap(trainer.model)
    if isinstance(trainer.data_loader, OtherLoader):
        return f"not finite in iteration {trainer.iter}: {wrong}; its images are not known"
    trainer.data_loader.start = trainer.iter
    batch = next(iter(trainer.data_loader))
    seed_generators(trainer.data_loader.seed, trainer.iter, comm.get_rank())
    amp = torch.autocast("cuda", enabled=trainer.cfg.SOLVER.AMP.ENABLED)
    with torch.no_grad(), EventStorage(trainer.iter), leaving_no_trace(model), amp:
        found = find_non_finite(model, lambda: model(batch))
    words = [f"not finite in iteration {trainer.iter}: {wrong}"]
    if found is not None:
        level = f", level {found.level}" * bool(found.level)
        words.append(f"first tensor that is not finite: {found.what}{level}")
        words.append(f"scales around it: {describe_scales(model, found.around)}")
    else:
        words.append("parameters and outputs of layers are finite: it arises behind them")
    words.append(f"learning rate {max(group['lr'] for group in trainer.optimizer.param_groups):.3g}")
    words.append(f"images {', '.join(str(image.get('image_id', image.get('file_name'))) for image in batch)}")
    # The process in which it happened knows the place: the others' tensors are finite.
    texts = comm.all_gather("; ".join(words) if found is not None else "")
    return next((text for text in texts if text), "; ".join(words))


@dataclasses.dataclass(frozen=True)
class NonFiniteTensor:
    """The place of the first tensor that is not finite.

    Attributes:
        what: ``"output of <module>"`` or ``"parameter <name>"``.
        level: pyramid level or stage, ``""`` if there is none.
        around: names of the quantizers around it, in the order of computation.
    """

    what: str
    level: str
    around: tuple[str, ...]


def find_non_finite(model: nn.Module, run: Callable[[], object]) -> NonFiniteTensor | None:
    """Runs a model and finds the first tensor that is not finite.

    The origin is a module whose output is not finite although its inputs are. If its inputs are not finite either, an
    enclosing module has made them, for example a convolution around its norm.

    Args:
        model: The model, not wrapped for distribution.
        run: A function that calls the model.

    Returns:
        None if all parameters and all outputs of modules are finite.
    """
    owners: dict[str, list[str]] = {}
    for name, _ in quantizers(model):
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            around = next((own for owner, own in owners.items() if name.startswith(f"{owner}.")), [])
            return NonFiniteTensor(f"parameter {name}", _level_of(name), tuple(around))

    calls: Counter[str] = Counter()
    inputs_finite: dict[str, bool] = {}
    order: list[str] = []  # names of layers with quantizers
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
        with contextlib.suppress(FloatingPointError):  # Detectron2 stops at boxes that are not finite
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
    return NonFiniteTensor(f"output of {layer or 'the preprocessing of images'}", level, tuple(around))


def all_finite(values: Any) -> bool:
    """Returns whether all floating point tensors in nested lists, tuples and dicts are finite."""
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    if isinstance(values, Mapping):
        values = list(values.values())
    return not isinstance(values, Sequence) or isinstance(values, str) or all(all_finite(value) for value in values)


def _level_by_calls(model: nn.Module, layer: str, then: Counter[str], total: Counter[str]) -> str:
    """Returns the level of a head's layer, since heads are called once for each level, in order."""
    names: Sequence[str] = getattr(model, "head_in_features", ())
    while layer:
        if total[layer] > 1:
            index = then[layer] - 1
            return names[index] if total[layer] == len(names) else f"call {index + 1} of {total[layer]}"
        layer = layer.rpartition(".")[0]
    return ""


def _level_of(name: str) -> str:
    """Returns the level or stage that is part of a layer's name."""
    match = re.search(r"\b(?:fpn_[a-z]+|p)(\d)\b", name)
    if match:
        return f"p{match.group(1)}"
    stage = re.search(r"\b(stem|res\d)\b", name)
    return stage.group(1) if stage else ""


def describe_single_value(model: nn.Module, error: ValueError) -> str:
    """Returns a text that names the batch norm that got one value a channel; "" for any other error.

    Args:
        model: The model, not wrapped for distribution.
        error: PyTorch's error, with its traceback.
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
    """Returns a text with the names of quantizers and their scales, or ranges of scales."""
    modules = dict(quantizers(model))
    texts = []
    for name in names:
        grid = modules[name].grid() if modules[name].is_calibrated else None
        if grid is not None:
            low, high = grid.scale.min().item(), grid.scale.max().item()
            texts.append(f"{name} {low:.3g}" + (f" to {high:.3g}" if high != low else ""))
    return ", ".join(texts) or "none"
