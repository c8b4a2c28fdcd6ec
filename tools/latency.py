"""Time and memory of several forms of one detector, side by side."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

_Key = TypeVar("_Key", bound=Hashable)

INT16_MAX = 2**15 - 1
_WARM_UP = 3
_PAUSE_SECONDS = 0.1
_MEMORY_LINE = "peak kB:"
_PRINT_PEAK = f"""
for line in open("/proc/self/status"):
    if line.startswith("VmHWM:"):
        print("{_MEMORY_LINE}", line.split()[1])
"""


def saturating(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of the convs whose sums can saturate on x86 without VNNI.

    Such a processor adds two products of a uint8 input and an int8 weight in int16 before they become int32.

    Args:
        layers: Rows of ``detector.json``; convs have ``weight_type``, ``max_input_code``, the largest value of the
            uint8 input, and ``max_weight_code``, the largest absolute weight. Their ``layer`` is called ``path`` in
            older files.
    """
    convs = [row for row in layers if row["kind"] == "conv" and row["weight_type"] == "int8"]
    wide = [
        row.get("layer") or row["path"]
        for row in convs
        if 2 * row["max_input_code"] * row["max_weight_code"] > INT16_MAX
    ]
    return list(dict.fromkeys(wide))  # once, since a head's conv has a row for each level


@dataclasses.dataclass(frozen=True)
class Times:
    """The seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def speed_up(self, other: Times) -> tuple[float, float, float]:
        """Returns how many times as fast as ``other`` it is, within each round: median, lowest, highest."""
        ratios = [theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def interleave(functions: Mapping[_Key, Callable[[], object]], rounds: int) -> dict[_Key, Times]:
    """Times functions in turn, so that a slow moment of the machine hits all of them.

    A pause before each function lets the threads of the one before it go to sleep: ONNX Runtime's threads spin for some
    50 ms on a core that the next function needs. An untimed call follows, since images follow each other in use, too.
    """
    for function in functions.values():
        for _ in range(_WARM_UP):
            function()
    seconds: dict[_Key, list[float]] = {name: [] for name in functions}
    for _ in _shown(rounds):
        for name, function in functions.items():
            time.sleep(_PAUSE_SECONDS)
            function()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def _shown(rounds: int) -> Iterator[int]:
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr)
        yield number
    print(file=sys.stderr)


def peak_memory(code: str, *arguments: str) -> int | None:
    """Returns the largest resident memory in bytes of a new interpreter that runs ``code``; None without Linux.

    Raises:
        RuntimeError: If the code fails, with the last line that it printed.
    """
    if not os.path.exists("/proc/self/status"):
        return None
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + _PRINT_PEAK, *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    line = next(line for line in done.stdout.splitlines() if line.startswith(_MEMORY_LINE))
    return int(line.removeprefix(_MEMORY_LINE)) * 1024
