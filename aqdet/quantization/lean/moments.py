"""Arithmetic of batch norm in training: moments of a batch, its output and its gradients.

A synchronized norm has the batch of all processes of a group. It takes one exchange with the others each way, which
several norms can share (:mod:`.norm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels import replaceable
from .elementwise import recipe_gradients
from .parts import laid_out_as
from .recipe import Recipe


class Moments(NamedTuple):
    """Statistics of a batch norm's input in training, for each channel, over all processes; float32, ``(C,)``.

    Attributes:
        mean, inverse: mean, and one over the standard deviation.
        scale, shift: factor and offset that give the output.
        num_values: 0-dim, number of values of a channel over all processes; None where this process has them all.
    """

    mean: Tensor
    inverse: Tensor
    scale: Tensor
    shift: Tensor
    num_values: Tensor | None


class Reader(NamedTuple):
    """The one reader of a norm's output: a quantizer with a 0-dim scale, its range and its gradient; or a ReLU."""

    step: Tensor | None
    quant_min: int = 0
    quant_max: int = 0
    gradient: str = "relu"


@replaceable("normalized")
def normalized(x: Tensor, moments: Moments, relu: bool) -> Tensor:
    """Computes the output of a batch norm from its input, and a ReLU of it if asked to, without gradients."""
    out = torch.empty_like(x)
    for part, (out_part,) in Recipe(x, moments.scale, moments.shift, x.dtype).parts(out):
        part.compute(out_part)
        if relu:
            out_part.relu_()
    return out


def by_channel(values: Tensor) -> Tensor:
    """Returns values ``(C,)`` of channels as ``(1, C, 1, 1)``."""
    return values.view(1, -1, 1, 1)


def _centred(x: Tensor, moments: Moments) -> Tensor:
    return (x.float() - by_channel(moments.mean)) * by_channel(moments.inverse)


def _before_reader(grad: Tensor, x: Tensor, moments: Moments, reader: Reader | None) -> tuple[Tensor, Tensor]:
    """Returns the gradient of a norm's output, float32, from that of what a reader makes of it, and its scale's."""
    if reader is None:
        return grad.float(), moments.scale.new_zeros(())
    if reader.step is None:
        grad = torch.ops.aten.threshold_backward(grad, normalized(x, moments, False), 0)
        return grad.float(), moments.scale.new_zeros(())
    recipe = Recipe(x, moments.scale, moments.shift, x.dtype)
    grad, dstep = recipe_gradients(grad, recipe, reader.step, *reader[1:], x.dtype)
    return grad.float(), dstep


@replaceable("norm_sums")
def norm_sums(grad: Tensor, x: Tensor, moments: Moments, reader: Reader | None = None) -> Tensor:
    """Computes this process's sums of a norm's backward, ``(2 C + 1,)``.

    They are, for each channel, those of the gradient of the norm's output and of its products with the normalized
    input, and then the gradient of the scale of a quantizer that reads the norm.
    """
    axes = (0, 2, 3)
    grad, dstep = _before_reader(grad, x, moments, reader)
    return torch.cat([grad.sum(axes), (grad * _centred(x, moments)).sum(axes), dstep.view(1)])


@replaceable("norm_input")
def norm_input(grad: Tensor, x: Tensor, moments: Moments, totals: Tensor, reader: Reader | None = None) -> Tensor:
    """Computes the gradient of a norm's input from that of its output, or a reader's, and the sums of all processes."""
    assert moments.num_values is not None
    grad, _ = _before_reader(grad, x, moments, reader)
    first, second = (by_channel(mean) for mean in (totals[:-1] / moments.num_values).view(2, -1))
    dx = by_channel(moments.scale) * (grad - first - _centred(x, moments) * second)
    return dx.to(x.dtype)


