"""Convolution of integer codes on a CPU, which the forward of quantized training comes down to.

The product of two fake-quantized tensors is a product of small integers times two scales. A CPU with
instructions for it (VNNI) multiplies bytes about four times as fast as floats, and sums them exactly in int32, so
that the result differs from the float convolution of the same values by the latter's rounding only. One with AVX2
alone is twice as fast as with floats, and as exact while two products fit into 16 bits, as those of 4-bit codes do.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor


class IntegerWeight(NamedTuple):
    """Weight as integer codes: ``codes * scale`` is the fake-quantized weight.

    Attributes:
        codes: int8, ``(O, C / groups, kH, kW)``; laid out for the kernel after :func:`pack_weight`.
        scale: float32, ``(O,)``.
    """

    codes: Tensor
    scale: Tensor


_INT16_MAX = 2**15 - 1
_VNNI, _PAIRS = 128, 64
"""Largest weight codes that any uint8 may be multiplied with, where products are added in 32 and in 16 bits."""


@functools.cache
def _largest_beside_uint8() -> int:
    """Returns the largest magnitude of a code that :func:`integer_conv2d` multiplies exactly with 255 here; 0 for none.

    CPUs with VNNI add products in 32 bits. Others with AVX2 or AVX-512 first add two in 16 bits, with saturation.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"):
        largest = _VNNI
    elif capabilities.get("avx2"):
        largest = _PAIRS
    else:
        return 0
    # Bytes whose products would saturate where the instructions are not what they are taken for.
    x, weight = torch.full((1, 4, 3, 3), 255, dtype=torch.uint8), torch.full((8, 4, 3, 3), -largest, dtype=torch.int8)
    try:
        packed = pack_weight(IntegerWeight(weight, torch.ones(8)), x.shape, (1, 1), (0, 0), (1, 1), 1)
        y = integer_conv2d(x, 0, torch.tensor(1.0), packed, None, (1, 1), (0, 0), (1, 1), 1)
    except (AttributeError, RuntimeError):  # a build of torch without the operator
        return 0
    return largest if bool((y == -255 * largest * 36).all()) else 0


def largest_integer_weight(largest_input: int) -> int:
    """Returns the largest weight code for which :func:`integer_conv2d` is exact, and faster than floats, here.

    Args:
        largest_input: the largest uint8 code of the input, 1 to 255.

    Returns:
        At most 128; 0 where this CPU or this build of torch has no such convolution.
    """
    largest = _largest_beside_uint8()
    return min(128, _INT16_MAX // (2 * largest_input)) if largest == _PAIRS else largest


def pack_weight(
    weight: IntegerWeight,
    x_shape: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> IntegerWeight:
    """Lays the codes out as :func:`integer_conv2d` reads them, for an input of about this shape."""
    geometry = (list(stride), list(padding), list(dilation), groups)
    one = torch.ones(1)  # the layout is the same for any scale
    return weight._replace(codes=torch.ops.onednn.qconv_prepack(weight.codes, one, 1.0, 0, *geometry, list(x_shape)))


def integer_conv2d(
    codes: Tensor,
    zero_point: int,
    scale: Tensor,
    weight: IntegerWeight,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Computes ``conv2d((codes - zero_point) * scale, weight.codes * weight.scale, bias)``, without gradients.

    Args:
        codes: uint8 ``(N, C, H, W)``; a padded value is ``zero_point``.
        scale: 0-dim.
        weight: a result of :func:`pack_weight`.
        bias: float32 ``(O,)`` or None.

    Returns:
        float32 ``(N, O, H', W')``, channels last in memory.
    """
    return torch.ops.onednn.qconv2d_pointwise(
        codes,
        1.0,
        zero_point,
        weight.codes,
        weight.scale * scale,
        torch.zeros_like(weight.scale, dtype=torch.int8),
        bias,
        list(stride),
        list(padding),
        list(dilation),
        groups,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
