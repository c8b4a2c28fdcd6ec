"""Stateless arithmetic of uniform quantization.

Notation used in the package (shapes: ``x`` is any tensor, ``scale`` broadcasts against it):

    codes = clamp(round(x / scale), quant_min, quant_max)      round half to even
    fake  = codes * scale

Nothing here keeps state, and nothing here depends on anything but torch. All arithmetic is float32,
whatever the dtype of ``x``; results come back in the dtype of ``x``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SCALE_EPS = float(torch.finfo(torch.float32).eps)
"""Floor of every step size: a scale that training drives to zero or below acts as this one."""


def integer_range(num_bits: int, signed: bool, narrow_range: bool = False) -> tuple[int, int]:
    """Smallest and largest integer code.

    Args:
        num_bits: bit width, at least 1.
        signed: two's complement range if true, ``[0, 2**num_bits - 1]`` otherwise.
        narrow_range: drop the most negative code of a signed range, so that it is symmetric.

    Returns:
        ``(quant_min, quant_max)``, e.g. ``(-8, 7)`` for 4 signed bits, ``(0, 15)`` for 4 unsigned.
    """
    if num_bits < 1:
        raise ValueError(f"num_bits must be at least 1, got {num_bits}")
    if not signed:
        return 0, 2**num_bits - 1
    return -(2 ** (num_bits - 1)) + int(narrow_range), 2 ** (num_bits - 1) - 1


def quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """``clamp(round(x / scale), quant_min, quant_max)`` as float32 integers, without gradient rules.

    ``scale`` is 0-dim or broadcasts against ``x``. Example: ``x = [0.3, 1.2, 9.0]``, ``scale = 0.5``,
    range ``[0, 15]`` gives ``[1, 2, 15]``.
    """
    return (x.float() / scale).clamp_(quant_min, quant_max).round_()


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """``codes * scale``, the exact inverse of :func:`quantize` on its own codes."""
    return codes.float() * scale


def broadcast_scale(scale: Tensor, x: Tensor, ch_axis: int = 0) -> Tensor:
    """Views a scale of shape ``(1,)`` or ``(C,)`` so that it broadcasts along ``ch_axis`` of ``x``."""
    if scale.numel() == 1:
        return scale.reshape(())
    shape = [1] * x.dim()
    shape[ch_axis] = scale.numel()
    return scale.view(shape)


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged (straight-through, 1308.3432).

    Example: forward of ``[0.4, 1.5, 2.5]`` is ``[0, 2, 2]``; a gradient ``[1, 2, 3]`` returns as it is.
    """
    return _RoundSTE.apply(x)


class _ReplaceSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def replace_ste(x: Tensor, value: Tensor) -> Tensor:
    """``value``, of the shape and dtype of ``x``, to the bit; the gradient goes to ``x`` unchanged.

    Example: ``x = [0.4, 1.5]``, ``value = [0, 2]`` gives ``[0, 2]``; a gradient ``[1, 2]`` returns as it is.
    """
    return _ReplaceSTE.apply(x, value)


_FEW_THRESHOLDS = 16


