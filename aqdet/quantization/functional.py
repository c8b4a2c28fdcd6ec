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

from .lean.integer import IntegerWeight, integer_conv2d
from .lean.recipe import Origin, note_origin, origin_of, split_parts

SCALE_EPS = float(torch.finfo(torch.float32).eps)
"""Floor of every step size: a scale that training drives to zero or below acts as this one."""

RULES = ("lsq", "pact")
"""Gradient rules of a scale, see :func:`scale_gradients`."""


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


def is_recomputing() -> bool:
    """Whether this runs inside a backward, where activation checkpointing calls a forward once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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
    return value.sum() if like.dim() == 0 else value.sum_to_size(like.shape)


def _total(sums: list[Tensor], scale: Tensor) -> Tensor:
    """The sum for each element of ``scale`` from those of its :func:`~aqdet.quantization.lean.recipe.split_parts`."""
    if len(sums) == 1:
        return sums[0]
    return torch.stack(sums).sum() if scale.dim() == 0 else torch.cat(sums)


def _fake_quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> Tensor:
    """:func:`quantize`, then :func:`dequantize`, in parts."""
    out = torch.empty_like(x, dtype=dtype)
    for s, x_part, out_part in split_parts(scale, x, out):
        torch.mul(quantize(x_part, s, quant_min, quant_max), s, out=out_part)
    return out


def quantize_to_int8(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """:func:`quantize` with codes from -128 to 127 as int8, in parts."""
    out = torch.empty_like(x, dtype=torch.int8)
    for s, x_part, out_part in split_parts(scale, x, out):
        out_part.copy_(quantize(x_part, s, quant_min, quant_max))
    return out


def to_bytes(codes: Tensor, out: Tensor, quant_max: int) -> None:
    """Writes float codes that fit into ``out``, int8 or uint8; changes ``codes``.

    A conversion to int8 is vectorised, one to uint8 is not.
    """
    if out.dtype == torch.uint8 and quant_max > 127:
        out.view(torch.int8).copy_(codes.sub_(128))
        out.bitwise_xor_(128)
    else:
        out.view(torch.int8).copy_(codes)


def quantize_to_bytes(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """``quantize(...) - quant_min`` as uint8, for a range of at most 256 codes and a 0-dim scale."""
    out = torch.empty_like(x, dtype=torch.uint8)
    for s, x_part, out_part in split_parts(scale, x, out):
        codes = quantize(x_part, s, quant_min, quant_max)
        to_bytes(codes.sub_(quant_min) if quant_min else codes, out_part, quant_max - quant_min)
    return out


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
    on a CPU.

    Args:
        grad: gradient of the loss with respect to ``fake``, same shape as ``x``.
        x: the input, any shape.
        scale: positive, 0-dim or broadcastable against ``x``.
        lsq: chooses the column.

    Returns:
        ``(dx, dscale)``, both float32.
    """
    grad = grad.float()
    dx = torch.empty_like(grad)
    sums = [
        _scale_gradients(grad_part, x_part.float(), s, quant_min, quant_max, lsq, dx_part)
        for s, grad_part, x_part, dx_part in split_parts(scale, grad, x, dx)
    ]
    return dx, _total(sums, scale)


def _scale_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, lsq: bool, dx: Tensor
) -> Tensor:
    """:func:`scale_gradients` of one part; writes ``dx`` and returns ``dscale``."""
    hardtanh_backward = torch.ops.aten.hardtanh_backward
    ratio = x / scale
    hardtanh_backward.grad_input(grad, ratio, quant_min, quant_max, grad_input=dx)
    if lsq:
        inside = hardtanh_backward(ratio, ratio, quant_min, quant_max)
        products = ratio.clamp_(quant_min, quant_max).round_().sub_(inside).mul_(grad)
    else:
        # Clipped gradients times the bound they were clipped at.
        products = ratio.clamp_(quant_min, quant_max).round_().mul_(grad - dx)
    return _reduce_to(products, scale)


