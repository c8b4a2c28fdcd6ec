"""Angles between the gradients of a quantized trunk and those of full precision, with and without added losses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..layers import QuantConv2d
from ..quantization import set_quantization

BESIDE = ("aux_", "extra_")
"""Prefixes of the losses that are added to the detector's own."""


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Cosines between gradients of one layer's weight, one for each batch.

    q is the quantized model, f the same one with its quantizers off.

    Attributes:
        layer: The name of the layer.
        own: Cosines of q and f, both of the detector's own losses.
        all: Cosines of q and f, both of all losses.
        all_to_own: Cosines of q of all losses and f of the detector's own. They tell whether the added loss helps the
            detector itself; f of all losses would contain the added loss, too.
        beside_to_own: Cosines of q of the added losses alone and f of the detector's own; nan where no added loss
            reaches the layer.
    """

    layer: str
    own: tuple[float, ...]
    all: tuple[float, ...]
    all_to_own: tuple[float, ...]
    beside_to_own: tuple[float, ...]


def cosine(a: Tensor, b: Tensor) -> float:
    """Returns the cosine of the angle between two tensors of one shape, as vectors; nan if one is zero."""
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def gradient_alignment(model: nn.Module, batches: Iterable[Any], prefix: str = "backbone.") -> list[Alignment]:
    """Compares the gradients of the quantized trunk with its gradients when the quantizers are off.

    Latent weights, batch and random numbers are the same in both. The model is in training mode, where batch norms
    use the batch's statistics of their own activations. The running statistics are those of the quantized model, and
    would not fit the other. All this happens on a copy of the model.

    Args:
        model: A calibrated detector whose training forward gives losses with one of the prefixes :data:`BESIDE`.
        batches: Batches of the training's loader.
        prefix: The prefix of the names of the layers that are compared.

    Returns:
        The alignment of each layer, in the model's order.

    Raises:
        ValueError: If there is no quantized layer or no loss beside the detector's own.
    """
    model = copy.deepcopy(model).train()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantConv2d) and n.startswith(prefix)}
    if not layers:
        raise ValueError(f"no layer below {prefix!r} is quantized: MODEL.QUANT.ENABLED must be True")
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in layers}
    weights = [layer.weight for layer in layers.values()]
    for batch in batches:
        state = torch.get_rng_state()
        quantized = _gradients(model, batch, weights)
        torch.set_rng_state(state)
        set_quantization(model, False)
        reference = _gradients(model, batch, weights)
        set_quantization(model, True)
        for name, (q_own, q_beside), (f_own, f_beside) in zip(layers, quantized, reference, strict=True):
            pairs = ((q_own, f_own), (q_own + q_beside, f_own + f_beside), (q_own + q_beside, f_own), (q_beside, f_own))
            found[name].append(tuple(cosine(q, f) for q, f in pairs))
    return [Alignment(name, *zip(*values, strict=True)) for name, values in found.items()]


def _gradients(model: nn.Module, batch: Any, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns, for each weight, the gradients of the detector's own losses and of the losses beside them."""
    with EventStorage(0):
        losses: dict[str, Tensor] = model(batch)
    beside = [value for key, value in losses.items() if key.startswith(BESIDE)]
    if not beside:
        raise ValueError("there is no loss beside the detector's own: MODEL.AUX or MODEL.EXTRA_LOSS must be ENABLED")
    own = [value for key, value in losses.items() if key.startswith("loss_")]
    parts = []
    for terms, keep in ((own, True), (beside, False)):
        parts.append(torch.autograd.grad(torch.stack(terms).sum(), weights, retain_graph=keep, allow_unused=True))
    zeros = [torch.zeros_like(weight) for weight in weights]
    own_gradients, beside_gradients = (
        [zero if g is None else g for g, zero in zip(part, zeros, strict=True)] for part in parts
    )
    return list(zip(own_gradients, beside_gradients, strict=True))
