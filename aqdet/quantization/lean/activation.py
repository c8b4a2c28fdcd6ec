"""ReLUs that the quantizer after them is, and tensors that several layers read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import has_free_norms, plain
from ..quantizer import Quantizer
from .conv import can_recompute, deferred_conv2d, has_hooks, recomputing_conv2d
from .elementwise import fake_quantize
from .moments import Reader
from .norm import (
    Activation,
    Deferred,
    computed,
    computed_relu,
    defer,
    defer_all,
    defer_behind,
    defers_behind,
    is_synchronized,
    quantize_deferred,
)
from .recipe import note_terms, recipe_of
from .weight import is_usable, usable_grid


def clips_at_zero(quantizer: Quantizer | None) -> bool:
    """Returns whether ``quantizer(x)`` is ``quantizer(relu(x))``, gradients included, as its state is now."""
    return quantizer is not None and is_usable(quantizer) and quantizer.quant_min == 0


def relu_before(quantizer: Quantizer | None, x: Tensor, inplace: bool = False) -> Tensor:
    """Computes :func:`aqdet.layers.relu_before`."""
    return x if clips_at_zero(quantizer) else plain("relu_before")(quantizer, x, inplace)


def quantized(quantizer: Quantizer, x: Activation, note_codes: bool = False) -> Tensor:
    """Computes ``quantizer(x)``; see :func:`~.elementwise.fake_quantize` for ``note_codes``."""
    grid, gradient = usable_grid(quantizer), quantizer.gradient
    if grid is None or gradient is None or has_hooks(quantizer):
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
    """Returns the quantizer that a convolution, a sum or a stream applies first; None for another layer."""
    for key in ("input_quantizer", "x_quantizer", "quantizer"):
        if isinstance(getattr(layer, key, None), Quantizer):
            return getattr(layer, key)
    return None


def _add(layer: Any, x: Activation, y: Tensor, is_tapped: bool) -> Tensor:
    """Computes the forward of a :class:`aqdet.layers.QuantAdd`; readers of a tapped sum can keep operands' codes."""
    is_tapped &= not torch.is_autocast_enabled(y.device.type)
    x = computed(x) if layer.x_quantizer is None else quantized(layer.x_quantizer, x, note_codes=is_tapped)
    y = y if layer.y_quantizer is None else quantized(layer.y_quantizer, y, note_codes=is_tapped)
    return note_terms(x + y, recipe_of(x), recipe_of(y)) if is_tapped else x + y