def _input_gradients(
    grad: Tensor, origin: Origin, scale: Tensor, quant_min: int, quant_max: int, lsq: bool
) -> tuple[Tensor, Tensor]:
    """:func:`scale_gradients` for an activation that is computed again, with a 0-dim scale."""
    grad = grad.float()
    dx = torch.empty_like(grad)
    sums = [
        _scale_gradients(grad_part, part.derive(), scale, quant_min, quant_max, lsq, dx_part)
        for part, (grad_part, dx_part) in origin.parts(grad, dx)
    ]
    return dx, _total(sums, scale)


class _FakeQuantizeSaveInput(torch.autograd.Function):
    """Fake quantization that keeps its input, or its origin, for backward and derives everything from it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        quant_min: int,
        quant_max: int,
        lsq: bool,
        *origin: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(scale, *(origin or (x, None, None)))
        ctx.range = (quant_min, quant_max)
        ctx.lsq = lsq
        ctx.x_dtype = x.dtype
        return _fake_quantize(x, scale, quant_min, quant_max, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, *origin = ctx.saved_tensors
        quant_min, quant_max = ctx.range
        if scale.dim() == 0:
            dx, dscale = _input_gradients(grad, Origin(*origin), scale, quant_min, quant_max, ctx.lsq)
        else:
            dx, dscale = scale_gradients(grad, origin[0], scale, quant_min, quant_max, ctx.lsq)
        return dx.to(ctx.x_dtype), dscale, *[None] * (len(ctx.needs_input_grad) - 2)


class _FakeQuantizeSaveRegion(torch.autograd.Function):
    """Fake quantization with PACT's gradient, which needs one byte an element for backward.

    A second result is the codes as bytes, if they are asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, with_codes: bool
    ) -> tuple[Tensor, Tensor | None]:
        region = torch.empty_like(x, dtype=torch.uint8)
        out = torch.empty_like(x)
        codes = torch.empty_like(x, dtype=torch.int8 if quant_min < 0 else torch.uint8) if with_codes else None
        for s, x_part, region_part, out_part, *codes_part in split_parts(
            scale, x, region, out, *(() if codes is None else (codes,))
        ):
            ratio = x_part.float() / s
            # 0: at or below quant_min, 1: inside, 2: at or above quant_max.
            inside_or_above = (ratio > quant_min).view(torch.uint8)
            torch.add(inside_or_above, (ratio >= quant_max).view(torch.uint8), out=region_part)
            ratio.clamp_(quant_min, quant_max).round_()
            torch.mul(ratio, s, out=out_part)
            if codes_part:
                to_bytes(ratio, codes_part[0], quant_max)
        ctx.save_for_backward(region, scale)
        ctx.range = (quant_min, quant_max)
        ctx.x_dtype = x.dtype
        if codes is not None:
            ctx.mark_non_differentiable(codes)
        return out, codes

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        region, scale = ctx.saved_tensors
        quant_min, quant_max = ctx.range
        grad = grad.float()
        dx = torch.empty_like(grad)
        sums = []
        for s, grad_part, region_part, dx_part in split_parts(scale, grad, region, dx):
            where = region_part.float()
            torch.ops.aten.hardtanh_backward.grad_input(grad_part, where, 0, 2, grad_input=dx_part)
            clipped = grad_part - dx_part
            above = torch.ops.aten.threshold_backward(clipped, where, 1)
            above_sum, clipped_sum = _reduce_to(above, s), _reduce_to(clipped, s)
            sums.append(above_sum * quant_max + (clipped_sum - above_sum) * quant_min)
        dscale = _total(sums, scale)
        return dx.to(ctx.x_dtype), dscale, None, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, quant_min: int, quant_max: int, *, rule: str = "lsq", note_codes: bool = False
) -> Tensor:
    """Quantizes and dequantizes, with the gradient rule of LSQ or PACT for the scale.

    Args:
        x: any shape and float dtype.
        scale: float32, positive, 0-dim or broadcastable against ``x``.
        quant_min, quant_max: integer range.
        rule: ``"lsq"`` or ``"pact"``, the column of the table in :func:`scale_gradients`.
        note_codes: whether to note the codes as the origin of the result, for layers that read it. A 0-dim
            scale and ``rule="pact"`` only; not noted for a half precision ``x``, where the result is rounded.

    Returns:
        A tensor like ``x``. For backward it keeps the origin of ``x`` if that was noted; otherwise LSQ keeps
        ``x`` itself (which the layer before keeps anyway), PACT one byte an element.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be 'lsq' or 'pact', got {rule!r}")
    origin = origin_of(x) if scale.dim() == 0 else Origin(x)
    if rule == "pact" and (note_codes or origin.base is x):
        note_codes &= torch.is_grad_enabled() and x.requires_grad and x.dtype == torch.float32
        y, codes = _FakeQuantizeSaveRegion.apply(x, scale, quant_min, quant_max, note_codes)
        return y if codes is None else note_origin(y, Origin(codes, scale.detach()))
    kept = () if origin.base is x else origin
    return _FakeQuantizeSaveInput.apply(x, scale, quant_min, quant_max, rule == "lsq", *kept)


class _FakeQuantizedConv2d(torch.autograd.Function):
    """Convolution of quantized operands that keeps the operands before quantization."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        integer_weight: IntegerWeight | None,
        origin: Origin,
        options: dict[str, Any],
        *weight_parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*origin, scale, weight, *weight_parameters)
        ctx.x_dtype = x.dtype
        ctx.options = options
        ctx.bias_size = None if bias is None else list(bias.shape)
        dtype = options["dtype"] or weight.dtype
        quant_min, quant_max = options["range"]
        if integer_weight is not None and dtype == torch.float32:
            codes = quantize_to_bytes(x, scale, quant_min, quant_max)
            return integer_conv2d(codes, -quant_min, scale, integer_weight, bias, *options["geometry"])
        if options["quantize_weight"] is not None:
            weight = options["quantize_weight"](weight)
        x_q = _fake_quantize(x, scale, quant_min, quant_max, dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return torch.conv2d(x_q, weight.to(dtype), bias, *options["geometry"])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        base, factor, shift, scale, weight, *weight_parameters = ctx.saved_tensors
        origin = Origin(base, factor, shift)
        options = ctx.options
        quant_min, quant_max = options["range"]
        dtype = options["dtype"] or weight.dtype
        stride, padding, dilation, groups = options["geometry"]
        need_input = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        need_weight = ctx.needs_input_grad[2] or any(ctx.needs_input_grad[7:])
        leaf = weight_q = weight
        if options["quantize_weight"] is not None:
            leaf = weight.detach().requires_grad_()
            with torch.set_grad_enabled(need_weight):
                weight_q = options["quantize_weight"](leaf)
        x_q = torch.empty_like(origin.base, dtype=dtype)
        for part, (out_part,) in origin.parts(x_q):
            torch.mul(quantize(part.derive(), scale, quant_min, quant_max), scale, out=out_part)
        if weight.numel() > x_q.numel():
            # Channels last would have the weight and its gradient converted.
            grad, x_q = grad.contiguous(), x_q.contiguous()
        grad_x_q, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            x_q,
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
            grad_weight = grad_weight.to(weight.dtype).contiguous()
            if options["quantize_weight"] is not None:
                wanted = [leaf, *(p for p in weight_parameters if p.requires_grad)]
                grads = iter(torch.autograd.grad(weight_q, wanted, grad_weight, allow_unused=True))
                grad_weight = next(grads)
                parameter_grads = [next(grads) if p.requires_grad else None for p in weight_parameters]
        dx = dscale = None
        if need_input:
            dx, dscale = _input_gradients(grad_x_q, origin, scale, quant_min, quant_max, options["lsq"])
            dx = dx.to(ctx.x_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(weight.dtype)
        return dx, dscale, grad_weight, grad_bias, None, None, None, *parameter_grads


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
    integer_weight: IntegerWeight | None = None,
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
        integer_weight: the quantized weight from :func:`~aqdet.quantization.lean.integer.pack_weight`, for a float32
            convolution in integer arithmetic; equal to the float one but for its rounding.

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
    return _FakeQuantizedConv2d.apply(x, scale, weight, bias, integer_weight, origin_of(x), options, *weight_parameters)
