"""
Outlines of objects as labelling tools draw them, and COCO's box and polygons of each.

Coordinates are continuous, in pixels from the image's upper left corner: a pixel has the width 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

__all__ = [
    "MAX_PIXELS",
    "Outline",
    "Point",
    "number",
    "of_corners",
    "of_ellipse",
    "of_mask",
    "of_polygon",
    "of_rotated_box",
    "points_of",
]

Point = tuple[float, float]
# Number of corners of the polygon that replaces an ellipse; it is less than 0.2 % of the axes away from the ellipse.
_CORNERS = 48
# Largest side of an image with masks, in pixels; a file that states a larger one is not believed.
MAX_PIXELS = 2**28


@dataclasses.dataclass(frozen=True)
class Outline:
    """
    The place of an object.

    Attributes:
        box: x, y, width, height in pixels.
        segmentation: polygons as lists of x, y, x, y, ..., or RLE; None for a rectangle.
    """

    box: list[float]
    segmentation: list[list[float]] | dict[str, Any] | None = None


def number(value: Any) -> float:
    """
    Returns a number that is given as such or as text; a whole number becomes an integer.

    Raises:
        ValueError: if the value is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no number")
    try:
        as_float = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is no number") from None
    return int(as_float) if as_float.is_integer() else as_float


def points_of(value: Any) -> list[Point]:
    """
    Returns points that are given as pairs.

    Raises:
        ValueError: if the value is no list of pairs of numbers.
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"points must be a list of pairs, got {value!r}")
    points = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"a point must be two numbers, got {pair!r}")
        points.append((number(pair[0]), number(pair[1])))
    return points


def of_corners(points: Sequence[Point]) -> Outline:
    """Returns the upright rectangle around two or more corners in any order."""
    if len(points) < 2:
        raise ValueError(f"a rectangle needs two corners, got {len(points)}")
    return Outline(_extent(points))


def of_polygon(parts: Iterable[Sequence[Point]]) -> Outline:
    """Returns the outline of an object of one or more polygons."""
    polygons = list(parts)
    if any(len(points) < 3 for points in polygons):
        raise ValueError(f"a polygon needs three points, got {min(map(len, polygons))}")
    flat = [[value for point in points for value in point] for points in polygons]
    return Outline(_extent([point for points in polygons for point in points]), flat)


def of_ellipse(center: Point, radii: Point, angle: float = 0.0) -> Outline:
    """Returns the outline of an ellipse that is turned by an angle in radians."""
    if min(radii) < 0:
        raise ValueError(f"a radius must not be negative, got {min(radii)}")
    cos, sin = math.cos(angle), math.sin(angle)
    half_width = math.hypot(radii[0] * cos, radii[1] * sin)
    half_height = math.hypot(radii[0] * sin, radii[1] * cos)
    box = [center[0] - half_width, center[1] - half_height, 2 * half_width, 2 * half_height]
    polygon = []
    for index in range(_CORNERS):
        turn = 2 * math.pi * index / _CORNERS
        x, y = radii[0] * math.cos(turn), radii[1] * math.sin(turn)
        polygon += [center[0] + x * cos - y * sin, center[1] + x * sin + y * cos]
    return Outline(box, [polygon])


def of_rotated_box(corners: Sequence[Point], degrees: float) -> Outline:
    """Returns a rectangle turned clockwise about its centre; its two corners are those before the turn."""
    (left, top), (right, bottom) = corners
    width, height = right - left, bottom - top
    if not degrees % 360 or width < 0 or height < 0:
        return Outline([left, top, width, height])
    x, y = left + width / 2, top + height / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    turned = [
        (
            x + dx * width / 2 * cos - dy * height / 2 * sin,
            y + dx * width / 2 * sin + dy * height / 2 * cos,
        )
        for dx, dy in signs
    ]
    return of_polygon([turned])


def of_mask(mask: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> Outline:
    """
    Returns the outline of a mask of a part of an image.

    Args:
        mask: (H, W), not 0 on the object.
        corner: x and y of its upper left pixel in the image.
        size: width and height of the image.
    """
    left, top = corner
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"a mask in an image of {size[0]}x{size[1]} pixels, {MAX_PIXELS} at most are read")
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise ValueError("the mask is empty")
    if min(corner) < 0 or left + mask.shape[1] > size[0] or top + mask.shape[0] > size[1]:
        raise ValueError(f"a mask of {mask.shape[1]}x{mask.shape[0]} at {corner} is not within {size[0]}x{size[1]}")
    whole = np.zeros(size[::-1], dtype=np.uint8, order="F")
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask != 0
    encoded = coco_mask.encode(whole)
    box = [left + columns[0], top + rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    rle = {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}
    return Outline([int(value) for value in box], rle)


def _extent(points: Sequence[Point]) -> list[float]:
    if not all(math.isfinite(value) for point in points for value in point):
        return [math.nan] * 4
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
