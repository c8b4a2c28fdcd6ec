"""Quantizers, in torch alone."""

from .build import QUANTIZER_REGISTRY, build_quantizer
from .calibration import calibrate
from .functional import (
    conv2d_fake_quantized,
    dequantize,
    fake_quantize,
    integer_range,
    quantize,
    round_ste,
)
from .observer import CALIBRATION_METHODS
from .quantizer import AffineGrid, Quantizer, quantizers, set_quantization
from .spec import IntegerTensor, QuantSpec

__all__ = [
    "CALIBRATION_METHODS",
    "QUANTIZER_REGISTRY",
    "AffineGrid",
    "IntegerTensor",
    "QuantSpec",
    "Quantizer",
    "build_quantizer",
    "calibrate",
    "conv2d_fake_quantized",
    "dequantize",
    "fake_quantize",
    "integer_range",
    "quantize",
    "quantizers",
    "round_ste",
    "set_quantization",
]