def count_below(rows: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds lie below each value, int64, without gradient.

    A handful of comparisons is several times faster than a binary search on a CPU.

    Args:
        rows: ``(C, K)`` float32.
        thresholds: ``(C, n)`` float32, ascending.
    """
    if thresholds.shape[1] > _FEW_THRESHOLDS:
        return torch.searchsorted(thresholds, rows.contiguous())
    count = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device)
    for threshold in thresholds.split(1, dim=1):
        count.add_((rows > threshold).view(torch.uint8))
    return count.long()


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """``(size,)`` float64 sums of the values with each index, also where torch is to be deterministic on a GPU.

    Args:
        values, index: ``(N,)``, the latter int64 in ``[0, size)``.
    """
    return torch.zeros(size, dtype=torch.float64, device=values.device).scatter_add_(0, index, values.double())


class _GradScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def grad_scale(x: Tensor, factor: float) -> Tensor:
    """Identity in forward; the gradient is multiplied by ``factor`` (LSQ, 1902.08153, section 2.2)."""
    return _GradScale.apply(x, factor)


class _FloorSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        return scale.float().clamp(min=SCALE_EPS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def floor_scale(scale: Tensor) -> Tensor:
    """``max(scale, SCALE_EPS)`` with a straight-through gradient.

    A clamp's own gradient is zero below the floor, which would leave a scale that was driven negative
    there for ever; straight-through lets the loss pull it back.
    """
    return _FloorSTE.apply(scale)


def _reduce_to(value: Tensor, like: Tensor) -> Tensor:
    """Sums ``value`` over the axes in which ``like`` is broadcast."""
    return value.sum_to_size(like.shape)


def _scale_gradients_part(
    grad: Tensor, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, lsq: bool
) -> tuple[Tensor, Tensor]:
    hardtanh_backward = torch.ops.aten.hardtanh_backward
    ratio = x.float() / scale
    dx = hardtanh_backward(grad, ratio, quant_min, quant_max)
    if lsq:
        inside = hardtanh_backward(ratio, ratio, quant_min, quant_max)
        factor = ratio.clamp_(quant_min, quant_max).round_().sub_(inside)
        products = factor.mul_(grad)
    else:
        # Clipped gradients times the bound they were clipped at.
        products = ratio.clamp_(quant_min, quant_max).round_().mul_(grad - dx)
    return dx, products.sum() if scale.dim() == 0 else _reduce_to(products, scale)


_PART_SIZE = 1 << 17


def scale_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, lsq: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``fake = clamp(round(x / scale)) * scale`` with respect to ``x`` and ``scale``.

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
    Only vectorised float operations are used: a multiplication by a boolean mask is forty times slower
    on a CPU. A large tensor on a CPU is worked through in parts whose intermediates stay in the cache.

    Args:
        grad: gradient of the loss with respect to ``fake``, same shape as ``x``.
        x: the input, any shape.
        scale: positive, 0-dim or broadcastable against ``x``; worked in parts where it is ``(C, 1, ...)``.
        lsq: chooses the column.

    Returns:
        ``(dx, dscale)``, both float32.
    """
    grad = grad.float()
    numel = x.numel()
    along_first = scale.shape == (*x.shape[:1], *[1] * (x.dim() - 1))
    contiguous = x.is_contiguous() and grad.is_contiguous()
    if not (x.is_cpu and numel > 2 * _PART_SIZE and contiguous and (scale.dim() == 0 or along_first)):
        return _scale_gradients_part(grad, x, scale, quant_min, quant_max, lsq)
    per_tensor = scale.dim() == 0
    grad_2d, x_2d = grad.view(scale.numel(), -1), x.view(scale.numel(), -1)
    dim = 1 if per_tensor else 0
    step = _PART_SIZE if per_tensor else max(1, _PART_SIZE // x_2d.shape[1])
    dx = torch.empty_like(grad_2d)
    sums = []
    scales = scale if per_tensor else scale.view(-1, 1)
    for start in range(0, x_2d.shape[dim], step):
        size = min(step, x_2d.shape[dim] - start)
        part, dscale = _scale_gradients_part(
            grad_2d.narrow(dim, start, size),
            x_2d.narrow(dim, start, size),
            scales if per_tensor else scales.narrow(0, start, size),
            quant_min,
            quant_max,
            lsq,
        )
        dx.narrow(dim, start, size).copy_(part)
        sums.append(dscale)
    total = torch.stack(sums).sum() if per_tensor else torch.cat(sums).view_as(scale)
    return dx.view_as(x), total


class _FakeQuantizeSaveInput(torch.autograd.Function):
    """Fake quantization that keeps its input for backward and derives everything else from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, lsq: bool) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.range = (quant_min, quant_max)
        ctx.lsq = lsq
        return quantize(x, scale, quant_min, quant_max).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        quant_min, quant_max = ctx.range
        dx, dscale = scale_gradients(grad, x, scale, quant_min, quant_max, ctx.lsq)
        return dx.to(x.dtype), dscale, None, None, None


class _FakeQuantizeSaveRegion(torch.autograd.Function):
    """Fake quantization with PACT's gradient, which needs one byte an element for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
        ratio = x.float() / scale
        # 0: at or below quant_min, 1: inside, 2: at or above quant_max.
        region = (ratio > quant_min).view(torch.uint8) + (ratio >= quant_max).view(torch.uint8)
        ctx.save_for_backward(region, scale)
        ctx.range = (quant_min, quant_max)
        ctx.x_dtype = x.dtype
        return ratio.clamp_(quant_min, quant_max).round_().mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        region, scale = ctx.saved_tensors
        quant_min, quant_max = ctx.range
        region = region.float()
        grad = grad.float()
        dx = torch.ops.aten.hardtanh_backward(grad, region, 0, 2)
        clipped = grad - dx
        above = torch.ops.aten.threshold_backward(clipped, region, 1)
        if scale.dim() == 0:
            above_sum, clipped_sum = above.sum(), clipped.sum()
        else:
            above_sum, clipped_sum = _reduce_to(above, scale), _reduce_to(clipped, scale)
        dscale = above_sum * quant_max + (clipped_sum - above_sum) * quant_min
        return dx.to(ctx.x_dtype), dscale, None, None


def fake_quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, *, rule: str = "lsq") -> Tensor:
    """Quantizes and dequantizes, with the gradient rule of LSQ or PACT for the scale.

    Args:
        x: any shape and float dtype.
        scale: float32, positive, 0-dim or broadcastable against ``x``.
        quant_min, quant_max: integer range.
        rule: ``"lsq"`` or ``"pact"``, the column of the table in :func:`scale_gradients`.

    Returns:
        A tensor like ``x``. For backward LSQ keeps ``x`` itself (which the layer before keeps anyway),
        PACT one byte an element.
    """
    if rule == "lsq":
        return _FakeQuantizeSaveInput.apply(x, scale, quant_min, quant_max, True)
    if rule == "pact":
        return _FakeQuantizeSaveRegion.apply(x, scale, quant_min, quant_max)
    raise ValueError(f"rule must be 'lsq' or 'pact', got {rule!r}")


class _FakeQuantizedConv2d(torch.autograd.Function):
    """Convolution of quantized operands that keeps the operands before quantization."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
        *weight_parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, weight, *weight_parameters)
        ctx.options = options
        ctx.bias_size = None if bias is None else list(bias.shape)
        dtype = options["dtype"] or weight.dtype
        if options["quantize_weight"] is not None:
            weight = options["quantize_weight"](weight)
        x_q = quantize(x, scale, *options["range"]).mul_(scale).to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return torch.conv2d(x_q, weight.to(dtype), bias, *options["geometry"])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight, *weight_parameters = ctx.saved_tensors
        options = ctx.options
        quant_min, quant_max = options["range"]
        dtype = options["dtype"] or weight.dtype
        stride, padding, dilation, groups = options["geometry"]
        need_input = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        need_weight = ctx.needs_input_grad[2] or any(ctx.needs_input_grad[5:])
        leaf = weight_q = weight
        if options["quantize_weight"] is not None:
            leaf = weight.detach().requires_grad_()
            with torch.set_grad_enabled(need_weight):
                weight_q = options["quantize_weight"](leaf)
        grad_x_q, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            quantize(x, scale, quant_min, quant_max).mul_(scale).to(dtype),
            weight_q.detach().to(dtype),
            ctx.bias_size,
            list(stride),
            list(padding),
            list(dilation),
            False,
            [0, 0],
            groups,
            [need_input, need_weight, ctx.bias_size is not None],
        )
        parameter_grads: list[Tensor | None] = [None] * len(weight_parameters)
        if not need_weight:
            grad_weight = None  # may come along with the bias's
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
            if options["quantize_weight"] is not None:
                wanted = [leaf, *(p for p in weight_parameters if p.requires_grad)]
                grads = iter(torch.autograd.grad(weight_q, wanted, grad_weight, allow_unused=True))
                grad_weight = next(grads)
                parameter_grads = [next(grads) if p.requires_grad else None for p in weight_parameters]
        dx = dscale = None
        if need_input:
            dx, dscale = scale_gradients(grad_x_q, x, scale, quant_min, quant_max, options["lsq"])
            dx = dx.to(x.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(weight.dtype)
        return dx, dscale, grad_weight, grad_bias, None, *parameter_grads


def conv2d_fake_quantized(
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quant_min: int,
    quant_max: int,
    *,
    rule: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    dtype: torch.dtype | None = None,
    quantize_weight: Callable[[Tensor], Tensor] | None = None,
    weight_parameters: Sequence[Tensor] = (),
) -> Tensor:
    """``conv2d(fake_quantize(x, scale, ...), weight, bias)`` with the memory of a float convolution.

    A convolution keeps its operands for backward, and here these would be quantized copies beside the
    originals. This one keeps the originals and quantizes again in backward, which costs some element-wise
    passes and gives the same values to the bit.

    Args:
        x: ``(N, C, H, W)``. scale: 0-dim. weight: ``(O, C / groups, kH, kW)``. bias: ``(O,)`` or None.
        rule: ``"lsq"`` or ``"pact"``, see :func:`scale_gradients`.
        dtype: in which the convolution runs; that of ``weight`` if None.
        quantize_weight: differentiable function that quantizes ``weight``, called once more in backward
            and therefore without side effects; None if ``weight`` is quantized already.
        weight_parameters: the tensors, besides the weight, with respect to which it is differentiable.

    Returns:
        ``(N, O, H', W')``.
    """
    options = {
        "range": (quant_min, quant_max),
        "lsq": rule == "lsq",
        "geometry": (stride, padding, dilation, groups),
        "dtype": dtype,
        "quantize_weight": quantize_weight,
    }
    return _FakeQuantizedConv2d.apply(x, scale, weight, bias, options, *weight_parameters)
