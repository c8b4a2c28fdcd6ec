"""Values that the calls of a layer have in common, as over pyramid levels, computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels import has_free_norms, plain
from ..precision import autocast_dtype, own_precision
from ..quantizer import AffineGrid, Quantizer

_GRID, _OPERANDS = "shared_grid", "shared_operands"  # not by setattr, which would register Parameters


@contextlib.contextmanager
def shared_weights(module: nn.Module) -> Iterator[None]:
    """Computes :func:`aqdet.layers.shared_weights`, and shares more than the quantized weights.

    Under autocast weights are converted to its precision once, those of layers in float, too, where kernels compute
    them: autocast's own cache is not for kernels. The grid of a layer's input is computed once.
    """
    convs: list[Any] = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    layers = [conv for conv in convs if hasattr(conv, "weight_quantizer")]
    floats = [conv for conv in convs if not hasattr(conv, "weight_quantizer")] if has_free_norms() else []
    try:
        with plain("shared_weights")(module):
            for layer in floats:
                dtype = autocast_dtype(layer.weight)
                bias = None if layer.bias is None else layer.bias.to(dtype)
                vars(layer)[_OPERANDS] = layer.weight.to(dtype), bias
            for layer in layers:
                _convert_weight(layer)
                quantizer = layer.input_quantizer
                if quantizer is not None and quantizer.is_active and quantizer.gradient is not None:
                    vars(quantizer)[_GRID] = quantizer.grid()
            yield
    finally:
        for layer in floats:
            vars(layer).pop(_OPERANDS, None)
        for layer in layers:
            vars(layer.input_quantizer or layer).pop(_GRID, None)


def _convert_weight(layer: Any) -> None:
    """Converts a shared weight to the precision of autocast, unless the layer's input needs another one."""
    weight: Tensor = layer.shared_weight
    device = weight.device.type
    if not (layer.weight_quantizer.is_active and torch.is_autocast_enabled(device)):
        return
    if own_precision(layer.input_quantizer, device, weight.dtype) is None:
        vars(layer)["shared_weight"] = weight.to(torch.get_autocast_dtype(device))


def grid_of(quantizer: Quantizer) -> AffineGrid | None:
    """Returns the grid of a quantizer, which calls inside :func:`shared_weights` share."""
    return cast("AffineGrid | None", vars(quantizer).get(_GRID)) or quantizer.grid()


def operands_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Returns weight and bias of a layer in float, which calls inside :func:`shared_weights` share."""
    return vars(layer).get(_OPERANDS) or (layer.weight, layer.bias)
