"""Batch norm whose output need not be kept, and where a quantizer alone reads it, not even computed.

The output of a batch norm in training is ``x * scale + shift``, two numbers for each channel, once the moments of its
input are known. So they are computed first, and the output is a :class:`Deferred`: a quantizer computes it on the way
(:mod:`.elementwise`, :mod:`.conv`), and whoever else reads it gets it from :func:`computed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import value_dtype
from ..graph import is_recomputing, refuse_recomputing
from .convolved import Source, norm_behind
from .elementwise import fake_quantize, recipe_codes, recipe_quantized
from .moments import (
    Moments,
    Reader,
    batch_moments,
    joint_moments,
    norm_gradients,
    norm_input,
    norm_sums,
    normalized,
    quantized_norm_gradients,
)
from .parts import laid_out_as
from .recipe import Recipe, note_recipe


class Deferred(NamedTuple):
    """Output of a batch norm in training that is not computed yet.

    Attributes:
        x: input, ``(N, C, H, W)``; outside of autograd where there is a ``source``.
        weight, bias: parameters, float32 ``(C,)``.
        moments: the moments of ``x``.
        eps: added to the variance.
        group: processes whose batch is one, for a synchronized norm; else None.
        token: stands in autograd for the output, where several norms have their gradients computed together, or for
            what ``reader`` makes of it: of the shape of ``x``, without values; else None.
        reader: the one reader of the output, whose gradient is computed with the norm's; None if it is not known.
        relu: whether it is the ReLU of the output that stands here, for a convolution that computes it again.
        source: what ``x`` is the result of, if only :func:`computed` and :func:`computed_relu` may read the output;
            else None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    moments: Moments
    eps: float
    group: Any
    token: Tensor | None = None
    reader: Reader | None = None
    relu: bool = False
    source: Source | None = None

    @property
    def recipe(self) -> Recipe:
        """How the output is computed."""
        return Recipe(self.x.detach(), self.moments.scale, self.moments.shift, self.x.dtype)


Activation = Tensor | Deferred


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


