"""ReLUs that the quantizer after them is, and tensors that several layers read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import plain
from ..quantizer import Quantizer
from .elementwise import fake_quantize
from .norm import normalize
from .weight import usable_grid


def clips_at_zero(quantizer: Quantizer | None) -> bool:
    """Returns whether ``quantizer(x)`` is ``quantizer(relu(x))``, gradients included, as its state is now."""
    with torch.no_grad():
        grid = usable_grid(quantizer)
    return grid is not None and grid.quant_min == 0


def relu_before(quantizer: Quantizer | None, x: Tensor, inplace: bool = False) -> Tensor:
    """Computes :func:`aqdet.layers.relu_before`."""
    return x if clips_at_zero(quantizer) else plain("relu_before")(quantizer, x, inplace)


def stream(module: Any, x: Tensor) -> Tensor:
    """Computes the forward of a :class:`aqdet.layers.StreamQuantizer`; the layers that read it keep its codes."""
    grid = usable_grid(module.quantizer)
    if grid is None:
        return plain("stream")(module, x)
    if module.relu:
        x = relu_before(module.quantizer, x)
    scale, quant_min, quant_max = grid
    gradient = module.quantizer.gradient
    return fake_quantize(x, scale.reshape(()), quant_min, quant_max, gradient=gradient, note_codes=True)


def tower(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Computes :func:`aqdet.modeling.heads.run_tower`."""
    quantized = False
    for layer, following in zip(layers, (*layers[1:], None), strict=True):
        if isinstance(layer, nn.ReLU):
            x = relu_before(getattr(following, "input_quantizer", None), x)
        else:
            x = normalize(layer, x) if quantized else layer(x)
        weight_quantizer = getattr(layer, "weight_quantizer", None)
        quantized = weight_quantizer is not None and weight_quantizer.is_active
    return x
