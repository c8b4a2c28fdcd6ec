"""ReLUs that the quantizer after them is, and tensors that several layers read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..kernels import has_free_norms, plain
from ..quantizer import Quantizer
from .conv import deferred_conv2d
from .elementwise import fake_quantize
from .norm import Activation, Deferred, computed, computed_relu, defer, quantize_deferred
from .weight import is_usable, usable_grid


def clips_at_zero(quantizer: Quantizer | None) -> bool:
    """Returns whether ``quantizer(x)`` is ``quantizer(relu(x))``, gradients included, as its state is now."""
    return quantizer is not None and is_usable(quantizer) and quantizer.quant_min == 0


def relu_before(quantizer: Quantizer | None, x: Tensor, inplace: bool = False) -> Tensor:
    """Computes :func:`aqdet.layers.relu_before`."""
    return x if clips_at_zero(quantizer) else plain("relu_before")(quantizer, x, inplace)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def quantized(quantizer: Quantizer, x: Activation, note_codes: bool = False) -> Tensor:
    """Computes ``quantizer(x)``; see :func:`~.elementwise.fake_quantize` for ``note_codes``."""
    grid, gradient = usable_grid(quantizer), quantizer.gradient
    if grid is None or gradient is None or _has_hooks(quantizer):
        return quantizer(computed(x))
    options = grid.scale.reshape(()), grid.quant_min, grid.quant_max
    if isinstance(x, Deferred):
        return quantize_deferred(x, *options, gradient=gradient, note_codes=note_codes)
    return fake_quantize(x, *options, gradient=gradient, note_codes=note_codes)


def stream(module: Any, x: Activation) -> Tensor:
    """Computes the forward of a :class:`aqdet.layers.StreamQuantizer`; the layers that read it keep its codes."""
    if not is_usable(module.quantizer):
        return plain("stream")(module, computed(x))
    if module.relu and not clips_at_zero(module.quantizer):
        x = computed_relu(x)
    return quantized(module.quantizer, x, note_codes=True)


def _first_quantizer(layer: nn.Module | None) -> Quantizer | None:
    """Returns the quantizer that a layer applies to its input first: that of a convolution, a sum or a stream."""
    for key in ("input_quantizer", "x_quantizer", "quantizer"):
        if isinstance(getattr(layer, key, None), Quantizer):
            return getattr(layer, key)
    return None


def _add(layer: Any, x: Activation, y: Tensor) -> Tensor:
    """Computes the forward of a :class:`aqdet.layers.QuantAdd`."""
    x = computed(x) if layer.x_quantizer is None else quantized(layer.x_quantizer, x)
    y = y if layer.y_quantizer is None else quantized(layer.y_quantizer, y)
    return x + y


def _float_conv2d(layer: Any, x: Tensor) -> Activation:
    """Computes the forward of Detectron2's ``Conv2d`` but for the last step of its norm."""
    out = defer(layer.norm, layer._conv_forward(x, layer.weight, layer.bias))
    return out if layer.activation is None else layer.activation(computed(out))


def chain(layers: Sequence[nn.Module], x: Tensor, other: Callable[[], Tensor] | None = None) -> Tensor:
    """Computes :func:`aqdet.layers.run_chain`; norms are not computed where a quantizer reads them, but by it."""
    state: Activation = x
    is_free = has_free_norms()
    after_quantized = False
    for layer, following in zip(layers, (*layers[1:], None), strict=True):
        weight_quantizer = getattr(layer, "weight_quantizer", None)
        is_quantized = weight_quantizer is not None and weight_quantizer.is_active
        if hasattr(layer, "x_quantizer"):
            assert other is not None
            state = layer(computed(state), other()) if _has_hooks(layer) else _add(layer, state, other())
        elif _has_hooks(layer):
            state = layer(computed(state))
        elif isinstance(layer, nn.ReLU):
            if not clips_at_zero(_first_quantizer(following)):
                state = computed_relu(state) if isinstance(state, Deferred) else layer(state)
        elif isinstance(getattr(layer, "quantizer", None), Quantizer):
            state = stream(layer, state)
        elif is_quantized and isinstance(layer, nn.Conv2d):
            state = deferred_conv2d(layer, state)
        elif is_free and isinstance(layer, nn.Conv2d) and getattr(layer, "norm", None) is not None:
            state = _float_conv2d(layer, computed(state))
        elif is_free and getattr(layer, "relu", False):  # of a stream without a quantizer
            state = computed_relu(state)
        elif after_quantized or is_free:
            state = layer(computed(state)) if isinstance(layer, nn.Conv2d) else defer(layer, computed(state))
        else:
            state = layer(computed(state))
        after_quantized = is_quantized
    return computed(state)
