"""What an activation can be computed from again, so that backward need not keep it.

The output of a batch norm is a scale and a shift of each channel of the convolution's output, which the norm
keeps anyway; the output of a quantizer is its codes, a byte each, times a scale. Whoever makes such a tensor
notes its origin, and a quantizer that needs its input in backward keeps the origin instead. A tensor without
one, or changed in place since, is kept itself: an origin saves memory, and nothing depends on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PART_SIZE = 1 << 17
"""Elements of a part of a tensor whose intermediates stay in a CPU's cache."""


class Origin(NamedTuple):
    """``x = base * scale + shift``, computed in float32 and in this order.

    Attributes:
        base: like ``x`` in shape; any dtype.
        scale: None for 1, 0-dim, or broadcastable against ``base``; ``(C,)`` if there is a shift.
        shift: None for 0, or ``(C,)``, one for each channel of ``base (N, C, H, W)``.
    """

    base: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def derive(self, out: Tensor | None = None) -> Tensor:
        """``x`` of a part from :meth:`parts`; ``base`` itself if it is that, else a new tensor or ``out``."""
        if self.scale is None:
            return self.base.float() if out is None else out.copy_(self.base)
        x = torch.mul(self.base, self.scale, out=out)
        return x if self.shift is None else x.add_(self.shift)

    def parts(self, *tensors: Tensor) -> list[tuple[Origin, tuple[Tensor, ...]]]:
        """The origin and tensors like ``x``, in parts; see :func:`split_parts`."""
        base, scale, shift = self
        if scale is None or shift is None:
            nothing = torch.zeros(()) if scale is None else scale
            return [(Origin(b, scale), rest) for _, b, *rest in split_parts(nothing, base, *tensors)]  # type: ignore[misc]
        if can_split(base, *tensors):
            if base.is_contiguous(memory_format=torch.channels_last):
                rows = max(1, PART_SIZE // base.shape[1])
                split = (t.permute(0, 2, 3, 1).view(-1, base.shape[1]).split(rows) for t in (base, *tensors))
                return [(Origin(b, scale, shift), rest) for b, *rest in zip(*split, strict=True)]  # type: ignore[misc]
            if base.is_contiguous():
                split = (t.flatten(2).split(1) for t in (base, *tensors))
                scale, shift = scale.view(-1, 1), shift.view(-1, 1)
                return [(Origin(b, scale, shift), rest) for b, *rest in zip(*split, strict=True)]  # type: ignore[misc]
        return [(Origin(base, scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)), tensors)]


def can_split(*tensors: Tensor) -> bool:
    """Whether tensors are large, on a CPU and alike in memory, and nothing else will fuse their arithmetic."""
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and first.is_cpu
        and first.numel() > 2 * PART_SIZE
        and all(t.stride() == first.stride() for t in tensors)
    )


def split_parts(scale: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of a scale and of tensors of one shape, in parts whose intermediates stay in a CPU's cache.

    The parts cover every element once, in the order of memory if ``scale`` is 0-dim and by rows of the first
    axis if it is ``(C, 1, ...)``. Small tensors, tensors on another device and tensors that do not lie alike
    in memory come whole. Memory takes three times as long as arithmetic in an element-wise pass over a large
    tensor, which a chain of passes over a part in the cache does not pay.
    """
    whole = [(scale, *tensors)]
    first = tensors[0]
    if not can_split(*tensors):
        return whole
    if scale.dim() == 0:
        order = sorted(range(first.dim()), key=first.stride, reverse=True)
        if not first.permute(order).is_contiguous():
            return whole
        flat = [t.permute(order).view(-1).split(PART_SIZE) for t in tensors]
        return [(scale, *parts) for parts in zip(*flat, strict=True)]
    if scale.shape != (first.shape[0], *[1] * (first.dim() - 1)) or not first.is_contiguous():
        return whole
    rows = max(1, PART_SIZE * first.shape[0] // first.numel())
    return list(zip(*(t.split(rows) for t in (scale, *tensors)), strict=True))


def note_origin(x: Tensor, origin: Origin) -> Tensor:
    """Notes that ``x`` can be computed from ``origin``; returns ``x``."""
    x.aqdet_origin = (origin, x._version)  # type: ignore[attr-defined]
    return x


def origin_of(x: Tensor) -> Origin:
    """The noted origin of ``x`` if it still holds, else ``x`` as its own."""
    if not torch.compiler.is_compiling():
        origin, version = getattr(x, "aqdet_origin", (None, None))
        if origin is not None and version == x._version:
            return origin
    return Origin(x)
