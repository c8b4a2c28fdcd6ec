"""Precision of float32 products on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Computes float32 products in float32 inside the context, where a GPU would round their operands to TF32.

    TF32 has 11 bits of significand, enough to move a value that lies near the middle of two codes to the other one.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    name, off = "allow_tf32", False
    try:
        places = [(place, place.allow_tf32) for place in (matmul, cudnn)]
    except RuntimeError:  # set by the newer name, beside which the older one cannot be read
        name, off = "fp32_precision", "ieee"  # type: ignore[assignment]
        places = [(place, place.fp32_precision) for place in (matmul, cudnn.conv)]
    try:
        for place, _ in places:
            setattr(place, name, off)
        yield
    finally:
        for place, before in places:
            setattr(place, name, before)
