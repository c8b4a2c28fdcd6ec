"""LSQ on a grid without zero, for weights of few bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import SCALE_EPS, apply, broadcast_scale, floor_scale
from ..observer import Statistics, by_parts, initial_scale, search_fractions
from ..quantizer import Quantizer
from ..spec import IntegerTensor, QuantSpec


def odd_codes(ratio: Tensor, num_bits: int) -> Tensor:
    """Returns the codes of ``ratio = x / scale``: ``2 clamp(floor(ratio), -h, h - 1) + 1`` with ``h = 2^(b - 1)``.

    Example: at 2 bits ``[-9, -0.4, 0, 0.9, 1]`` gives ``[-3, -1, 1, 1, 3]``.
    """
    half = 2 ** (num_bits - 1)
    return ratio.floor().clamp_(-half, half - 1).mul_(2).add_(1)


def odd_gradients(grad: Tensor, x: Tensor, scale: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Computes the gradients of ``fake = odd_codes(x / scale) * scale / 2`` with respect to ``x`` and ``scale``.

    ``dx`` is ``grad`` where ``-h < x / scale < h`` and 0 elsewhere. ``dscale`` is the sum over the elements that share
    a scale of ``grad`` times ``codes / 2 - x / scale`` there, and times ``codes / 2`` elsewhere.

    Args:
        grad: gradient of the loss with respect to ``fake``, float32.
        x: float32, of the shape of ``grad``.
        scale: positive, 0-dim or broadcastable against ``x``.
        num_bits: bit width.

    Returns:
        ``(dx, dscale)``, of the shapes of ``x`` and ``scale``.
    """
    half = 2 ** (num_bits - 1)
    ratio = x / scale
    outside = (ratio <= -half) | (ratio >= half)
    slope = odd_codes(ratio, num_bits).mul_(0.5)
    products = slope.sub_(ratio.masked_fill_(outside, 0)).mul_(grad)
    dscale = products.sum() if scale.dim() == 0 else products.sum_to_size(scale.shape)
    return grad.masked_fill(outside, 0), dscale


def centre(x: Tensor, per_channel: bool) -> Tensor:
    """Returns ``x (O, ...)`` minus its mean, or minus the mean of each of the O channels.

    The gradient of the result with respect to ``x`` is the same map.
    """
    if not per_channel:
        return x - x.mean()
    return x - broadcast_scale(x.reshape(x.shape[0], -1).mean(dim=1), x)


class _FakeQuantizeOdd(torch.autograd.Function):
    """Fake quantization on odd codes; keeps its input alone for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.spec = spec
        return odd_codes(prepared(x, spec) / scale, spec.num_bits).mul_(scale / 2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        dx, dscale = odd_gradients(grad.float(), prepared(x, ctx.spec), scale, ctx.spec.num_bits)
        return prepared(dx, ctx.spec).to(x.dtype), dscale, None


def prepared(x: Tensor, spec: QuantSpec) -> Tensor:
    """Returns the float32 values that are quantized: ``x``, minus its mean where the spec says so."""
    return centre(x.float(), spec.per_channel) if spec.centered else x.float()


class LSQOddQuantizer(Quantizer):
    """LSQ (1902.08153) with codes ``-(2^b - 1), ..., -3, -1, 1, 3, ..., 2^b - 1`` and half of ``scale`` as their step.

    A symmetric grid without zero: with two bits ``scale`` times -1.5, -0.5, 0.5 and 1.5, where LSQ has -2,
    -1, 0 and 1. At the best scale its squared error on a Gaussian is 0.119 of the variance, LSQ's 0.149. AQD
    (2007.06919) and ParetoQ (2502.02631) use this grid at 2 bits. With one bit the values are plus and minus half of
    ``scale``.

    The value is ``odd_codes(w / scale) * scale / 2``; a weight on a threshold, such as zero, takes the code above. The
    gradient is LSQ's, straight through the rounding, for ``|w| < 2^(b - 1) scale``, where the interval of the outermost
    code ends: half a step farther out than its value.

    With ``spec.centered`` the mean of the weights that share a scale is subtracted first, and the gradient passes
    through that too, so that it sums to zero over them. That is half of AQD's standardisation.

    Deviations: as in LSQ (:class:`~.lsq.LSQQuantizer`) there is no gradient factor, and the first scale comes from any
    calibration method. AQD standardises weights over the whole tensor and learns where to clip them; here each channel
    learns its scale.

    Args:
        spec: spec of a weight with :data:`~aqdet.quantization.spec.ODD_MAX_BITS` bits at most.
        num_channels: see :class:`Quantizer`.
    """

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__(spec, num_channels)
        self.scale = nn.Parameter(torch.ones(self.num_scales))

    def _set_range(self, statistics: Statistics, method: str) -> None:
        """Sets ``scale`` in place.

        ``"mse"`` searches the outermost value for the least squared error; with ``"minmax"`` and ``"percentile"`` it is
        the largest value, or its quantile; ``"mean"`` is LSQ's formula, ``2 mean|x| / sqrt(2^(b - 1))``. See
        :func:`~aqdet.quantization.observer.initial_scale`. A channel of zeros, which no code is near, gets the
        smallest scale of the others.
        """
        if self.spec.centered:
            values, counts = statistics.values, statistics.counts
            mean = (values * counts).sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True).clamp(min=1)
            statistics = dataclasses.replace(statistics, values=values - mean)
        largest = 2**self.spec.num_bits - 1
        if method == "mean":
            half = 2 ** (self.spec.num_bits - 1)
            scale = initial_scale(statistics, -half, half, method)
        elif method == "mse":
            num_bits = self.spec.num_bits
            scale = by_parts(lambda v, c: _search_scale(v, c, num_bits), statistics.values, statistics.counts)
        else:
            scale = 2 * initial_scale(statistics, -largest, largest, method)
        is_zero = (statistics.values == 0).all(dim=1)
        if is_zero.any() and not is_zero.all():
            scale[is_zero] = scale[~is_zero].min()
        self.scale.copy_(scale)

    def broadcast_scale(self, x: Tensor) -> Tensor:
        """Returns the scale as it acts, floored, so that it broadcasts against ``x``; differentiable."""
        return broadcast_scale(floor_scale(self.scale), x)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.fake_quantize`."""
        return apply(_FakeQuantizeOdd, x, self.broadcast_scale(x), self.spec)

    @torch.no_grad()
    def to_integer(self, x: Tensor) -> IntegerTensor:
        """See :meth:`Quantizer.to_integer`; codes are odd and take ``num_bits + 1`` bits as they stand."""
        scale = self.broadcast_scale(x)
        codes = odd_codes(prepared(x, self.spec) / scale, self.spec.num_bits)
        return IntegerTensor(codes.to(torch.int32), scale / 2, 0)


def _search_scale(values: Tensor, counts: Tensor, num_bits: int) -> Tensor:
    """Finds the scale of least squared error for each channel; 1 where every value is zero."""
    magnitude = values.abs().amax(dim=1)
    outermost = (2**num_bits - 1) / 2

    def scale_of(fraction: Tensor) -> Tensor:
        return (magnitude * (fraction / outermost)).clamp(min=SCALE_EPS)

    def errors(fraction: Tensor) -> Tensor:
        scale = scale_of(fraction)[:, None]
        error = odd_codes(values / scale, num_bits).mul_(scale / 2).sub_(values)
        return error.square_().mul_(counts).sum(dim=1)

    scale = scale_of(search_fractions(errors, magnitude))
    return torch.where(scale > SCALE_EPS, scale, torch.ones_like(scale))