@replaceable("norm_gradients")
def norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, moments: Moments, eps: float, group: Any, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of a batch norm's input, weight and bias from that of its output, or of the ReLU's.

    The gradients of weight and bias are this process's, to be averaged over processes as any parameter's.
    """
    grad = laid_out_as(grad, x)
    if relu:
        grad = torch.ops.aten.threshold_backward(grad, normalized(x, moments, False), 0)
    if group is None:
        backward = torch.ops.aten.native_batch_norm_backward
        return backward(grad.to(x.dtype), x, weight, None, None, *moments[:2], True, eps, [True, True, True])
    sums = norm_sums(grad, x, moments)
    totals = sums.clone()
    dist.all_reduce(totals, group=group)
    dbias, dweight = sums[:-1].view(2, -1)
    return norm_input(grad, x, moments, totals), dweight, dbias


@replaceable("quantized_norm_gradients")
def quantized_norm_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    moments: Moments,
    eps: float,
    group: Any,
    step: Tensor,
    quant_min: int,
    quant_max: int,
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of a batch norm and the quantizer that reads it: of input, weight, bias and ``step``.

    Args:
        grad: gradient of the quantized output.
        x, weight, moments, eps, group: see :func:`norm_gradients`.
        step, quant_min, quant_max, gradient: 0-dim scale and range of the quantizer, and how the scale learns.
    """
    recipe = Recipe(x, moments.scale, moments.shift, x.dtype)
    grad, dstep = recipe_gradients(laid_out_as(grad, x), recipe, step, quant_min, quant_max, gradient, x.dtype)
    return *norm_gradients(grad, x, weight, moments, eps, group, False), dstep


def gathered(packed: Tensor, group: Any) -> Tensor:
    """Returns a vector of every process, ``(P, n)``."""
    size = dist.get_world_size(group)
    if dist.get_backend(group) == "gloo":
        each = [torch.empty_like(packed) for _ in range(size)]
        dist.all_gather(each, packed, group=group)
        return torch.stack(each)
    rows = packed.new_empty(size * len(packed))
    dist.all_gather_into_tensor(rows, packed, group=group)
    return rows.view(size, -1)


def own_moments(x: Tensor, norm: nn.BatchNorm2d, is_first: bool) -> tuple[Tensor, Tensor]:
    """Computes mean and variance of each channel, float32; moves the running ones if asked to."""
    assert norm.momentum is not None  # else the norm is not deferred
    running = (norm.running_mean, norm.running_var) if is_first else (None, None)
    if x.is_cpu and x.dtype != torch.float32:  # where half precision gets statistics in half precision
        x = x.float()
    mean, var = torch.batch_norm_update_stats(x, *running, norm.momentum)
    return mean, var


def packed_moments(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Returns mean and variance of each channel and the number of values, ``(2 C + 1,)``; of no images, too."""
    if not x.numel():
        return x.new_zeros(2 * x.shape[1] + 1, dtype=torch.float32)
    mean, var = own_moments(x, norm, False)
    return torch.cat([mean, var, mean.new_full((1,), x.numel() // x.shape[1])])


@replaceable("batch_moments")
def batch_moments(
    x: Tensor,
    norm: nn.BatchNorm2d,
    weight: Tensor,
    bias: Tensor,
    group: Any,
    is_first: bool,
    rows: Tensor | None = None,
) -> Moments:
    """Computes the moments of a batch, over all processes of a group if there is one.

    Args:
        x: ``(N, C, H, W)``.
        norm: owner of the running statistics.
        weight, bias: ``(C,)``.
        group: see :class:`Deferred`; a process may have a batch of no images then.
        is_first: whether the running statistics move.
        rows: :func:`packed_moments` of all processes, if they are known.
    """
    count = None
    if group is None:
        mean, var = own_moments(x, norm, is_first)
    else:
        channels = x.shape[1]
        rows = gathered(packed_moments(x, norm), group) if rows is None else rows
        means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
        count = counts.sum()
        mean = (means * counts).sum(dim=0) / count
        var = ((variances + (means - mean).square()) * counts).sum(dim=0) / count
        if is_first:
            assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), norm.momentum)
    if is_first:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
    inverse = (var + norm.eps).rsqrt()
    scale = weight * inverse
    return Moments(mean, inverse, scale, bias - mean * scale, count)


def joint_moments(
    xs: Sequence[Tensor],
    norms: Sequence[nn.BatchNorm2d],
    affines: Sequence[tuple[Tensor, Tensor]],
    group: Any,
    is_first: bool,
) -> list[Moments]:
    """Computes :func:`batch_moments` of several tensors, each with a norm, weight and bias, in one exchange."""
    packed = [packed_moments(x, norm) for x, norm in zip(xs, norms, strict=True)]
    parts = gathered(torch.cat(packed), group).split([len(row) for row in packed], dim=1)
    return [
        batch_moments(x, norm, *affine, group, is_first, part)
        for x, norm, affine, part in zip(xs, norms, affines, parts, strict=True)
    ]
