"""Weights rounded so that each layer's output, and not each weight, stays nearest to the one in full precision.

Rounding to the nearest code minimises the error of every weight by itself. What matters is the error of the layer's
output, whose inputs are correlated: one weight's error can make good another's (AdaRound, 2004.10568). Here the codes
are chosen one input after the other, and the weights that are not chosen yet take over the error, by the second moments
of the layer's inputs (GPTQ, 2210.17323, whose closed form needs no training). Deviation: the inputs of all layers are
taken at once from the quantized detector, before any weight is chosen anew.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import QuantConv2d
from ..quantization import AffineGrid

POSITIONS = 256
"""Places of an image at most, evenly spread, whose inputs are counted."""
DAMPING = 0.01
"""Share of the mean second moment that is added to each input's own, so that rare inputs do not rule."""
_BLOCK = 128


@torch.no_grad()
def round_weights(weight: Tensor, moments: Tensor, grid: AffineGrid, damping: float = DAMPING) -> Tensor:
    """Chooses codes for a layer's weights, the inputs with the largest second moments first.

    Args:
        weight: ``(O, K)``, in full precision.
        moments: ``(K, K)``, sums of products of inputs.
        grid: the grid of the weights, ``(1,)`` or ``(O,)`` scales.
        damping: see :data:`DAMPING`.

    Returns:
        ``(O, K)``, weights on the grid.
    """
    left, moments = weight.double(), moments.double()
    order = moments.diagonal().argsort(descending=True, stable=True)
    left, moments = left[:, order].clone(), moments[order][:, order]
    amount = damping * moments.diagonal().mean()
    moments = moments + torch.eye(len(order), dtype=moments.dtype) * (amount if amount > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor = torch.linalg.cholesky(inverse, upper=True)
    scale = grid.scale.detach().double().reshape(-1)
    chosen = torch.empty_like(left)
    for start in range(0, len(order), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(order)))
        errors = torch.zeros_like(left[:, block])
        for place in range(block.start, block.stop):
            codes = (left[:, place] / scale).round().clamp(grid.quant_min, grid.quant_max)
            chosen[:, place] = codes * scale
            error = (left[:, place] - chosen[:, place]) / factor[place, place]
            errors[:, place - block.start] = error
            left[:, place : block.stop] -= error[:, None] * factor[place, place : block.stop]
        left[:, block.stop :] -= errors @ factor[block, block.stop :]
    result = torch.empty_like(chosen)
    result[:, order] = chosen
    return result.to(weight.dtype)


class _Moments:
    """Second moments of a convolution's quantized inputs, ``(K, K)``, over images and levels of the pyramid."""

    def __init__(self, conv: QuantConv2d) -> None:
        self.conv, self.total = conv, torch.zeros(())

    def add(self, x: Tensor) -> None:
        conv = self.conv
        x = x if conv.input_quantizer is None else conv.input_quantizer(x)
        geometry = {"dilation": conv.dilation, "padding": conv.padding, "stride": conv.stride}
        patches = F.unfold(x, conv.kernel_size, **geometry)  # type: ignore[arg-type]
        step = -(-patches.shape[2] // POSITIONS)
        rows = patches[:, :, ::step].transpose(0, 1).flatten(1)
        self.total = self.total + rows @ rows.T


@torch.no_grad()
def reconstruct_weights(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """Rounds the weights of a calibrated detector anew, in place.

    Args:
        model: quantized and calibrated, its weights those in full precision, in evaluation mode.
        run: runs it on images.

    Returns:
        Names of the convolutions whose weights are on their grids now. Left out are grouped ones, and those whose
        method has no uniform grid on which a weight stays where it is.
    """
    convs = {
        name: module for name, module in model.named_modules() if isinstance(module, QuantConv2d) and module.groups == 1
    }
    moments = {name: _Moments(conv) for name, conv in convs.items()}
    handles = [
        conv.register_forward_pre_hook(lambda _, inputs, name=name: moments[name].add(inputs[0]))
        for name, conv in convs.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    done = []
    for name, conv in convs.items():
        grid = conv.weight_quantizer.grid()
        if grid is None or not moments[name].total.dim():
            continue
        rounded = round_weights(conv.weight.flatten(1), moments[name].total, grid).view_as(conv.weight)
        if torch.allclose(conv.weight_quantizer(rounded), rounded, rtol=1e-5, atol=0):
            conv.weight.copy_(rounded)
            done.append(name)
    return done
