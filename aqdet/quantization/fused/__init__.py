"""Kernels for GPUs: the kernels of :mod:`aqdet.quantization.lean`, with element-wise arithmetic in one pass each way.

A chain of operations reads and writes a tensor of a GPU's memory once for each of them. Here quantization is one kernel
(:mod:`.programs`), and so are its gradients, which compute the input again from its recipe on the way. A batch norm
with a ReLU and a quantizer behind it is one pass forward, and two backward (:mod:`.norm_programs`). The kernels are
written in Triton, which comes with PyTorch on Linux. The set is in use by default where there are a CUDA device and
Triton; tensors of a CPU pass it on to the lean set.

Outputs and gradients equal those of the plain operations exactly, but for the rounding of sums, in the
gradients of scales and in batch norms.
"""

from collections.abc import Callable
from typing import Any

import torch

from .. import lean
from . import norm_operators as norm
from . import operators as quantizer
from .operators import HAS_TRITON

KERNELS: dict[str, Callable[..., Any]] = {
    **lean.KERNELS,
    "batch_moments": norm.batch_moments,
    "fake_quantized": quantizer.fake_quantized,
    "norm_gradients": norm.norm_gradients,
    "norm_input": norm.norm_input,
    "norm_sums": norm.norm_sums,
    "normalized": norm.normalized,
    "quantized_norm_gradients": norm.quantized_norm_gradients,
    "recipe_codes": quantizer.recipe_codes,
    "recipe_gradients": quantizer.recipe_gradients,
    "recipe_quantized": quantizer.recipe_quantized,
    "region_gradients": quantizer.region_gradients,
    "region_quantized": quantizer.region_quantized,
    "scale_gradients": quantizer.scale_gradients,
}


def is_available() -> bool:
    """Returns whether the kernels can run here: on a CUDA device, by Triton."""
    return HAS_TRITON and torch.cuda.is_available()