def _at_stride(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Returns the places that a 1x1 convolution with a stride reads, without the others in memory."""
    if tuple(stride) == (1, 1):
        return x
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    read = x[:, :, :: stride[0], :: stride[1]]
    return read.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def _float_conv2d(layer: Any, x: Tensor) -> Activation:
    """Computes the forward of Detectron2's ``Conv2d`` but for the last step of its norm.

    A 1x1 convolution costs less than to keep its output: backward computes it again, from the places that it reads.
    """
    is_pointwise = tuple(layer.kernel_size) == (1, 1) and tuple(layer.padding) == (0, 0) and layer.bias is None
    if is_pointwise and layer.activation is None and defers_behind(layer.norm, x, layer.weight):
        geometry = (1, 1), (0, 0), (1, 1), layer.groups
        return defer_behind(layer.norm, _at_stride(x, layer.stride), layer.weight, geometry)
    out = defer(layer.norm, layer._conv_forward(x, layer.weight, layer.bias))
    return out if layer.activation is None else layer.activation(computed(out))


class _Link(NamedTuple):
    """A layer of a chain, with what it has to know of its neighbours."""

    layer: Any
    following: nn.Module | None
    after_quantized: bool

    @property
    def is_norm(self) -> bool:
        """Whether the layer is one by itself that is left to what follows, if it is a batch norm."""
        is_other = isinstance(self.layer, nn.Conv2d | nn.ReLU) or hasattr(self.layer, "x_quantizer")
        is_stream = hasattr(self.layer, "quantizer") or hasattr(self.layer, "relu")
        return (self.after_quantized or has_free_norms()) and not (is_other or is_stream or has_hooks(self.layer))


def _is_quantized(layer: nn.Module) -> bool:
    quantizer = getattr(layer, "weight_quantizer", None)
    return quantizer is not None and quantizer.is_active


def _links(layers: Sequence[nn.Module]) -> list[_Link]:
    after = [False, *(_is_quantized(layer) for layer in layers[:-1])]
    return [_Link(*link) for link in zip(layers, (*layers[1:], None), after, strict=True)]


def _apply(link: _Link, state: Activation, other: Callable[[], Tensor] | None) -> Activation:
    layer, following, _ = link
    is_free = has_free_norms()
    has_source = isinstance(state, Deferred) and state.source is not None
    if has_source and not isinstance(layer, nn.ReLU):
        state = computed(state)
    if hasattr(layer, "x_quantizer"):
        assert other is not None
        if has_hooks(layer):
            return layer(computed(state), other())
        return _add(layer, state, other(), following is not None and has_hooks(following))
    if link.is_norm:
        return defer(layer, computed(state))
    if has_hooks(layer):
        return layer(computed(state))
    if isinstance(layer, nn.ReLU):
        if clips_at_zero(_first_quantizer(following)):
            return state
        if not isinstance(state, Deferred):
            return layer(state)
        recomputes = following is not None and can_recompute(following) and not has_hooks(following)
        if is_free and not has_source and recomputes:
            return state._replace(relu=True)
        return computed_relu(state)
    if isinstance(getattr(layer, "quantizer", None), Quantizer):
        return stream(layer, state)
    if isinstance(state, Deferred) and state.relu:
        return recomputing_conv2d(layer, state)
    if isinstance(layer, nn.Conv2d) and _is_quantized(layer):
        return deferred_conv2d(layer, state)
    if is_free and isinstance(layer, nn.Conv2d) and getattr(layer, "norm", None) is not None:
        return _float_conv2d(layer, computed(state))
    if is_free and getattr(layer, "relu", False):  # of a stream without a quantizer
        return computed_relu(state)
    return layer(computed(state))


def chain(layers: Sequence[nn.Module], x: Tensor, other: Callable[[], Tensor] | None = None) -> Tensor:
    """Computes :func:`aqdet.layers.run_chain`; norms are not computed where a quantizer reads them, but by it."""
    state: Activation = x
    for link in _links(layers):
        state = _apply(link, state, other)
    return computed(state)


def _reader(links: Sequence[_Link]) -> Reader | None:
    """Returns the ReLU or the quantizer of a convolution that comes first, or after a ReLU that is the quantizer's."""
    if links and isinstance(links[0].layer, nn.ReLU) and not has_hooks(links[0].layer):
        if not clips_at_zero(_first_quantizer(links[0].following)):
            return Reader(None)
        links = links[1:]
    layer = links[0].layer if links else None
    if not isinstance(layer, nn.Conv2d) or not _is_quantized(layer) or has_hooks(layer):
        return None
    quantizer: Any = layer.input_quantizer
    grid = usable_grid(quantizer)
    if grid is None:
        return None
    return Reader(grid.scale.reshape(()), grid.quant_min, grid.quant_max, quantizer.gradient)


def chains(layers: Sequence[nn.Module], xs: Sequence[Tensor]) -> list[Tensor]:
    """Computes :func:`aqdet.layers.run_chains`; a synchronized norm exchanges the moments of all tensors at once."""
    links = _links(layers)
    if len(xs) == 1 or not any(link.is_norm and is_synchronized(link.layer) for link in links):
        return [chain(layers, x) for x in xs]
    states: list[Activation] = list(xs)
    for number, link in enumerate(links):
        if link.is_norm:
            states = defer_all(link.layer, [computed(state) for state in states], _reader(links[number + 1 :]))
        else:
            states = [_apply(link, state, None) for state in states]
    return [computed(state) for state in states]
