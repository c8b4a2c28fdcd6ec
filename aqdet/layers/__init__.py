"""Layers of the low-precision detector."""

from ..quantization.lean.norm import normalize
from ..quantization.lean.pool import max_pool2d
from .add import QuantAdd, StreamQuantizer, relu_before
from .conv import QuantConv2d, Site, declare_site, forget_sites, shared_weights
from .linear import QuantLinear

__all__ = [
    "QuantAdd",
    "QuantConv2d",
    "QuantLinear",
    "Site",
    "StreamQuantizer",
    "declare_site",
    "forget_sites",
    "max_pool2d",
    "normalize",
    "relu_before",
    "shared_weights",
]
