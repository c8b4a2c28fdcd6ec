"""The description of a quantizer: method, bit width, signedness, granularity."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import dequantize

MIN_BITS, MAX_BITS = 2, 8
ODD = "lsqodd"
"""The method without a level at zero, which takes one bit too, and makes no difference where there are many."""
ODD_MIN_BITS, ODD_MAX_BITS = 1, 4
_NAME_BYTES = 7
"""How much of a method's name fits into an int64; all of it for the methods that there are."""


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """Description of one quantizer, checked when it is made.

    Attributes:
        quantizer: a name of :data:`aqdet.quantization.build.QUANTIZER_REGISTRY`.
        num_bits: 2 to 8; 1 to 4 for :data:`ODD`.
        role: ``"weight"`` (read from a parameter) or ``"input"`` (an activation).
        signed: whether negative values are represented. Weights are always signed.
        per_channel: one scale for each output channel; weights only.
        centered: whether the mean of the weights that share a scale is subtracted first; for :data:`ODD` only.

    Raises:
        ValueError: for a value outside these.
    """

    quantizer: str
    num_bits: int
    role: str
    signed: bool = True
    per_channel: bool = False
    centered: bool = False

    def __post_init__(self) -> None:
        if self.role not in ("weight", "input"):
            raise ValueError(f"role must be 'weight' or 'input', got {self.role!r}")
        low, high = (ODD_MIN_BITS, ODD_MAX_BITS) if self.quantizer == ODD else (MIN_BITS, MAX_BITS)
        if type(self.num_bits) is not int or not low <= self.num_bits <= high:
            where = f" for {ODD}" if self.quantizer == ODD else ""
            raise ValueError(f"NUM_BITS must be an integer from {low} to {high}{where}, got {self.num_bits!r}")
        if self.role == "weight" and not self.signed:
            raise ValueError("weights are signed: signed=False is for role='input'")
        if self.role == "input" and self.per_channel:
            raise ValueError("per-channel scales are for weights: an integer convolution sums channels")
        if self.centered and (self.quantizer, self.role) != (ODD, "weight"):
            raise ValueError(f"WEIGHT.CENTERED must be False with WEIGHT.QUANTIZER {self.quantizer}: it is for {ODD}")

    def identity(self) -> Tensor:
        """Returns what a checkpoint tells quantizers apart by, as int64 ``(4,)``.

        It is bits, signed, per channel (1) plus centered (2), and name.
        """
        name = int.from_bytes(self.quantizer.encode()[:_NAME_BYTES], "little")
        return torch.tensor([self.num_bits, self.signed, self.per_channel + 2 * self.centered, name])

    @staticmethod
    def fields_of(identity: Tensor) -> dict[str, Any]:
        """Returns the fields of a spec that an :meth:`identity` tells."""
        num_bits, signed, flags, name = identity.tolist()
        text = name.to_bytes(8, "little").rstrip(b"\0").decode(errors="replace")
        return {
            "num_bits": num_bits,
            "signed": bool(signed),
            "per_channel": bool(flags & 1),
            "centered": bool(flags & 2),
            "quantizer": text,
        }


class IntegerTensor(NamedTuple):
    """A quantized tensor as integers: ``value = (codes - zero_point) * scale``, exactly.

    Attributes:
        codes: int32, any shape.
        scale: float32, 0-dim or broadcastable against ``codes``.
        zero_point: the code of zero.
    """

    codes: Tensor
    scale: Tensor
    zero_point: int

    def dequantize(self) -> Tensor:
        """Returns the float32 tensor that these integers stand for."""
        return dequantize(self.codes - self.zero_point, self.scale)
