"""Batch norm whose output need not be kept, and where a quantizer alone reads it, not even computed.

The output of a batch norm in training is ``x * scale + shift``, two numbers for each channel, once the moments of its
input are known. So they are computed first, and the output is a :class:`Deferred`: a quantizer computes it on the way
(:mod:`.elementwise`, :mod:`.conv`), and whoever else reads it gets it from :func:`computed`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import value_dtype
from ..graph import is_recomputing
from ..kernels import replaceable
from .elementwise import recipe_codes, recipe_gradients, recipe_quantized
from .parts import laid_out_as
from .recipe import Recipe, note_recipe


class Moments(NamedTuple):
    """What a batch norm in training knows of its input, for each channel, over all processes; float32, ``(C,)``.

    Attributes:
        mean, inverse: mean, and one over the standard deviation.
        scale, shift: what the output is computed with.
        num_values: 0-dim, how many values a channel has over all processes; None where they are those of this one.
    """

    mean: Tensor
    inverse: Tensor
    scale: Tensor
    shift: Tensor
    num_values: Tensor | None


class Deferred(NamedTuple):
    """Output of a batch norm in training that is not computed yet.

    Attributes:
        x: input, ``(N, C, H, W)``.
        weight, bias: parameters, float32 ``(C,)``.
        moments: of ``x``.
        eps: added to the variance.
        group: processes whose batch is one, for a synchronized norm; else None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    moments: Moments
    eps: float
    group: Any

    @property
    def recipe(self) -> Recipe:
        """How the output is computed."""
        return Recipe(self.x.detach(), self.moments.scale, self.moments.shift, self.x.dtype)


Activation = Tensor | Deferred


@replaceable("normalized")
def normalized(x: Tensor, moments: Moments, relu: bool) -> Tensor:
    """Computes the output of a batch norm from its input, and a ReLU of it if asked to, without gradients."""
    out = torch.empty_like(x)
    for part, (out_part,) in Recipe(x, moments.scale, moments.shift, x.dtype).parts(out):
        part.compute(out_part)
        if relu:
            out_part.relu_()
    return out


