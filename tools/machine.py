"""The machine of a measurement."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

_VNNI_FLAGS = ("avx512_vnni", "avx_vnni")


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine of a measurement.

    Attributes:
        processor: The name of the processor's model.
        cores: The number of cores.
        vnni: The instructions that add products of 8-bit integers in int32; empty if there are none.
    """

    processor: str
    cores: int
    vnni: tuple[str, ...]

    @classmethod
    def here(cls, cpuinfo: str = "/proc/cpuinfo") -> Machine:
        """Returns the machine that this process runs on, as ``/proc/cpuinfo`` describes it."""
        text = Path(cpuinfo).read_text(encoding="utf-8") if os.path.exists(cpuinfo) else ""
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        flags = fields.get("flags", "").split()
        name = fields.get("model name") or platform.processor() or platform.machine()
        return cls(name, os.cpu_count() or 1, tuple(flag for flag in _VNNI_FLAGS if flag in flags))

    def __str__(self) -> str:
        vnni = f"VNNI ({', '.join(self.vnni)})" if self.vnni else "no VNNI"
        return f"{self.processor}, {platform.machine()}, {self.cores} cores, {vnni}"
