"""Layers of the low-precision detector."""

from .add import QuantAdd, StreamQuantizer, relu_before
from .chain import RELU, run_chain, run_chains
from .conv import QuantConv2d, shared_weights
from .deconv import QuantConvTranspose2d, output_first
from .level_norm import LevelNorms
from .linear import QuantLinear
from .pool import max_pool2d
from .site import LAYER_KINDS, Layer, Site, declare_site, forget_sites, quantized_form, weighted_layers

__all__ = [
    "LAYER_KINDS",
    "RELU",
    "Layer",
    "LevelNorms",
    "QuantAdd",
    "QuantConv2d",
    "QuantConvTranspose2d",
    "QuantLinear",
    "Site",
    "StreamQuantizer",
    "declare_site",
    "forget_sites",
    "max_pool2d",
    "output_first",
    "quantized_form",
    "relu_before",
    "run_chain",
    "run_chains",
    "shared_weights",
    "weighted_layers",
]