@replaceable("norm_gradients")
def norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, moments: Moments, eps: float, group: Any, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of a batch norm's input, weight and bias from that of its output, or of the ReLU's.

    Those of the parameters are this process's, as those of any other parameter are before they are averaged.
    """
    mean, inverse, scale, _, count = moments
    grad = laid_out_as(grad, x)
    if relu:
        grad = torch.ops.aten.threshold_backward(grad, normalized(x, moments, False), 0)
    if group is None:
        backward = torch.ops.aten.native_batch_norm_backward
        return backward(grad.to(x.dtype), x, weight, None, None, mean, inverse, True, eps, [True, True, True])
    assert count is not None
    axes, view = (0, 2, 3), (1, -1, 1, 1)
    grad = grad.float()
    centred = (x.float() - mean.view(view)) * inverse.view(view)
    sums = torch.stack([grad.sum(axes), (grad * centred).sum(axes)])
    own = sums.clone()
    dist.all_reduce(sums, group=group)
    means = sums / count
    dx = scale.view(view) * (grad - means[0].view(view) - centred * means[1].view(view))
    return dx.to(x.dtype), own[1], own[0]


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


class _BatchNorm(torch.autograd.Function):
    """Computes a deferred output, and a ReLU of it if asked to."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, moments: Moments, eps: float, group: Any, relu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *moments)
        ctx.options = eps, group, relu
        return normalized(x, moments, relu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *moments = ctx.saved_tensors
        return *norm_gradients(grad, x, weight, Moments(*moments), *ctx.options), None, None, None, None


class _QuantizedBatchNorm(torch.autograd.Function):
    """Quantizes a deferred output, and keeps its recipe. A second result is the codes, if they are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        step: Tensor,
        deferred: Deferred,
        options: tuple[int, int, str],
        with_codes: bool,
    ) -> tuple[Tensor, Tensor | None]:
        quant_min, quant_max, _ = options
        dtype = value_dtype(x.dtype, quant_min, quant_max)
        ctx.save_for_backward(x, weight, step, *deferred.moments)
        ctx.eps, ctx.group, ctx.options = deferred.eps, deferred.group, options
        if not with_codes:
            return recipe_quantized(deferred.recipe, step, quant_min, quant_max, dtype), None
        y, codes = recipe_codes(deferred.recipe, step, quant_min, quant_max, dtype)
        ctx.mark_non_differentiable(codes)
        return y, codes

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, weight, step, *moments = ctx.saved_tensors
        grads = quantized_norm_gradients(grad, x, weight, Moments(*moments), ctx.eps, ctx.group, step, *ctx.options)
        return *grads, None, None, None


def quantize_deferred(
    x: Deferred, step: Tensor, quant_min: int, quant_max: int, *, gradient: str, note_codes: bool = False
) -> Tensor:
    """Computes :func:`~.elementwise.fake_quantize` of a deferred output, in one pass.

    Args:
        x: output of a norm.
        step: scale of the quantizer, 0-dim.
        quant_min, quant_max, gradient: see there.
        note_codes: whether to note the codes as the recipe of the result, for layers that read it.
    """
    options = quant_min, quant_max, gradient
    y, codes = _QuantizedBatchNorm.apply(x.x, x.weight, x.bias, step, x, options, note_codes)
    return y if codes is None else note_recipe(y, Recipe(codes, step.detach(), None, y.dtype))


def computed(x: Activation) -> Tensor:
    """Returns a tensor, computed where it was deferred, with its recipe noted."""
    return note_recipe(_BatchNorm.apply(*x, False), x.recipe) if isinstance(x, Deferred) else x


def computed_relu(x: Activation) -> Tensor:
    """Returns the ReLU of an activation, in one pass where it was deferred."""
    return _BatchNorm.apply(*x, True) if isinstance(x, Deferred) else torch.relu(x)


def gathered(x: Tensor, mean: Tensor, var: Tensor, group: Any) -> Tensor:
    """Returns mean, variance and number of values for each channel of every process, ``(P, 2 C + 1)``."""
    count = mean.new_full((1,), x.numel() // x.shape[1])
    packed = torch.cat([mean, var, count])
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


@replaceable("batch_moments")
def batch_moments(x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor, group: Any, is_first: bool) -> Moments:
    """Computes the moments of a batch, over all processes of a group if there is one.

    Args:
        x: ``(N, C, H, W)``.
        norm: owner of the running statistics.
        weight, bias: ``(C,)``.
        group: see :class:`Deferred`; a process may have a batch of no images then.
        is_first: whether the running statistics move.
    """
    count = None
    if group is None:
        mean, var = own_moments(x, norm, is_first)
    else:
        channels = x.shape[1]
        mean = var = x.new_zeros(channels, dtype=torch.float32)
        if x.numel():
            mean, var = own_moments(x, norm, False)
        rows = gathered(x, mean, var, group)
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


def _group(norm: nn.Module) -> Any:
    """Returns the processes that a norm shares its batch with; None if there are no others."""
    if not (isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _has_kernels(x: Tensor) -> bool:
    """Returns whether a norm of ``x`` is known here; a CPU's own of half precision rounds otherwise."""
    return x.dtype == torch.float32 or (x.dtype in (torch.float16, torch.bfloat16) and not x.is_cpu)


def defer(norm: nn.Module, x: Tensor) -> Activation:
    """Computes ``norm(x)`` but for the last step where that is possible.

    It is for a batch norm in training, synchronized or not. Any other module is called. The shared affine of
    Detectron2's ``CycleBatchNormList`` is applied with the normalization of the level, in the precision of ``x``, where
    Detectron2 goes on in float32. Where activation checkpointing computes it once more, running statistics and
    position stay as the first forward has left them.

    Args:
        norm: any module.
        x: ``(N, C, H, W)``.
    """
    # A list of norms with a position is a CycleBatchNormList; nothing in this package knows Detectron2.
    cycle: Any = norm if isinstance(norm, nn.ModuleList) and hasattr(norm, "_pos") else None
    own: Any = norm if cycle is None else cycle[cycle._pos]
    affine = norm if getattr(norm, "weight", None) is not None else own
    weight, bias = (getattr(affine, key, None) for key in ("weight", "bias"))
    group = _group(own)
    if not (
        type(own) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        and own.training
        and own.track_running_stats
        and own.momentum is not None
        and weight is not None
        and bias is not None
        and x.requires_grad
        and torch.is_grad_enabled()
        and weight.dtype == torch.float32
        and _has_kernels(x)
        and (group is not None or x.numel() > x.shape[1])
    ):
        return norm(x)
    is_first = not is_recomputing()
    if is_first and cycle is not None:
        cycle._pos = (cycle._pos + 1) % len(cycle)
    with torch.no_grad():
        moments = batch_moments(x, own, weight, bias, group, is_first)
    return Deferred(x, weight, bias, moments, own.eps, group)


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """Computes ``norm(x)``, which in training is not kept where a quantizer reads it; see :func:`defer`."""
    return computed(defer(norm, x))
