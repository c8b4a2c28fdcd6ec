"""The quantizer module, the base of all methods.

A new quantizer refuses to run. :func:`aqdet.quantization.calibrate` gives it its first range by
:meth:`Quantizer.set_range`; from then on it fake-quantizes. The state is in the checkpoint, so that a reload never
calibrates again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .functional import broadcast_scale, integer_range, quantize, value_dtype
from .kernels import fake_quantize
from .observer import Statistics
from .spec import IntegerTensor, QuantSpec


class AffineGrid(NamedTuple):
    """The uniform grid of a ready quantizer.

    Attributes:
        scale: float32, ``(1,)`` or ``(C,)``, differentiable.
        quant_min, quant_max: integer range.
    """

    scale: Tensor
    quant_min: int
    quant_max: int


class Quantizer(nn.Module):
    """Base of all quantizers.

    A subclass creates its parameters in ``__init__`` with their final shape, and implements
    :meth:`_set_range` (first values from statistics), :meth:`grid` (a uniform grid) or, if it has none,
    :meth:`fake_quantize` and :meth:`to_integer`.

    Args:
        spec: description of the quantizer.
        num_channels: number of output channels, for per-channel scales.

    Attributes:
        gradient: one of :data:`aqdet.quantization.functional.GRADIENTS` if all that the quantizer does is
            :func:`aqdet.quantization.fake_quantize` on its grid; None if it does something else.
        quant_min: smallest code, of a quantizer that has a ``gradient``.
        enabled: False lets the quantizer return its input unchanged.
        frozen: True keeps the state as it is calibrated in a training forward, for methods that change it there.
            Parameters are frozen by ``requires_grad_(False)``.
        name: dotted name in the model, for messages; set by :func:`name_quantizers`.
    """

    _version = 2
    gradient: str | None = None
    quant_min: int
    calibrated: Tensor

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__()
        self.spec = spec
        self.num_scales = num_channels if spec.per_channel else 1
        self.enabled = True
        self.frozen = False
        self.name = ""
        self._ready = False  # the value of the buffer, which a GPU would wait for
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    @property
    def is_calibrated(self) -> bool:
        """Whether the quantizer can run."""
        return self._ready

    @property
    def is_active(self) -> bool:
        """Whether a forward would quantize: enabled and calibrated."""
        return self.enabled and self._ready

    @property
    def num_constants(self) -> int:
        """Number of constants that the quantizer consists of when shipped."""
        return self.num_scales

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantizes ``x``, any shape.

        Raises:
            RuntimeError: if the quantizer was never calibrated.
        """
        if not self.enabled:
            return x
        if not self._ready:
            raise RuntimeError(
                f"quantizer '{self.name or type(self).__name__}' is not calibrated: call "
                "aqdet.quantization.calibrate(model, run), or aqdet.prepare or aqdet.prepare_trainer for a training of "
                "your own, or load a calibrated checkpoint first"
            )
        return self.fake_quantize(x)

    @torch.no_grad()
    def set_range(self, statistics: Statistics, method: str) -> None:
        """Sets the first range, in place; the quantizer is calibrated from then on.

        Args:
            statistics: statistics of the values that it is to quantize.
            method: see :func:`aqdet.quantization.observer.initial_scale`.
        """
        self._set_range(statistics, method)
        self.calibrated.fill_(True)
        self._ready = True

    def _set_range(self, statistics: Statistics, method: str) -> None:
        raise NotImplementedError

    def grid(self) -> AffineGrid | None:
        """Returns the uniform grid as it stands; None for a method whose codes are not ``round(x / scale)``."""
        return None

    def value_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the precision of the quantized values of a tensor, see :func:`.functional.value_dtype`."""
        return value_dtype(dtype, *integer_range(self.spec.num_bits, self.spec.signed))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Quantizes and dequantizes ``x``; differentiable."""
        grid = self.grid()
        assert grid is not None and self.gradient is not None
        scale = broadcast_scale(grid.scale, x)
        return fake_quantize(x, scale, grid.quant_min, grid.quant_max, gradient=self.gradient)

    @torch.no_grad()
    def to_integer(self, x: Tensor) -> IntegerTensor:
        """Returns the integers behind ``fake_quantize(x)``; dequantizing them gives it back to the bit.

        Raises:
            ValueError: if the method is not uniform, naming the quantizer.
        """
        grid = self.grid()
        if grid is None:
            raise ValueError(
                f"quantizer '{self.name}' ({self.spec.quantizer}) has no uniform integer form: train this layer with "
                "lsq, pact or dorefa for one"
            )
        scale = broadcast_scale(grid.scale, x)
        codes = quantize(x, scale, grid.quant_min, grid.quant_max)
        return IntegerTensor(codes.to(torch.int32), scale.clone(), 0)

    # --- state ---

    def get_extra_state(self) -> Tensor:
        """Returns the identity of the quantizer, see :meth:`QuantSpec.identity`.

        It is a tensor since everything that reads a state dict, Detectron2's checkpointer for one, expects tensors.
        """
        return self.spec.identity()

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: a state of another quantizer was refused before, by ``load_state_dict``."""

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
        identity_key = f"{prefix}_extra_state"
        stored = _old_identity(state_dict, prefix)
        if stored:
            state_dict[identity_key] = self.spec.identity()
        elif identity_key in state_dict:
            stored = QuantSpec.fields_of(state_dict[identity_key])
        for field, theirs in stored.items():
            ours = getattr(self.spec, field)
            if theirs != ours:
                error_msgs.append(
                    f"{prefix}{field} is {theirs} in the checkpoint and {ours} in the model: "
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
        """Returns a short description, e.g. ``lsq, 4 bits, unsigned, per_tensor``."""
        spec = self.spec
        sign = "signed" if spec.signed else "unsigned"
        granularity = "per_channel" if spec.per_channel else "per_tensor"
        state = "" if self._ready else ", uncalibrated"
        centered = ", centered" if spec.centered else ""
        return f"{spec.quantizer}, {spec.num_bits} bits, {sign}, {granularity}{centered}{state}"


def _old_identity(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Takes the identity out of a state dict of version 1, which has it in three buffers; empty for another one."""
    num_bits, signed, kind = (state_dict.pop(prefix + key, None) for key in ("num_bits", "signed", "kind"))
    identity: dict[str, Any] = {}
    if num_bits is not None:
        identity["num_bits"] = int(num_bits)
    if signed is not None:
        identity["signed"] = bool(signed)
    if kind is not None:
        name, _, granularity = bytes(kind.tolist()).decode(errors="replace").strip().partition("/")
        identity |= {"quantizer": name, "per_channel": granularity == "channel"}
    return identity


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Yields all quantizers of a model with their dotted names."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def name_quantizers(model: nn.Module) -> None:
    """Tells every quantizer of a model its dotted name, for messages; a model calls it when it is built."""
    for name, quantizer in quantizers(model):
        quantizer.name = name


def set_quantization(model: nn.Module, enabled: bool) -> None:
    """Switches every quantizer of a model on or off; off, the model computes in float."""
    for _, quantizer in quantizers(model):
        quantizer.enabled = enabled
