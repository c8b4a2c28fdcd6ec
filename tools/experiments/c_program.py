"""Compilation of an exported folder's C program for a processor, and its predictions for an image."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from debian import SECONDS_LIMIT, Command

if TYPE_CHECKING:
    import numpy as np

FLAGS = ("-std=c99", "-Wall", "-Wextra", "-Werror")
# Images from the standard input, the predictions of each to the standard output.
MAIN = """
#include "detector.h"
#include <stdio.h>

static uint8_t image[DETECTOR_HEIGHT * DETECTOR_WIDTH * 3];
static detector_outputs outputs;

int main(void) {
    while (fread(image, sizeof image, 1, stdin) == 1) {
        detector_run(image, &outputs);
        if (fwrite(&outputs, sizeof outputs, 1, stdout) != 1) {
            return 1;
        }
    }
    return 0;
}
"""


def build(source: Path, work: Path, *compiler: str) -> Path:
    """Compiles ``detector.c`` of a folder with a program around it.

    Args:
        source: The folder with ``detector.c`` and ``detector.h``.
        work: The folder for the program, ``detector``.
        compiler: The compiler's name and flags, in addition to :data:`FLAGS`.

    Raises:
        RuntimeError: If it does not compile without warnings, with the compiler's first line.
    """
    (work / "main.c").write_text(MAIN)
    command: Command = [
        *compiler,
        *FLAGS,
        "-I",
        source,
        "-o",
        work / "detector",
        source / "detector.c",
        work / "main.c",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_LIMIT, check=False)
    if done.returncode:
        raise RuntimeError(f"{compiler[0]}: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
    return work / "detector"


def image_size(header: str) -> tuple[int, int]:
    """Returns height and width of the image, from ``detector.h``."""
    height, width = re.search(r"DETECTOR_HEIGHT = (\d+), DETECTOR_WIDTH = (\d+)", header).groups()  # type: ignore[union-attr]
    return int(height), int(width)


def predictions(command: Command, header: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """Runs the program on images ``(N, 3, H, W)``; returns predictions ``(N, C, h, w)`` by name.

    Args:
        command: The command that runs it.
        header: The text of ``detector.h``.
        images: The images, uint8.
    """
    import numpy as np

    data = images.transpose(0, 2, 3, 1).tobytes()
    done = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS_LIMIT, check=True)
    rows = np.frombuffer(done.stdout, "<f4").reshape(len(images), -1)
    values, start = {}, 0
    for name, *sides in re.findall(r"float (\w+)\[.*/\* \((\d+), (\d+), (\d+)\) \*/", header):
        height, width, channels = map(int, sides)
        end = start + math.prod((height, width, channels))
        values[name] = rows[:, start:end].reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
        start = end
    assert start == rows.shape[1], "detector.h does not describe what the program wrote"
    return values