class _JointNorms(torch.autograd.Function):
    """Computes the gradients of several synchronized norms in one exchange, from those of what the tokens stand for."""

    @staticmethod
    def forward(
        ctx: Any, moments: Sequence[Moments], group: Any, reader: Reader | None, _: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        xs = tensors[: len(moments)]  # then weights and biases
        ctx.save_for_backward(*xs, *(value for each in moments for value in each))
        ctx.group, ctx.reader = group, reader
        return tuple(x.new_empty(1).expand_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        xs, values = ctx.saved_tensors[: len(grads)], ctx.saved_tensors[len(grads) :]
        moments = [Moments(*values[start : start + 5]) for start in range(0, len(values), 5)]
        grads = tuple(laid_out_as(grad, x) for grad, x in zip(grads, xs, strict=True))
        sums = [norm_sums(*each, ctx.reader) for each in zip(grads, xs, moments, strict=True)]
        totals = torch.cat(sums)
        dist.all_reduce(totals, group=ctx.group)
        parts = totals.split([len(each) for each in sums])
        inputs = [norm_input(*each, ctx.reader) for each in zip(grads, xs, moments, parts, strict=True)]
        biases, weights = zip(*(each[:-1].view(2, -1) for each in sums), strict=True)
        has_step = ctx.reader is not None and ctx.reader.step is not None
        dstep = torch.stack([each[-1] for each in sums]).sum() if has_step else None
        return None, None, None, dstep, *inputs, *weights, *biases


class _JointOutput(torch.autograd.Function):
    """Computes what a token stands for: a deferred output, or the ReLU of it."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor, moments: Moments, relu: bool) -> Tensor:
        return normalized(x, moments, relu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None


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
    if x.token is not None:  # without a reader, which a convolution is
        return fake_quantize(computed(x), step, quant_min, quant_max, gradient=gradient, note_codes=note_codes)
    options = quant_min, quant_max, gradient
    y, codes = _QuantizedBatchNorm.apply(x.x, x.weight, x.bias, step, x, options, note_codes)
    return y if codes is None else note_recipe(y, Recipe(codes, step.detach(), None, y.dtype))


def _output(x: Deferred, relu: bool) -> Tensor:
    if x.source is not None:
        return norm_behind(x.source, x.x, x.weight, x.bias, x.moments, (x.eps, x.group, relu))
    if x.token is not None:
        if relu and x.reader is None:
            return torch.relu(_output(x, False))
        assert relu == (x.reader is not None)  # a quantizer is a convolution's
        return _JointOutput.apply(x.token, x.x.detach(), x.moments, relu)
    return _BatchNorm.apply(x.x, x.weight, x.bias, x.moments, x.eps, x.group, relu)


def computed(x: Activation) -> Tensor:
    """Returns a tensor, computed where it was deferred, with its recipe noted unless it would keep what need not be."""
    if not isinstance(x, Deferred):
        return x
    return _output(x, False) if x.source is not None else note_recipe(_output(x, False), x.recipe)


def computed_relu(x: Activation) -> Tensor:
    """Returns the ReLU of an activation, in one pass where it was deferred."""
    return _output(x, True) if isinstance(x, Deferred) else torch.relu(x)


def _group(norm: nn.Module) -> Any:
    """Returns the processes that a norm shares its batch with; None if there are no others."""
    if not (isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _has_kernels(x: Tensor) -> bool:
    """Returns whether a norm of ``x`` is known here; a CPU's own of half precision rounds otherwise."""
    return x.dtype == torch.float32 or (x.dtype in (torch.float16, torch.bfloat16) and not x.is_cpu)


class _Owner(NamedTuple):
    """The batch norm of a call, the parameters of its affine, and the processes that it shares its batch with."""

    norm: Any
    weight: Any
    bias: Any
    group: Any


def _cycle(norm: nn.Module) -> Any:
    """Returns a norm that is Detectron2's ``CycleBatchNormList``, told by its position; else None."""
    return norm if isinstance(norm, nn.ModuleList) and hasattr(norm, "_pos") else None


def norm_of_call(norm: nn.Module, later: int = 0) -> _Owner:
    """Returns whose statistics and affine the next call uses, or one that is so many calls later.

    Raises:
        RuntimeError: see :func:`~aqdet.quantization.graph.refuse_recomputing`.
    """
    cycle = _cycle(norm)
    own = norm if cycle is None else cycle[(cycle._pos + later) % len(cycle)]
    affine = norm if getattr(norm, "weight", None) is not None else own
    weight = getattr(affine, "weight", None)
    if affine is not norm and weight is not None:
        refuse_recomputing()
    return _Owner(own, weight, getattr(affine, "bias", None), _group(own))


def defers(owner: _Owner, x: Tensor, *operands: Tensor) -> bool:
    """Returns whether a call of a norm is known here; ``x`` is what it reads, or what its convolution reads.

    Args:
        owner: see :func:`norm_of_call`.
        x: ``(N, C, H, W)``.
        operands: what ``x`` stands for the result of, if ``x`` itself is outside of autograd.
    """
    norm, weight, bias, group = owner
    return (
        type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        and norm.training
        and norm.track_running_stats
        and norm.momentum is not None
        and weight is not None
        and bias is not None
        and any(t.requires_grad for t in (x, *operands))
        and torch.is_grad_enabled()
        and weight.dtype == torch.float32
        and _has_kernels(x)
        and (group is not None or x.numel() > x.shape[1])
    )


def starts_call(norm: nn.Module, calls: int = 1) -> bool:
    """Returns whether this is the first forward, and not one that is computed once more; moves a list's position."""
    is_first = not is_recomputing()
    cycle = _cycle(norm)
    if is_first and cycle is not None:
        cycle._pos = (cycle._pos + calls) % len(cycle)
    return is_first


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
    owner = norm_of_call(norm)
    if not defers(owner, x):
        return norm(x)
    own, weight, bias, group = owner
    is_first = starts_call(norm)
    with torch.no_grad():
        moments = batch_moments(x, own, weight, bias, group, is_first)
    return Deferred(x, weight, bias, moments, own.eps, group)


def defers_behind(norm: nn.Module, x: Tensor, weight: Tensor) -> bool:
    """Returns whether :func:`defer_behind` knows a norm and the precision of its convolution's operands."""
    is_float = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    return is_float and defers(norm_of_call(norm), x, weight)


def defer_behind(norm: nn.Module, x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Activation:
    """Computes ``norm(conv2d(x, weight))`` but for the last step, for which backward is to convolve again.

    Args:
        norm: a norm for which :func:`defers_behind` holds.
        x: ``(N, C, H, W)``.
        weight: ``(O, C / groups, kH, kW)``.
        geometry: stride, padding, dilation and groups.
    """
    owner = norm_of_call(norm)
    with torch.no_grad():
        y = torch.conv2d(x, weight, None, *geometry)
    if owner.group is None and y.numel() <= y.shape[1]:
        return norm(y)  # which refuses a single value
    with torch.no_grad():
        moments = batch_moments(y, owner.norm, owner.weight, owner.bias, owner.group, starts_call(norm))
    source = Source(x, weight, geometry)
    return Deferred(y, owner.weight, owner.bias, moments, owner.norm.eps, owner.group, source=source)


def is_synchronized(norm: nn.Module) -> bool:
    """Returns whether a norm shares its batch with other processes."""
    return norm_of_call(norm).group is not None


def defer_all(norm: nn.Module, xs: Sequence[Tensor], reader: Reader | None = None) -> list[Activation]:
    """Computes :func:`defer` of several tensors in turn, such as pyramid levels, with one exchange each way.

    Args:
        norm: any module.
        xs: each ``(N, C, H, W)``.
        reader: the one reader of every deferred output: a ReLU, or the quantizer of a convolution.
    """
    owners = [norm_of_call(norm, later) for later in range(len(xs))]
    if not all(owner.group is not None and defers(owner, x) for owner, x in zip(owners, xs, strict=True)):
        return [defer(norm, x) for x in xs]
    norms, weights, biases, groups = zip(*owners, strict=True)
    is_first = starts_call(norm, len(xs))
    with torch.no_grad():
        found = joint_moments(xs, norms, list(zip(weights, biases, strict=True)), groups[0], is_first)
    step = None if reader is None else reader.step
    if reader is not None and step is not None:
        reader = reader._replace(step=step.detach())
    tokens = _JointNorms.apply(found, groups[0], reader, step, *xs, *weights, *biases)
    return [
        Deferred(x, owner.weight, owner.bias, moments, owner.norm.eps, owner.group, token, reader)
        for x, owner, moments, token in zip(xs, owners, found, tokens, strict=True)
    ]
