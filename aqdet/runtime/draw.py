"""Draws detections into an image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

from .decode import Detections

# Neighbours in this sequence of hues are far apart, however many classes there are.
_GOLDEN_RATIO = 0.618034


def draw(image: np.ndarray, detections: Detections, classes: Sequence[str]) -> np.ndarray:
    """A copy of a BGR image ``(H, W, 3)`` uint8 with each box, its class and its score; the surest on top."""
    canvas = np.ascontiguousarray(image).copy()
    unit = max(min(image.shape[:2]) / 500, 0.6)
    thickness = max(round(2 * unit), 1)
    for index in reversed(range(len(detections))):
        name, score = classes[detections.classes[index]], detections.scores[index]
        x1, y1, x2, y2 = (round(float(edge)) for edge in detections.boxes[index])
        colour = _colour(int(detections.classes[index]))
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness)
        text = f"{name} {score:.2f}"
        (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5 * unit, 1)
        bottom = max(y1, height + below)
        cv2.rectangle(canvas, (x1, bottom - height - below), (x1 + width, bottom), colour, -1)
        cv2.putText(canvas, text, (x1, bottom - below), cv2.FONT_HERSHEY_SIMPLEX, 0.5 * unit, (0, 0, 0), 1, cv2.LINE_AA)
    return canvas


def _colour(cls: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(cls * _GOLDEN_RATIO % 1, 0.7, 1)
    return round(255 * blue), round(255 * green), round(255 * red)
