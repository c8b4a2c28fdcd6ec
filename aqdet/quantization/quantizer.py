"""The quantizer module: what every method shares.

A quantizer goes through three states. New, it refuses to run. Between :meth:`Quantizer.start_observing`
and :meth:`Quantizer.finish_calibration` it passes its input through and collects statistics. Calibrated,
it fake-quantizes; the state is in the checkpoint, so a reload never calibrates again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .functional import RULES, broadcast_scale, fake_quantize, quantize, quantize_to_int8
from .lean.integer import IntegerWeight
from .observer import HistogramObserver, Statistics, tensor_statistics
from .spec import IntegerTensor, QuantSpec


class AffineGrid(NamedTuple):
    """The uniform grid of a ready quantizer: differentiable ``scale``, integer range, gradient rule."""

    scale: Tensor
    quant_min: int
    quant_max: int
    rule: str


class Quantizer(nn.Module):
    """Base of all quantizers.

    A subclass creates its parameters in ``__init__`` with their final shape, and implements
    :meth:`set_range` (first values from statistics), :meth:`grid` (a uniform grid) or, if it has none,
    :meth:`fake_quantize` and :meth:`to_integer`.

    Args:
        spec: what to build.
        num_channels: number of output channels, for per-channel scales.

    Attributes:
        enabled: set to False, the quantizer returns its input unchanged.
        frozen: set to True, a training forward leaves the state as it is calibrated, for methods that change it there.
            Parameters are frozen by ``requires_grad_(False)``.
        path: dotted name in the model, for messages.
        note_codes: set to True where several layers read the result, see :func:`fake_quantize`.
        updates_in_forward: whether a training forward changes the state, so that backward must not repeat it.
    """

    _version = 1
    updates_in_forward = False
    calibrated: Tensor
    num_bits: Tensor
    signed: Tensor
    kind: Tensor

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__()
        self.spec = spec
        self.num_scales = num_channels if spec.per_channel else 1
        self.enabled = True
        self.frozen = False
        self.path = ""
        self.note_codes = False
        self._ready = False
        self._observer: HistogramObserver | None = None
        self._statistics: Statistics | None = None
        self._observing = False
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        self.register_buffer("num_bits", torch.tensor(spec.num_bits))
        self.register_buffer("signed", torch.tensor(spec.signed))
        # What the other buffers do not tell apart: method and granularity, as text.
        kind = spec.quantizer + "/channel" * spec.per_channel
        self.register_buffer("kind", torch.tensor(list(kind.encode().ljust(24))[:24], dtype=torch.uint8))

    @property
    def is_calibrated(self) -> bool:
        """Whether the quantizer can run."""
        return self._ready

    @property
    def is_active(self) -> bool:
        """Whether a forward would quantize: enabled, calibrated and not observing."""
        return self.enabled and self._ready and not self._observing

    @property
    def num_constants(self) -> int:
        """How many numbers the quantizer consists of when shipped."""
        return self.num_scales

    @property
    def is_relu(self) -> bool:
        """Whether ``forward(x)`` is ``forward(relu(x))``, gradients included, as the state is now."""
        if not self.is_active:
            return False
        with torch.no_grad():
            grid = self.fused_grid()
        return grid is not None and grid.rule in RULES and grid.quant_min == 0

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantizes ``x`` (any shape); observes or passes it through in the other states.

        Raises:
            RuntimeError: if the quantizer was never calibrated.
        """
        if not self.enabled:
            return x
        if self._observing:
            self.observe(x)
            return x
        if not self._ready:
            raise RuntimeError(
                f"quantizer '{self.path or type(self).__name__}' is not calibrated: call "
                "aqdet.quantization.calibrate(model, run) or load a calibrated checkpoint first"
            )
        return self.fake_quantize(x)

    # --- calibration ---

    def start_observing(self) -> None:
        """Starts collecting statistics; until :meth:`finish_calibration` the input passes through."""
        self._observing = True
        self._statistics = None
        self._observer = HistogramObserver() if self.spec.role == "input" else None

    def observe(self, x: Tensor) -> None:
        """Adds ``x`` to the statistics. A weight is seen whole, so its first sight is enough.

        Raises:
            ValueError: if ``x`` has values that are not finite.
        """
        if x.numel() == 0:
            return
        if not torch.isfinite(x).all():
            raise ValueError(f"quantizer '{self.path}' saw values that are not finite during calibration")
        if self._observer is not None:
            self._observer.update(x)
        elif self._statistics is None:
            self._statistics = tensor_statistics(x, self.spec.per_channel)

    def stop_observing(self) -> None:
        """Leaves the observing state and forgets the statistics."""
        self._observing = False
        self._observer = None
        self._statistics = None

    def finish_calibration(self, method: str) -> float:
        """Sets the first range from what was observed, over all ranks.

        Args:
            method: see :func:`aqdet.quantization.observer.initial_scale`.

        Returns:
            The share of observed values that were negative.

        Raises:
            RuntimeError: if nothing was observed.
        """
        statistics = self._statistics
        if self._observer is not None:
            self._observer.synchronize(self.calibrated.device)
            if not self._observer.is_empty:
                statistics = self._observer.statistics()
        if statistics is None:
            raise RuntimeError(f"quantizer '{self.path}' saw no data during calibration")
        with torch.no_grad():
            self.set_range(statistics, method)
            self.calibrated.fill_(True)
        self._ready = True
        self.stop_observing()
        return statistics.negative_share

    def set_range(self, statistics: Statistics, method: str) -> None:
        """Sets the parameters from statistics, in place."""
        raise NotImplementedError

    # --- quantization ---

    def grid(self) -> AffineGrid | None:
        """The uniform grid as it stands; None for a method whose codes are not ``round(x / scale)``."""
        return None

    def fused_grid(self) -> AffineGrid | None:
        """The grid that a layer may quantize by itself, gradients included; None if it has to call the module."""
        return self.grid()

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Quantizes and dequantizes ``x``; differentiable."""
        grid = self.grid()
        assert grid is not None
        scale = broadcast_scale(grid.scale, x)
        return fake_quantize(x, scale, grid.quant_min, grid.quant_max, rule=grid.rule, note_codes=self.note_codes)

    @torch.no_grad()
    def to_integer(self, x: Tensor) -> IntegerTensor:
        """The integers behind ``fake_quantize(x)``; dequantizing them gives it back to the bit.

        Raises:
            ValueError: if the method is not uniform, naming the quantizer.
        """
        grid = self.grid()
        if grid is None:
            raise ValueError(
                f"quantizer '{self.path}' ({self.spec.quantizer}) has no uniform integer form: train this layer with "
                "lsq, pact or dorefa for one"
            )
        scale = broadcast_scale(grid.scale, x)
        codes = quantize(x, scale, grid.quant_min, grid.quant_max)
        return IntegerTensor(codes.to(torch.int32), scale.clone(), 0)

    @torch.no_grad()
    def integer_weight(self, x: Tensor, largest: int = 128) -> IntegerWeight | None:
        """The fake-quantized weight ``x`` as int8 codes for integer kernels; None if it has no such form.

        Args:
            x: the weight.
            largest: None also where codes may be larger in magnitude.
        """
        grid = self.fused_grid() if self.is_active else None
        if (
            grid is None
            or grid.rule not in RULES
            or grid.quant_max > 127
            or max(-grid.quant_min, grid.quant_max) > largest
        ):
            return None
        codes = quantize_to_int8(x, broadcast_scale(grid.scale, x), grid.quant_min, grid.quant_max)
        return IntegerWeight(codes, grid.scale.expand(x.shape[0]).contiguous())

    # --- state ---

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for key in ("num_bits", "signed", "kind"):
            stored, own = state_dict.get(prefix + key), getattr(self, key)
            if stored is not None and not torch.equal(stored.to(own.device), own):
                theirs, ours = (
                    bytes(t.tolist()).decode(errors="replace").strip() if key == "kind" else t.item()
                    for t in (stored, own)
                )
                error_msgs.append(
                    f"{prefix}{key} is {theirs} in the checkpoint and {ours} in the model: "
                    "use the config that the checkpoint was trained with, or a float checkpoint"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        keys = [prefix + key for key in (*self._parameters, *self._buffers)]
        if prefix + "calibrated" in state_dict and any(key not in state_dict for key in keys):
            # Calibrated in the file, but by a method with other keys: the range is not there.
            self.calibrated = torch.zeros_like(self.calibrated)
        self._ready = bool(self.calibrated.item())

    def extra_repr(self) -> str:
        """Short description, e.g. ``lsq, 4 bits, unsigned, per_tensor``."""
        spec = self.spec
        sign = "signed" if spec.signed else "unsigned"
        granularity = "per_channel" if spec.per_channel else "per_tensor"
        state = "" if self._ready else ", uncalibrated"
        return f"{spec.quantizer}, {spec.num_bits} bits, {sign}, {granularity}{state}"


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """All quantizers of a model with their dotted names."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def set_quantization(model: nn.Module, enabled: bool) -> None:
    """Switches every quantizer of a model on or off; off, the model computes in float."""
    for _, quantizer in quantizers(model):
        quantizer.enabled = enabled
