"""The adaptor, which reads a low-precision feature in full precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn

from ...layers import run_chain
from ...quantization.kernels import replaceable

_RELU = nn.ReLU()


class Adaptor(nn.Module):
    """Full-precision 1x1 convolution and norm, a sum, then ReLU: ``h = ReLU(carried + A(o))``.

    It starts as the identity convolution. Deviation from the paper's public code, which starts at random
    and pre-trains the path in full precision first.

    Args:
        channels: number of channels of input and output.
        norm: see :func:`detectron2.layers.get_norm`.
        share: how much of ``o`` the aligned sum is to be.

    Attributes:
        needs_alignment: whether it waits for a calibration batch, see :func:`aligning`.
    """

    def __init__(self, channels: int, norm: str, share: float = 1.0) -> None:
        super().__init__()
        self.share = share
        norm_layer = get_norm(norm, channels)
        self.conv = Conv2d(channels, channels, 1, bias=not norm, norm=norm_layer)
        nn.init.dirac_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.needs_alignment = False

    @replaceable("adapt")
    def forward(self, x: Tensor, carried: Tensor | None = None) -> Tensor:
        """Maps ``(N, C, H, W)``, and another to add or None, to the same."""
        if carried is None:
            return run_chain([self.conv, _RELU], x)
        return torch.relu(carried + run_chain([self.conv], x))

    @torch.no_grad()
    def align(self, x: Tensor, carried: Tensor | None = None) -> None:
        """Makes ``carried + A(x)`` as near to ``share * x`` as a gain and an offset for each channel can.

        By least squares; with nothing carried the adaptor then passes ``x`` unchanged. Without this a fresh norm
        would centre and scale the features, and what was copied from the detector would see something that it
        was not trained on. The statistics are this process's: one that fails must not leave the others waiting for
        them. The calibration hook averages the adaptors across processes. A group norm mixes channels, and passes
        ``x`` approximately.

        Args:
            x: ``(N, C, H, W)``.
            carried: another of this shape, or None for zeros.
        """
        other = torch.zeros_like(x) if carried is None else carried
        moments = torch.stack([t.mean(dim=(0, 2, 3)) for t in (x, x.square(), other, x * other)])
        mean, square, other_mean, product = moments
        variance = (square - mean.square()).clamp(min=0)
        covariance = product - mean * other_mean
        # Where x is constant, to the rounding of its moments, any gain fits as well: none is taken from the ratio.
        varies = variance > square * (16 * torch.finfo(x.dtype).eps)
        gain = self.share - torch.where(varies, covariance / variance, 0.0)
        norm = self.conv.norm
        if isinstance(getattr(norm, "weight", None), nn.Parameter):
            norm.bias.copy_(self.share * mean - other_mean)
            norm.weight.copy_(gain * variance.add(norm.eps).sqrt())
            return
        # No norm, or a frozen one, which passes x unchanged as it is.
        self.conv.weight.mul_(gain.view(-1, 1, 1, 1))
        if self.conv.bias is not None:
            self.conv.bias.copy_(self.share * mean - other_mean - gain * mean)


def waiting_adaptors(model: nn.Module) -> list[Adaptor]:
    """Returns the adaptors of a model that wait for a calibration batch."""
    return [module for module in model.modules() if isinstance(module, Adaptor) and module.needs_alignment]


@contextlib.contextmanager
def aligning(model: nn.Module) -> Iterator[None]:
    """Aligns the adaptors of a model that wait for it, in the first forward pass inside the context.

    One after the other, in the order of the pass: each sees what the ones before it, aligned, carry.
    """

    def align(adaptor: Any, inputs: tuple[Any, ...]) -> None:
        if adaptor.needs_alignment:
            adaptor.align(*inputs)
            adaptor.needs_alignment = False

    handles = [adaptor.register_forward_pre_hook(align) for adaptor in waiting_adaptors(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
