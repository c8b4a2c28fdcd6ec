"""Batch norm behind a convolution that backward computes again, rather than keep its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .moments import Moments, norm_gradients, normalized


class Source(NamedTuple):
    """A convolution without bias, which backward computes again rather than keep its output.

    Attributes:
        x, weight: its operands, float32.
        geometry: stride, padding, dilation and groups.
    """

    x: Tensor
    weight: Tensor
    geometry: tuple[Any, ...]


def convolved(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Computes a convolution in the precision of its operands, also where backward runs under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.conv2d(x, weight, None, *geometry)


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[Any], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Computes the gradients of a convolution's input and weight, where they are needed, from that of its output.

    Args:
        grad, x, weight: gradient of the output, and the operands.
        geometry: stride, padding, dilation and groups.
        needs: whether the gradient of the input is needed, and that of the weight.
    """
    stride, padding, dilation, groups = geometry
    places = list(stride), list(padding), list(dilation), False, [0, 0], groups
    dx, dweight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *places, [*needs, False])
    return dx, dweight


class _NormBehind(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        y: Tensor,
        moments: Moments,
        geometry: tuple[Any, ...],
        options: tuple[float, Any, bool],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, norm_weight, *moments)
        ctx.geometry, ctx.options = geometry, options
        return normalized(y, moments, options[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm_weight, *moments = ctx.saved_tensors
        y = convolved(x, weight, ctx.geometry)
        dy, dnorm_weight, dnorm_bias = norm_gradients(grad, y, norm_weight, Moments(*moments), *ctx.options)
        del y
        dx, dweight = conv_gradients(dy, x, weight, ctx.geometry, ctx.needs_input_grad[:2])
        return dx, dweight, dnorm_weight, dnorm_bias, None, None, None, None


def norm_behind(
    source: Source, y: Tensor, weight: Tensor, bias: Tensor, moments: Moments, options: tuple[float, Any, bool]
) -> Tensor:
    """Computes a batch norm of a convolution's output, of which the operands are kept for backward.

    Args:
        source: the convolution.
        y: its output, outside of autograd.
        weight, bias: affine of the norm, ``(C,)``.
        moments: moments of ``y``.
        options: the norm's epsilon, the processes whose batch is one or None, and whether a ReLU follows.
    """
    return _NormBehind.apply(source.x, source.weight, weight, bias, y, moments, source.geometry, options)
