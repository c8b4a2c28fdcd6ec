"""Plain arithmetic of uniform quantization, and straight-through operations.

Notation used in the package (shapes: ``x`` is any tensor, ``scale`` broadcasts against it):

    codes = clamp(round(x / scale), quant_min, quant_max)      round half to even
    fake  = codes * scale

Nothing here keeps state, and nothing here depends on anything but torch. All arithmetic is float32, whatever the dtype
of ``x``; results come back in the dtype of ``x``, but where that is too coarse (:func:`value_dtype`). The same values
for less memory and time: :mod:`.lean`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCALE_EPS = float(torch.finfo(torch.float32).eps)
"""Floor of every step size: a scale that training drives to zero or below acts as this one."""

GRADIENTS = ("lsq", "pact")
"""Gradients that a scale can have, see :func:`scale_gradients`."""


def integer_range(num_bits: int, signed: bool, narrow_range: bool = False) -> tuple[int, int]:
    """Returns the smallest and the largest integer code, e.g. ``(-8, 7)`` for 4 signed bits, ``(0, 15)`` for unsigned.

    Args:
        num_bits: bit width, at least 1.
        signed: chooses the two's complement range; ``[0, 2**num_bits - 1]`` otherwise.
        narrow_range: drops the most negative code of a signed range, so that it is symmetric.

    Raises:
        ValueError: if ``num_bits`` is below 1.
    """
    if num_bits < 1:
        raise ValueError(f"num_bits must be at least 1, got {num_bits}")
    if not signed:
        return 0, 2**num_bits - 1
    return -(2 ** (num_bits - 1)) + int(narrow_range), 2 ** (num_bits - 1) - 1


def value_dtype(dtype: torch.dtype, quant_min: int, quant_max: int) -> torch.dtype:
    """Returns the precision of quantized values of a tensor: its own, or float32 where that has too few digits.

    Example: bfloat16 has 8 bits of significand, so that ``code * scale`` differs from code to code only up to 128. Of
    the 256 values of 8 unsigned bits, the larger ones would coincide in pairs.
    """
    return torch.float32 if max(-quant_min, quant_max) * torch.finfo(dtype).eps > 1 else dtype


def quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Computes ``clamp(round(x / scale), quant_min, quant_max)`` as float32 integers, with the gradients of torch.

    ``scale`` is 0-dim or broadcasts against ``x``. Example: ``x = [0.3, 1.2, 9.0]``, ``scale = 0.5``,
    range ``[0, 15]`` gives ``[1, 2, 15]``.
    """
    return (x.float() / scale).clamp_(quant_min, quant_max).round_()


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Computes ``codes * scale``, the exact inverse of :func:`quantize` on its own codes."""
    return codes.float() * scale


def broadcast_scale(scale: Tensor, x: Tensor, ch_axis: int = 0) -> Tensor:
    """Views a scale of shape ``(1,)`` or ``(C,)`` so that it broadcasts along ``ch_axis`` of ``x``."""
    if scale.numel() == 1:
        return scale.reshape(())
    shape = [1] * x.dim()
    shape[ch_axis] = scale.numel()
    return scale.view(shape)


class _NoContext:
    """Stands for the context of a function that has no backward."""

    def save_for_backward(self, *_: Any) -> None:
        pass


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Applies a function with a backward of its own; while tracing, its forward alone.

    A trace, of TorchScript or of a counter of operations, has no gradient. Its operations are those of the forward,
    where it could neither run nor store the function.
    """
    if torch.jit.is_tracing():
        return function.forward(_NoContext(), *args)
    return function.apply(*args)


class _ReplaceSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def replace_ste(x: Tensor, value: Tensor) -> Tensor:
    """Returns ``value``, of the shape and dtype of ``x``, to the bit; the gradient goes to ``x`` unchanged.

    That is the straight-through estimator (1308.3432).

    Example: ``x = [0.4, 1.5]``, ``value = [0, 2]`` gives ``[0, 2]``; a gradient ``[1, 2]`` returns as it is.
    """
    return apply(_ReplaceSTE, x, value)


class _FloorSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        return scale.float().clamp(min=SCALE_EPS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def floor_scale(scale: Tensor) -> Tensor:
    """Computes ``max(scale, SCALE_EPS)`` in float32 with a straight-through gradient.

    A clamp's own gradient is zero below the floor, which would leave a scale that was driven negative
    there for ever; straight-through lets the loss pull it back.
    """
    return apply(_FloorSTE, scale)


def scale_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, gradient: str
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of ``fake = clamp(round(x / scale)) * scale`` with respect to ``x`` and ``scale``.

    ``dx`` is ``grad`` where ``quant_min < x / scale < quant_max`` and 0 elsewhere. ``dscale`` is the
    sum over the elements that share a scale of ``grad`` times

        ===========================  ================  =========
        where                        LSQ (1902.08153)  PACT
        ===========================  ================  =========
        x / scale <= quant_min       quant_min         quant_min
        x / scale >= quant_max       quant_max         quant_max
        between                      codes - x/scale   0
        ===========================  ================  =========

    (PACT's alpha is ``scale * quant_max``, so its gradient is the PACT column over ``quant_max``.)

    Args:
        grad: gradient of the loss with respect to ``fake``, of the shape of ``x``.
        x: input, any shape.
        scale: positive, 0-dim or broadcastable against ``x``.
        quant_min, quant_max: integer range.
        gradient: ``"lsq"`` or ``"pact"``, the column of the table.

    Returns:
        ``(dx, dscale)``, both float32, of the shapes of ``x`` and ``scale``.
    """
    grad = grad.float()
    ratio = x.float() / scale
    outside = (ratio <= quant_min) | (ratio >= quant_max)
    codes = ratio.clamp(quant_min, quant_max).round()
    slope = torch.where(outside, codes, codes - ratio if gradient == "lsq" else 0.0)
    products = slope * grad
    dscale = products.sum() if scale.dim() == 0 else products.sum_to_size(scale.shape)
    return grad.masked_fill(outside, 0), dscale


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, gradient: str) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.options = quant_min, quant_max, gradient
        return (quantize(x, scale, quant_min, quant_max) * scale).to(value_dtype(x.dtype, quant_min, quant_max))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        dx, dscale = scale_gradients(grad, x, scale, *ctx.options)
        return dx.to(x.dtype), dscale, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, *, gradient: str = "lsq") -> Tensor:
    """Quantizes and dequantizes; the gradients are those of :func:`scale_gradients`.

    Args:
        x: any shape and float dtype.
        scale: float32, positive, 0-dim or broadcastable against ``x``.
        quant_min, quant_max: integer range.
        gradient: ``"lsq"`` or ``"pact"``.

    Returns:
        A tensor like ``x``, in the precision of :func:`value_dtype`.

    Raises:
        ValueError: for another ``gradient``.
    """
    check_gradient(gradient)
    return apply(_FakeQuantize, x, scale, quant_min, quant_max, gradient)


def check_gradient(gradient: str) -> None:
    """Raises a ValueError for a gradient that is not one of :data:`GRADIENTS`."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be 'lsq' or 'pact', got {gradient!r}")
