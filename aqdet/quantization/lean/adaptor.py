"""An adaptor of the auxiliary path, which keeps a byte or two of each value for backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import has_free_norms, plain
from .conv import has_hooks
from .convolved import conv_gradients, convolved
from .moments import Moments, batch_moments, norm_gradients, normalized
from .norm import defers, norm_of_call, starts_call
from .parts import laid_out_as
from .recipe import Recipe, recipe_of, summed, terms_of

_GEOMETRY = (1, 1), (0, 0), (1, 1), 1


class _Options(NamedTuple):
    norm: Any
    group: Any
    is_first: bool
    sources: tuple[Recipe, ...]


class _Adaptor(torch.autograd.Function):
    """Computes ``relu(carried + norm(conv(x)))``, and keeps what ``x`` is made of and where the result is positive.

    Backward computes ``x`` and the convolution once more: it is a 1x1 convolution, which costs less than what it
    would keep.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        carried: Tensor | None,
        weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        options: _Options,
    ) -> Tensor:
        norm, group, is_first, sources = options
        y = torch.conv2d(x, weight)
        moments = batch_moments(y, norm, norm_weight, norm_bias, group, is_first)
        out = normalized(y, moments, carried is None)
        if carried is not None:
            out = torch.relu_(carried + out)
        ctx.save_for_backward(
            weight, norm_weight, out > 0, *moments, *(value for each in sources for value in each[:3])
        )
        ctx.options = norm.eps, group, [each.dtype for each in sources]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, norm_weight, is_positive, *values = ctx.saved_tensors
        eps, group, dtypes = ctx.options
        moments, values = Moments(*values[:5]), values[5:]
        bases, scales, shifts = values[::3], values[1::3], values[2::3]
        sources = [Recipe(*each) for each in zip(bases, scales, shifts, dtypes, strict=True)]
        x = summed(*sources)
        # A third of the time of torch.where on a CPU.
        grad = torch.ops.aten.threshold_backward(grad, is_positive.to(grad.dtype), 0)
        y = convolved(x, weight, _GEOMETRY)
        dy, dnorm_weight, dnorm_bias = norm_gradients(laid_out_as(grad, y), y, norm_weight, moments, eps, group, False)
        del y
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        dx, dweight = conv_gradients(dy, x, weight, _GEOMETRY, needs)
        return dx, grad if ctx.needs_input_grad[1] else None, dweight, dnorm_weight, dnorm_bias, None


def adapt(module: Any, x: Tensor, carried: Tensor | None = None) -> Tensor:
    """Computes the forward of an :class:`aqdet.modeling.scaffold.adaptor.Adaptor`."""
    conv = module.conv
    is_plain = torch.is_autocast_enabled(x.device.type) or x.dtype != torch.float32 or conv.bias is not None
    if is_plain or not has_free_norms() or has_hooks(conv):
        return plain("adapt")(module, x, carried)
    owner = norm_of_call(conv.norm)
    if not defers(owner, x) or has_hooks(conv.norm):
        return plain("adapt")(module, x, carried)
    sources = terms_of(x) or (recipe_of(x),)
    options = _Options(owner.norm, owner.group, starts_call(conv.norm), sources)
    return _Adaptor.apply(x, carried, conv.weight, owner.weight, owner.bias, options)
