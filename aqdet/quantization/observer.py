"""Statistics for calibration, and the choice of a first scale from them.

Activations are seen batch by batch, on several ranks. Their observer counts magnitudes in bins of equal
ratio whose edges never move, so that batches and ranks merge by addition and every rank ends with the
same scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .functional import SCALE_EPS, quantize

CALIBRATION_METHODS = ("mse", "minmax", "percentile", "mean")

BINS_PER_OCTAVE = 32
MIN_EXPONENT, MAX_EXPONENT = -30, 20
_NUM_BINS = (MAX_EXPONENT - MIN_EXPONENT) * BINS_PER_OCTAVE
_PERCENTILE = 0.999

SMALLEST_FRACTION, LARGEST_FRACTION = 1e-4, 1.1
"""Ends of the ranges that are searched for the least error, as fractions of the largest value."""
_NUM_COARSE, _NUM_FINE = 100, 28

_PART = 1 << 17
"""Values that are searched at a time on a processor: a few temporary copies of them stay in its cache."""


@dataclasses.dataclass
class Statistics:
    """Weighted samples of the values of one tensor, per channel.

    Attributes:
        values: ``(C, K)`` representative values.
        counts: ``(C, K)`` how often each occurs.
        negative_share: share of all values that were below zero.
    """

    values: Tensor
    counts: Tensor
    negative_share: float


class HistogramObserver:
    """Counts the magnitudes of the values of one tensor, negative and positive apart.

    Resolution is 2^(1/32), i.e. 2.2 %, from 2^-30 to 2^20; smaller magnitudes count as zero, larger ones in
    the last bin.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Adds the values of ``x``, any shape and float dtype."""
        x = x.detach().float().flatten()
        exponent = x.abs().clamp(2.0 ** (MIN_EXPONENT - 1), 2.0**MAX_EXPONENT).log2()
        bins = ((exponent - MIN_EXPONENT) * BINS_PER_OCTAVE).floor().long()
        bins = bins.clamp(-1, _NUM_BINS - 1) + 1  # bin 0: zero
        bins = torch.where(x < 0, bins + _NUM_BINS + 1, bins)
        counts = torch.bincount(bins, minlength=2 * (_NUM_BINS + 1)).double()
        self._counts = counts if self._counts is None else self._counts + counts

    def synchronize(self, device: torch.device) -> None:
        """Sums the counts over the ranks of the default process group; without one, does nothing."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        counts = self._counts
        if counts is None:
            counts = torch.zeros(2 * (_NUM_BINS + 1), dtype=torch.float64)
        counts = counts.to(device)
        dist.all_reduce(counts)
        self._counts = counts if counts.sum() > 0 else None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was observed yet."""
        return self._counts is None

    def statistics(self) -> Statistics:
        """Returns the counts as weighted values (geometric bin centres), ``C = 1``."""
        assert self._counts is not None, "observer saw no data"
        counts = self._counts.cpu()
        centres = torch.arange(_NUM_BINS, dtype=torch.float64) + 0.5
        magnitudes = torch.exp2(centres / BINS_PER_OCTAVE + MIN_EXPONENT)
        magnitudes = torch.cat([torch.zeros(1, dtype=torch.float64), magnitudes])
        values = torch.cat([magnitudes, -magnitudes])
        seen = counts > 0
        negative = counts[_NUM_BINS + 1 :].sum() / counts.sum()
        return Statistics(values[seen][None].float(), counts[seen][None].float(), float(negative))


def tensor_statistics(x: Tensor, per_channel: bool) -> Statistics:
    """Computes the exact statistics of a tensor at hand, e.g. a weight ``(O, ...)``; channels are axis 0."""
    values = x.detach().float().flatten(1) if per_channel and x.dim() > 1 else x.detach().float()
    values = values.reshape(x.shape[0] if per_channel else 1, -1)
    return Statistics(values, torch.ones_like(values), float((values < 0).float().mean()))


def check_method(method: str) -> None:
    """Checks that a calibration method exists.

    Raises:
        ValueError: listing the valid ones.
    """
    if method not in CALIBRATION_METHODS:
        valid = ", ".join(CALIBRATION_METHODS)
        raise ValueError(f"MODEL.QUANT.CALIBRATION.METHOD must be one of {valid}, got {method!r}")


def initial_scale(statistics: Statistics, quant_min: int, quant_max: int, method: str) -> Tensor:
    """Chooses the first step size for the integer range from statistics.

    Args:
        statistics: see :class:`Statistics`.
        method: ``"mse"`` least squared error, see :func:`search_fractions`; ``"minmax"`` the largest value just fits;
            ``"percentile"`` the 0.999 quantile of the magnitude just fits (FQN); ``"mean"``
            ``2 mean|x| / sqrt(quant_max)`` (LSQ, 1902.08153).

    Returns:
        ``(C,)`` float32, positive and finite. Where every value is zero the range becomes [0, 1] or
        [-1, 1], so that a layer that wakes up later is not stuck with a vanishing step.

    Raises:
        ValueError: if the method is unknown.
    """
    check_method(method)
    values, counts = statistics.values, statistics.counts
    if quant_min == 0:
        counts = counts * (values >= 0)
        values = values.clamp(min=0)
    magnitude = values.abs()
    largest = magnitude.amax(dim=1)
    if method == "mse":
        scale = by_parts(lambda v, c: _search_scale(v, c, quant_min, quant_max), values, counts)
    elif method == "minmax":
        scale = largest / quant_max
    elif method == "percentile":
        order = magnitude.argsort(dim=1)
        # Not on a GPU, whose cumsum is not deterministic.
        cumulative = counts.gather(1, order).double().cpu().cumsum(dim=1).to(order.device)
        rank = (cumulative < _PERCENTILE * cumulative[:, -1:]).sum(dim=1, keepdim=True)
        rank = rank.clamp(max=magnitude.shape[1] - 1)
        scale = magnitude.gather(1, order.gather(1, rank))[:, 0] / quant_max
    else:
        mean = (magnitude * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
        scale = 2 * mean / math.sqrt(quant_max)
    return torch.where(scale > SCALE_EPS, scale, torch.full_like(scale, 1 / quant_max))


def search_fractions(errors: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Finds the fraction of the largest value at which the range of least error ends, for each channel.

    The search is geometric, first over four decades, since a few outliers can be a hundred times the values that
    matter, then between the neighbours of the best.

    Args:
        errors: takes fractions ``(C,)`` and returns the errors ``(C,)``.
        like: ``(C,)`` float32, on the device to search on.

    Returns:
        ``(C,)`` float32.
    """
    best, best_error = torch.ones_like(like), torch.full_like(like, math.inf)
    ratio = (LARGEST_FRACTION / SMALLEST_FRACTION) ** (1 / (_NUM_COARSE - 1))
    coarse = torch.logspace(math.log10(SMALLEST_FRACTION), math.log10(LARGEST_FRACTION), _NUM_COARSE)
    fine = torch.logspace(-1, 1, _NUM_FINE, base=ratio)
    for stage in (coarse, fine):
        centre = best.clone()
        for factor in stage.tolist():
            fraction = torch.full_like(best, factor) if stage is coarse else centre * factor
            error = errors(fraction)
            better = error < best_error
            best_error, best = torch.where(better, error, best_error), torch.where(better, fraction, best)
    return best


def by_parts(search: Callable[[Tensor, Tensor], Tensor], values: Tensor, counts: Tensor) -> Tensor:
    """Searches a few channels at a time, which gives the same and takes a processor a fraction of the time.

    Args:
        search: takes the values and counts ``(c, K)`` of some channels and returns what it finds, ``(c,)``.
        values: see :class:`Statistics`.
        counts: likewise.

    Returns:
        ``(C,)``.
    """
    if values.device.type != "cpu":
        return search(values, counts)
    channels = max(1, _PART // values.shape[1])
    parts = zip(values.split(channels), counts.split(channels), strict=True)
    return torch.cat([search(*part) for part in parts])


def _search_scale(values: Tensor, counts: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Finds the scale of least squared quantization error for each channel."""
    largest = values.abs().amax(dim=1)

    def scale_of(fraction: Tensor) -> Tensor:
        return (largest * (fraction / quant_max)).clamp(min=SCALE_EPS)

    def errors(fraction: Tensor) -> Tensor:
        scale = scale_of(fraction)[:, None]
        error = quantize(values, scale, quant_min, quant_max).mul_(scale).sub_(values)
        return error.square_().mul_(counts).sum(dim=1)

    return scale_of(search_fractions(errors, largest))
