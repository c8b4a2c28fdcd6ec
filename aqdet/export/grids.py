"""Grids of a detector's quantizers, and checks of parameters, which refuse those without integers in one line."""

from __future__ import annotations

import math

import numpy as np
import torch
from detectron2.layers import FrozenBatchNorm2d
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modeling.scaffold import SCAFFOLD_PREFIXES
from ..quantization import QUANTIZER_REGISTRY, Quantizer
from .program import Grid

UNIFORM = ("dorefa", "lsq", "lsqodd", "lsqplus", "pact")
"""Methods whose values are integers times a scale."""
_NOT_UNIFORM = {
    "lqnet": "has levels that are no multiples of one step",
    "n2uq": "compares with learned thresholds, so that its codes are not round(x / scale)",
}
LARGEST_MULTIPLIER = 2.0**20
"""Most codes of the output that one unit of a convolution's sum may be worth, thousands of times any range."""
STEP_SIZES = ("scale", "alpha")
"""Parameters of quantizers that have to be positive: step sizes, and ranges that are divided by a number of codes."""
LARGEST_STEP = 1e6
"""Largest step size that is accepted; weights and values of a trained detector are in the tens at most."""


def check_parameters(model: nn.Module) -> None:
    """Checks that a detector's parameters and statistics are numbers that a trained detector can have.

    A step size of zero or below acts as the smallest allowed one in training, so that the model runs; the shipped
    detector would have a layer that clips everything.

    Raises:
        ValueError: In one line that names the layer, the parameter and its value.
    """
    for name, module in model.named_modules():
        if name.startswith(SCAFFOLD_PREFIXES):
            continue
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in tensors:
            if not tensor.is_floating_point():
                continue
            wrong = ~torch.isfinite(tensor)
            wanted = "finite"
            if isinstance(module, Quantizer) and key in STEP_SIZES:
                wrong, wanted = wrong | (tensor <= 0) | (tensor > LARGEST_STEP), f"above 0 and at most {LARGEST_STEP:g}"
            elif isinstance(module, _BatchNorm | FrozenBatchNorm2d) and key == "running_var":
                wrong, wanted = wrong | (tensor < 0), "finite and not negative"
            if wrong.any():
                raise ValueError(f"layer {name}: its {key} must be {wanted}, {_first_of(tensor, wrong)}")


def _first_of(tensor: Tensor, wrong: Tensor) -> str:
    """Returns a text on the first wrong value, for example ``got nan (1 of 64 values, the first at 3)``."""
    index = int(wrong.flatten().nonzero()[0])
    where = ""
    if tensor.numel() > 1:
        place = ", ".join(str(int(i)) for i in np.unravel_index(index, tuple(tensor.shape)))
        where = f" ({int(wrong.sum())} of {tensor.numel()} values, the first at [{place}])"
    return f"got {tensor.flatten()[index].item():g}{where}"


def grid_of(quantizer: Quantizer | None, name: str) -> Grid:
    """Returns the grid of an activation.

    Raises:
        ValueError: In one line, if the quantizer has no grid of integers.
    """
    if quantizer is None:
        raise ValueError(f"layer {name} is not quantized: the model was built with MODEL.QUANT.ENABLED False")
    check_quantizer(quantizer, name)
    grid = quantizer.grid()
    if grid is None or grid.scale.numel() != 1:
        raise ValueError(f"layer {name}: {quantizer.spec.quantizer!r} has no single uniform grid, so no integer form")
    scale = float(grid.scale.detach())
    if not np.isfinite(scale) or scale <= 0:
        raise ValueError(f"layer {name}: its scale must be positive and finite, got {scale}")
    return Grid(scale, grid.quant_min, grid.quant_max)


def check_reach(reach: float, target: Grid, name: str) -> None:
    """Checks that the values which reach a grid can be told apart on it.

    Args:
        reach: The largest magnitude that a value may have before it is rounded.
        target: The grid.
        name: The quantizer's name for messages.

    Raises:
        ValueError: In one line, if every value would become zero, for example with a scale that is far too large.
    """
    if not math.isfinite(reach):
        raise ValueError(f"layer {name}: values before its scale of {target.scale:g} are not finite")
    if reach < 0.5 * target.scale:
        raise ValueError(
            f"layer {name}: its scale is {target.scale:g}, but no value before it is larger than {reach:.3g}: "
            "everything would become zero"
        )


def check_multiplier(unit: NDArray[np.float64], target: Grid | None, name: str) -> None:
    """Checks that a convolution's sums and its output are of comparable size.

    Args:
        unit: ``(O,)``, the real value of one unit of each channel's sum.
        target: The grid of the output; None for a prediction.
        name: The convolution's name for messages.

    Raises:
        ValueError: In one line, if a unit is worth more than :data:`LARGEST_MULTIPLIER` codes of the output.
    """
    step = 1.0 if target is None else target.scale
    channel = int(np.argmax(unit))
    if not unit[channel] / step <= LARGEST_MULTIPLIER:
        where = "of the prediction" if target is None else f"codes of its output, whose scale is {step:g}"
        raise ValueError(
            f"layer {name}: one unit of the sum of channel {channel} is {unit[channel] / step:.3g} {where}: its "
            f"scales or its norm's parameters are wrong (one unit stands for {unit[channel]:.3g})"
        )


def check_quantizer(quantizer: Quantizer, name: str) -> None:
    """Checks that a quantizer is calibrated, switched on and uniform.

    Raises:
        ValueError: In one line that names the layer.
    """
    method = quantizer.spec.quantizer
    if method not in UNIFORM:
        reason = _NOT_UNIFORM.get(method, "is not known to be uniform")
        others = [kind for kind in UNIFORM if quantizer.spec.role in QUANTIZER_REGISTRY[kind]]
        raise ValueError(
            f"layer {name}: quantizer {method!r} {reason}, and has no integer form here: train the layer with "
            f"{', '.join(others[:-1])} or {others[-1]} to export it (MODEL.QUANT, or a rule of MODEL.QUANT.RULES)"
        )
    if not quantizer.enabled:
        raise ValueError(f"layer {name}: its quantizer is switched off (aqdet.quantization.set_quantization)")
    if not quantizer.is_active:
        raise ValueError(
            f"layer {name}: its quantizer is not calibrated: MODEL.WEIGHTS must be a checkpoint of quantized training"
        )
