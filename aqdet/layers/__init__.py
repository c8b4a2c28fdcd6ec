"""Layers of the low-precision detector."""

from .add import QuantAdd, StreamQuantizer
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
    "shared_weights",
]
