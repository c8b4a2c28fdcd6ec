"""Batch norm with a quantizer behind it as operators of PyTorch: one pass forward and two backward, on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import functional
from ..kernels import plain
from ..lean.moments import Moments, Reader, by_channel, gathered, own_moments, packed_moments
from ..lean.parts import laid_out_as
from .operators import IS_INTERPRETED, define, recipe_from

_NORM = "Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor mean, Tensor inverse"
_FOLLOWING = "Tensor? step, int low, int high, int mode"
"""What follows the norm, see :data:`MODES`."""

NOTHING, RELU = 0, 1
MODES = {"relu": RELU, "lsq": 2, "pact": 3}
"""Gradient of a ReLU or of the scale of a quantizer that follows -> number by which programs know it."""


def _normalize(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    from . import programs

    out = torch.empty_like(x)
    programs.quantize(x, scale, shift, x.dtype, None, 0, 0, out, relu=relu)
    return out


def _normalize_plainly(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    y = recipe_from(x, scale, shift, x.dtype).compute().to(x.dtype)
    return y.relu_() if relu else y


define(
    "normalize(Tensor x, Tensor scale, Tensor shift, bool relu) -> Tensor",
    _normalize,
    _normalize_plainly,
    lambda x, *_: torch.empty_like(x),
)


def _parts(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    inverse: Tensor,
    step: Tensor | None,
    low: int,
    high: int,
    mode: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradient of the norm's output, the normalized input and the gradient of the quantizer's scale."""
    dstep = scale.new_zeros(())
    grad = grad.float()
    if mode:
        y = recipe_from(x, scale, shift, x.dtype).compute()
        if step is None:
            grad = grad.masked_fill(y <= 0, 0)
        else:
            gradient = "lsq" if mode == MODES["lsq"] else "pact"
            grad, dstep = functional.scale_gradients(grad, y, step, low, high, gradient)
        grad = grad.to(x.dtype).float()
    return grad, (x.float() - by_channel(mean)) * by_channel(inverse), dstep


