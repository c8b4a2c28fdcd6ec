"""The machine of a measurement."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

CPU_LEVEL = "AQDET_CPU_LEVEL"
"""Variable of the environment with the processor that tools/experiments/older_cpu.py makes this one look like."""
_VNNI_FLAGS = ("avx512_vnni", "avx_vnni")


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine of a measurement.

    Attributes:
        processor: The name of the processor's model.
        cores: The number of cores.
        vnni: The instructions that add products of 8-bit integers in int32; empty if there are none.
        level: The instructions that newer ones are hidden beside, such as "avx2"; "" if none are hidden.
    """

    processor: str
    cores: int
    vnni: tuple[str, ...]
    level: str = ""

    @classmethod
    def here(cls, cpuinfo: str = "/proc/cpuinfo") -> Machine:
        """Returns the machine that this process runs on, as ``/proc/cpuinfo`` and :data:`CPU_LEVEL` describe it."""
        text = Path(cpuinfo).read_text(encoding="utf-8") if os.path.exists(cpuinfo) else ""
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        flags = fields.get("flags", "").split()
        name = fields.get("model name") or platform.processor() or platform.machine()
        level = os.environ.get(CPU_LEVEL, "")
        vnni = () if level else tuple(flag for flag in _VNNI_FLAGS if flag in flags)
        return cls(name, os.cpu_count() or 1, vnni, level)

    def __str__(self) -> str:
        vnni = f"VNNI ({', '.join(self.vnni)})" if self.vnni else "no VNNI"
        level = f" (newer instructions than {self.level.upper()} hidden)" if self.level else ""
        return f"{self.processor}, {platform.machine()}, {self.cores} cores, {vnni}{level}"
