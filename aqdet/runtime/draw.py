"""Drawing of detections into an image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .decode import Detections

# Neighbours in this sequence of hues are far apart, for any number of classes.
_GOLDEN_RATIO = 0.618034
_OPACITY = 0.45
"""Share of a mask's colour in its pixels."""


def draw(image: np.ndarray, detections: Detections, classes: Sequence[str]) -> np.ndarray:
    """Returns a copy of a BGR image ``(H, W, 3)`` uint8 with each box, its class and score; the best ones on top.

    Where there are masks, their pixels have a part of the colour of their class.
    """
    rgb = np.ascontiguousarray(image[:, :, ::-1])
    if detections.masks is not None:
        for index in reversed(range(len(detections))):
            mask = detections.masks[index]
            tint = np.array(_colour(int(detections.classes[index])))
            rgb[mask] = np.round((1 - _OPACITY) * rgb[mask] + _OPACITY * tint).astype(np.uint8)
    canvas = Image.fromarray(rgb)
    pen = ImageDraw.Draw(canvas)
    unit = max(min(image.shape[:2]) / 500, 0.6)
    font = ImageFont.load_default(15 * unit)
    for index in reversed(range(len(detections))):
        name, score = classes[detections.classes[index]], detections.scores[index]
        # Pillow refuses corners in the wrong order, which rounding can cause in a thin box.
        x1, y1, x2, y2 = (round(float(edge)) for edge in detections.boxes[index])
        colour = _colour(int(detections.classes[index]))
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=max(round(2 * unit), 1))
        text = f"{name} {score:.2f}"
        _, _, right, bottom = (round(edge) for edge in pen.textbbox((0, 0), text, font=font))
        y = max(y1 - bottom, 0)
        pen.rectangle((x1, y, x1 + right, y + bottom), fill=colour)
        pen.text((x1, y), text, fill=(0, 0, 0), font=font)
    return np.ascontiguousarray(np.asarray(canvas)[:, :, ::-1])


def _colour(cls: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(cls * _GOLDEN_RATIO % 1, 0.7, 1)
    return round(255 * red), round(255 * green), round(255 * blue)