def _sums(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    from . import norm_programs

    return norm_programs.sums(laid_out_as(grad, x), x, *args)


def _sums_plainly(*args: Any) -> Tensor:
    grad, centred, dstep = _parts(*args)
    axes = (0, 2, 3)
    return torch.cat([grad.sum(axes), (grad * centred).sum(axes), dstep.view(1)])


define(
    f"norm_sums({_NORM}, {_FOLLOWING}) -> Tensor",
    _sums,
    _sums_plainly,
    lambda grad, x, scale, *_: scale.new_empty(2 * len(scale) + 1),
)


def _input(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    from . import norm_programs

    out = torch.empty_like(x)
    norm_programs.input_gradient(laid_out_as(grad, x), x, *(*args, out))
    return out


def _input_plainly(*args: Any) -> Tensor:
    *shared, totals, count = args
    x, scale = shared[1:3]
    grad, centred, _ = _parts(*shared)
    number = x.numel() // x.shape[1] if count is None else count
    first, second = (by_channel(total) for total in (totals[: 2 * len(scale)] / number).view(2, -1))
    return (by_channel(scale) * (grad - first - centred * second)).to(x.dtype)


define(
    f"norm_input({_NORM}, {_FOLLOWING}, Tensor totals, Tensor? count) -> Tensor",
    _input,
    _input_plainly,
    lambda grad, x, *_: torch.empty_like(x),
)


def _moments(*args: Any) -> tuple[Tensor, Tensor]:
    from . import norm_programs

    weight = args[4]
    out, count = weight.new_empty(4, len(weight)), weight.new_empty(())
    norm_programs.moments(*(*args, out, count))
    return out, count


def _moments_plainly(
    means: Tensor,
    variances: Tensor,
    counts: Tensor | None,
    number: int,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    mean, var, count = means[0], variances[0], weight.new_tensor(float(number))
    if counts is not None:
        count = counts.sum()
        mean = (means * counts).sum(dim=0) / count
        var = ((variances + (means - mean).square()) * counts).sum(dim=0) / count
    if running_mean is not None and running_var is not None and tracked is not None:
        unbiased = var * (count / (count - 1).clamp(min=1))
        running_mean.copy_(momentum * mean + (1 - momentum) * running_mean)
        running_var.copy_(momentum * unbiased + (1 - momentum) * running_var)
        tracked.add_(1)
    inverse = (var + eps).rsqrt()
    scale = weight * inverse
    return torch.stack([mean, inverse, scale, bias - mean * scale]), count


define(
    "norm_moments(Tensor means, Tensor variances, Tensor? counts, int number, Tensor weight, Tensor bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? tracked, float momentum, float eps) "
    "-> (Tensor, Tensor)",
    _moments,
    _moments_plainly,
    lambda *args: (args[4].new_empty(4, len(args[4])), args[4].new_empty(())),
)


def _can_run(x: Tensor) -> bool:
    """Returns whether the kernels can work on a tensor: on a GPU, with channels in its second axis, without gaps."""
    is_here = x.is_cuda or IS_INTERPRETED
    return is_here and x.dim() == 4 and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))


def normalized(x: Tensor, moments: Moments, relu: bool) -> Tensor:
    """Computes :func:`aqdet.quantization.lean.moments.normalized`."""
    if not _can_run(x):
        return plain("normalized")(x, moments, relu)
    return torch.ops.aqdet.normalize(x, moments.scale, moments.shift, relu)


def norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, moments: Moments, eps: float, group: Any, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes :func:`aqdet.quantization.lean.moments.norm_gradients`."""
    if not _can_run(x):
        return plain("norm_gradients")(grad, x, weight, moments, eps, group, relu)
    return _gradients(grad, x, moments, group, None, 0, 0, RELU if relu else NOTHING)[:3]


def quantized_norm_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    moments: Moments,
    eps: float,
    group: Any,
    step: Tensor,
    quant_min: int,
    quant_max: int,
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes :func:`aqdet.quantization.lean.moments.quantized_norm_gradients`."""
    if not _can_run(x):
        shared = grad, x, weight, moments, eps, group
        return plain("quantized_norm_gradients")(*shared, step, quant_min, quant_max, gradient)
    return _gradients(grad, x, moments, group, step, quant_min, quant_max, MODES[gradient])


def _gradients(
    grad: Tensor, x: Tensor, moments: Moments, group: Any, step: Tensor | None, low: int, high: int, mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, inverse, scale, shift, count = moments
    shared = grad, x, scale, shift, mean, inverse, step, low, high, mode
    sums = totals = torch.ops.aqdet.norm_sums(*shared)
    if group is not None:
        totals = sums.clone()
        dist.all_reduce(totals, group=group)
    dx = torch.ops.aqdet.norm_input(*shared, totals, None if group is None else count)
    dbias, dweight, dstep = sums.split([len(scale), len(scale), 1])
    return dx, dweight, dbias, dstep.view(())


def _following(reader: Reader | None) -> tuple[Tensor | None, int, int, int]:
    return (None, 0, 0, NOTHING) if reader is None else (*reader[:3], MODES[reader.gradient])


def norm_sums(grad: Tensor, x: Tensor, moments: Moments, reader: Reader | None = None) -> Tensor:
    """Computes :func:`aqdet.quantization.lean.moments.norm_sums`."""
    if not _can_run(x):
        return plain("norm_sums")(grad, x, moments, reader)
    mean, inverse, scale, shift, _ = moments
    return torch.ops.aqdet.norm_sums(grad, x, scale, shift, mean, inverse, *_following(reader))


def norm_input(grad: Tensor, x: Tensor, moments: Moments, totals: Tensor, reader: Reader | None = None) -> Tensor:
    """Computes :func:`aqdet.quantization.lean.moments.norm_input`."""
    if not _can_run(x):
        return plain("norm_input")(grad, x, moments, totals, reader)
    mean, inverse, scale, shift, count = moments
    following = _following(reader)
    return torch.ops.aqdet.norm_input(grad, x, scale, shift, mean, inverse, *following, totals, count)


def batch_moments(
    x: Tensor,
    norm: nn.BatchNorm2d,
    weight: Tensor,
    bias: Tensor,
    group: Any,
    is_first: bool,
    rows: Tensor | None = None,
) -> Moments:
    """Computes :func:`aqdet.quantization.lean.moments.batch_moments`."""
    if not _can_run(x):
        return plain("batch_moments")(x, norm, weight, bias, group, is_first, rows)
    channels, counts = x.shape[1], None
    if group is None:
        means, variances = (values.view(1, -1) for values in own_moments(x, norm, False))
    else:
        rows = gathered(packed_moments(x, norm), group) if rows is None else rows
        means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
    state = (norm.running_mean, norm.running_var, norm.num_batches_tracked) if is_first else (None, None, None)
    numbers = x.numel() // channels, weight, bias
    out, count = torch.ops.aqdet.norm_moments(means, variances, counts, *numbers, *state, norm.momentum, norm.eps)
    mean, inverse, scale, shift = out
    return Moments(mean, inverse, scale, shift, None if group is None else count)
