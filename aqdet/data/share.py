"""Splits by share: an image's name alone decides to which part of a dataset it belongs."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import unicodedata
from typing import Any

__all__ = ["Share"]

_PARTS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Share:
    """
    A part of a dataset's images, drawn by a hash of each image's name and a seed.

    An image stays in its part whatever other images come or go.

    Attributes:
        start, end: limits of the hashes of the part's images, ``[start, end)``, in millionths of the dataset.
        seed: seed of the draw.
    """

    start: int
    end: int
    seed: int = 0

    @classmethod
    def parse(cls, value: Any, seed: int = 0) -> Share:
        """
        Reads a share as a config gives it.

        Args:
            value: ``0.8`` for the first 80 % of the draw, ``-0.2`` for the last 20 %, which ``0.8`` leaves, and
                ``[0.7, 0.9]`` for the part between these limits.
            seed: seed of the draw.

        Raises:
            ValueError: if the value is none of these.
        """
        ends = list(value) if isinstance(value, list | tuple) else [0, value]
        if len(ends) == 2 and all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
            if ends[0] == 0 and -1 < ends[1] < 0:
                ends = [1 + ends[1], 1]
            if all(map(math.isfinite, ends)) and 0 <= ends[0] < ends[1] <= 1 and ends != [0, 1]:
                return cls(round(ends[0] * _PARTS), round(ends[1] * _PARTS), seed)
        raise ValueError(
            "must be a share as 0.8, -0.2 for the 0.2 that 0.8 leaves, or [0.7, 0.9] for what lies between, "
            f"got {value!r}"
        )

    def takes(self, file_name: str) -> bool:
        """Returns whether an image is in this part; `file_name` is relative to the image root."""
        name = unicodedata.normalize("NFC", file_name.replace("\\", "/"))
        text = f"{self.seed} {name}".encode("utf-8", "surrogatepass")
        place = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") * _PARTS >> 64
        return self.start <= place < self.end

    def __str__(self) -> str:
        return f"{self.start / _PARTS:g} to {self.end / _PARTS:g} of seed {self.seed}"
