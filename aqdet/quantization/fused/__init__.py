"""Kernels for GPUs: those of :mod:`aqdet.quantization.lean`, whose element-wise arithmetic is one pass each way.

A chain of operations reads and writes a tensor of a GPU's memory once for each of them. Here quantization is one kernel
(:mod:`.programs`), and so are its gradients, which compute the input again from its recipe on the way. The kernels are
written in Triton, which comes with PyTorch on Linux. The set is in use by default where there are a CUDA device and
Triton; tensors of a CPU pass it on to the lean set.

Outputs and gradients equal those of the plain operations exactly, but for the rounding of the sum that is a scale's
gradient.
"""

from collections.abc import Callable
from typing import Any

import torch

from .. import lean
from .operators import HAS_TRITON, fake_quantized, recipe_gradients, recipe_quantized, scale_gradients

KERNELS: dict[str, Callable[..., Any]] = {
    **lean.KERNELS,
    "fake_quantized": fake_quantized,
    "recipe_gradients": recipe_gradients,
    "recipe_quantized": recipe_quantized,
    "scale_gradients": scale_gradients,
}


def is_available() -> bool:
    """Returns whether the kernels can run here: on a CUDA device, by Triton."""
    return HAS_TRITON and torch.cuda.is_available()
