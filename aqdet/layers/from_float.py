"""The step from a float layer to the quantized layer that stands for it."""

from __future__ import annotations

from typing import Any

from ..quantization import QuantSpec, build_quantizer


def take_over(layer: Any, source: Any, weight: QuantSpec, input: QuantSpec | None, channels: int) -> Any:
    """Gives a new layer the parameters of a float one (shared, not copied), its mode, and quantizers.

    Args:
        layer: Layer without parameters of its own (on the meta device).
        source: The float layer.
        weight: Spec of the weight quantizer.
        input: Spec of the input quantizer; None where the input is exact.
        channels: Number of output channels, for a weight quantizer with a scale for each.
    """
    layer.weight = source.weight
    layer.bias = source.bias
    layer.weight_quantizer = build_quantizer(weight, num_channels=channels)
    layer.input_quantizer = None if input is None else build_quantizer(input)
    return layer.train(source.training)
