"""Quantizers, in torch alone."""

from . import fused, lean
from .build import QUANTIZER_REGISTRY, build_quantizer
from .calibration import calibrate
from .functional import dequantize, integer_range, quantize
from .kernels import KERNELS, fake_quantize, register_kernels, set_kernels, use_kernels
from .observer import CALIBRATION_METHODS
from .quantizer import AffineGrid, Quantizer, name_quantizers, quantizers, set_quantization
from .spec import IntegerTensor, QuantSpec

# The one place that knows of these sets: without these lines and their folders everything is computed plainly.
register_kernels("lean", lean.KERNELS)
register_kernels("fused", fused.KERNELS)
set_kernels("fused" if fused.is_available() else "lean")

__all__ = [
    "CALIBRATION_METHODS",
    "KERNELS",
    "QUANTIZER_REGISTRY",
    "AffineGrid",
    "IntegerTensor",
    "QuantSpec",
    "Quantizer",
    "build_quantizer",
    "calibrate",
    "dequantize",
    "fake_quantize",
    "integer_range",
    "name_quantizers",
    "quantize",
    "quantizers",
    "register_kernels",
    "set_kernels",
    "set_quantization",
    "use_kernels",
]
