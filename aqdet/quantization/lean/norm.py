"""Batch norm whose output need not be kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..graph import is_recomputing
from .recipe import Recipe, note_recipe


class _BatchNorm(torch.autograd.Function):
    """Normalizes with the batch's statistics; returns the output and the scale and shift that it is computed with."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        inverse = (var + eps).rsqrt()
        scale = weight * inverse
        shift = bias - mean * scale
        out = torch.empty_like(x)
        for part, (out_part,) in Recipe(x, scale, shift).parts(out):
            part.compute(out_part)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        ctx.mark_non_differentiable(scale, shift)
        return out, scale, shift

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, needed
        )
        return (*(g if need else None for g, need in zip(grads, needed, strict=True)), None, None, None)


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """Computes ``norm(x)``, which in training is not kept where a quantizer reads it.

    A batch norm in training notes from what its output can be computed again. Any other module is called.
    The shared affine of Detectron2's ``CycleBatchNormList`` is applied with the normalization of the level. Where
    activation checkpointing computes it once more, running statistics and position stay as the first forward has left
    them.

    Args:
        norm: any module.
        x: ``(N, C, H, W)``.
    """
    # A list of norms with a position is a CycleBatchNormList; nothing in this package knows Detectron2.
    cycle: Any = norm if isinstance(norm, nn.ModuleList) and hasattr(norm, "_pos") else None
    own: nn.Module = norm if cycle is None else cycle[cycle._pos]
    affine = norm if getattr(norm, "weight", None) is not None else own
    weight, bias = (getattr(affine, key, None) for key in ("weight", "bias"))
    if not (
        type(own) is nn.BatchNorm2d
        and own.training
        and own.track_running_stats
        and own.momentum is not None
        and weight is not None
        and x.requires_grad
        and torch.is_grad_enabled()
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > x.shape[1]
    ):
        return norm(x)
    running: tuple[Tensor | None, Tensor | None] = None, None
    if not is_recomputing():
        if cycle is not None:
            cycle._pos = (cycle._pos + 1) % len(cycle)
        assert own.num_batches_tracked is not None
        own.num_batches_tracked.add_(1)
        running = own.running_mean, own.running_var
    with torch.no_grad():
        mean, var = torch.batch_norm_update_stats(x, *running, own.momentum)
    y, scale, shift = _BatchNorm.apply(x, weight, bias, mean, var, own.eps)
    return note_recipe(y, Recipe(x.detach(), scale, shift))
