"""Histograms of the values that quantizers read, with their quantized values on the axis, and the clipped shares."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import output_first
from ..quantization import Quantizer, QuantSpec, quantizers
from ..quantization.functional import SCALE_EPS, broadcast_scale
from ..quantization.methods.lsqodd import prepared

NUM_BINS = 96
# Share of the quantization range that is shown on each side of it.
_MARGIN = 0.25
# Distance from the range, in steps, below which a value lies on its end and the quotient is only rounded.
_TOLERANCE = 1e-4
# Attribute of a quantizer in its layer -> index of the argument of the layer's forward that it reads.
_ARGUMENT = {"input_quantizer": 0, "quantizer": 0, "x_quantizer": 0, "y_quantizer": 1}


@dataclasses.dataclass(frozen=True)
class SiteHistogram:
    """Histogram of the values that one quantizer reads.

    Attributes:
        name: The name of the quantizer in the model.
        spec: The quantizer's spec.
        unit: ``"steps"`` if values are divided by their scale, so that the quantized values are integers. Methods
            without a uniform grid have ``"values"``; per channel these are divided by the largest quantized value of
            their channel.
        edges: ``(NUM_BINS + 1,)``, the ends of equal bins, in the unit.
        counts: ``(NUM_BINS,)``; values outside the edges are in the first and the last bin.
        quantized: The quantized values, in the unit; empty if there are too many to name.
        used: The number of quantized values that occur; None if it is not known.
        below, above: The shares of values outside the range of the quantized ones, which are clipped; None for a method
            without a uniform grid, where no such range exists.
    """

    name: str
    spec: QuantSpec
    unit: str
    edges: np.ndarray
    counts: np.ndarray
    quantized: np.ndarray
    used: int | None
    below: float | None
    above: float | None


class _Counter:
    """Adds up tensors that one calibrated quantizer reads."""

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        self._quantizer = quantizer
        self._name = name
        self._counts = torch.zeros(NUM_BINS, dtype=torch.int64)
        self._range: tuple[float, float] | None = None
        self._codes: Tensor | None = None
        self._quantized = np.empty(0)
        self._below = self._above = 0

    def add(self, x: Tensor) -> None:
        """Counts the values of ``x``, which has any shape; channels of weights are axis 0.

        Raises:
            ValueError: If a value is not finite, with the quantizer's name.
        """
        if x.numel() == 0:
            return
        x = x.detach().float()
        if not torch.isfinite(x).all():
            raise ValueError(f"{self._name} reads values that are not finite")
        grid = self._quantizer.grid()
        if grid is not None:
            x = x / broadcast_scale(grid.scale.detach(), x)
            low, high = float(grid.quant_min), float(grid.quant_max)
            self._below += int((x < low - _TOLERANCE).sum())
            self._above += int((x > high + _TOLERANCE).sum())
            # As functional.quantize does, from the quotient that is already there.
            codes = (x.clamp(low, high).round_() - low).long().flatten()
            codes = torch.bincount(codes, minlength=grid.quant_max - grid.quant_min + 1).cpu()
            self._codes = codes if self._codes is None else self._codes + codes
        else:
            x, quantized = self._in_own_unit(x)
            self._quantized = np.union1d(self._quantized, quantized)
            low, high = float(quantized.min()), float(quantized.max())
        if self._range is None:
            margin = _MARGIN * ((high - low) or 1.0)
            self._range = (low - margin, high + margin)
        start, end = self._range
        bins = ((x - start) * (NUM_BINS / (end - start))).floor_().clamp_(0, NUM_BINS - 1)
        self._counts += torch.bincount(bins.long().flatten(), minlength=NUM_BINS).cpu()

    def _in_own_unit(self, x: Tensor) -> tuple[Tensor, np.ndarray]:
        """Returns the values that a quantizer without a grid reads, and its distinct quantized values."""
        quantized = self._quantizer.fake_quantize(x).detach()
        x = prepared(x, self._quantizer.spec)  # without a mean that the quantizer subtracts
        if self._quantizer.spec.per_channel:
            unit = broadcast_scale(quantized.abs().flatten(1).amax(dim=1).clamp(min=SCALE_EPS), x)
            x, quantized = x / unit, quantized / unit
        # Values that differ by rounding, relative to the largest, are one.
        values = quantized.double().cpu().numpy()
        largest = float(np.abs(values).max()) or 1.0
        return x, np.unique(np.round(values / largest, 5)) * largest

    def result(self) -> SiteHistogram | None:
        """Returns the histogram, or None if nothing was counted."""
        total = int(self._counts.sum())
        if total == 0 or self._range is None:
            return None
        spec, grid = self._quantizer.spec, self._quantizer.grid()
        quantized, used = self._quantized, None
        below = above = None
        if grid is not None:
            assert self._codes is not None
            quantized = np.arange(grid.quant_min, grid.quant_max + 1, dtype=np.float64)
            used = int((self._codes > 0).sum())
            below, above = self._below / total, self._above / total
        elif len(quantized) <= 2**spec.num_bits:
            used = len(quantized)
        else:
            quantized = np.empty(0)  # They differ from channel to channel.
        edges = np.linspace(*self._range, NUM_BINS + 1)
        unit = "steps" if grid is not None else "values"
        return SiteHistogram(self._name, spec, unit, edges, self._counts.numpy(), quantized, used, below, above)


@torch.no_grad()
def weight_histograms(model: nn.Module) -> dict[str, SiteHistogram]:
    """Makes a histogram for each layer with a calibrated weight quantizer, by the quantizer's name."""
    found = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(quantizer, Quantizer) and quantizer.is_active:
            counter = _Counter(quantizer, f"{name}.weight_quantizer")
            counter.add(output_first(module))
            histogram = counter.result()
            if histogram is not None:
                found[histogram.name] = histogram
    return found


@torch.no_grad()
def activation_histograms(model: nn.Module, run: Callable[[], object]) -> dict[str, SiteHistogram]:
    """Makes a histogram for each calibrated activation quantizer that ``run`` reaches, by the quantizer's name.

    An unsigned quantizer of a sum also does the sum's ReLU, so that the values that it reads may be negative.

    Args:
        model: The model, in evaluation mode to see the detector that ships.
        run: A function that forwards some batches through the model.
    """
    owners = {quantizer: name for name, quantizer in quantizers(model) if quantizer.is_active}
    counters: dict[str, _Counter] = {}
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            for attribute, index in _ARGUMENT.items():
                quantizer = getattr(module, attribute, None)
                if isinstance(quantizer, Quantizer) and quantizer in owners:
                    name = owners[quantizer]
                    counters[name] = _Counter(quantizer, name)
                    stack.enter_context(_reading(module, counters[name], index))
        run()
    results = {name: counter.result() for name, counter in counters.items()}
    return {name: histogram for name, histogram in results.items() if histogram is not None}


@contextlib.contextmanager
def _reading(module: nn.Module, counter: _Counter, index: int) -> Iterator[None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        counter.add(arguments[index])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
