"""
Checks of segmentations, as a training of masks reads them: polygons, and masks as run lengths (RLE).

Run lengths count pixels of 0 and of 1 in turn, down the columns from the upper left. Their text is COCO's, with five
bits of a number in a character. Coordinates are in pixels from the image's upper left corner.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .findings import Report
from .values import all_finite, box_of_polygons

__all__ = ["check_segmentation", "crosses_itself", "is_polygons", "is_rle", "run_lengths"]

# Pixels that a polygon may reach outside its image, and that a side of its box may differ from the object's.
EDGE = 1.0
APART = 2.0
# The same tolerance as a share of the object's box.
SHARE_APART = 0.1
_PAIRS = 2**22
"""Number of pairs of sides that are compared at once."""


def is_polygons(value: Any) -> bool:
    """Returns whether a value is a list of polygons ``x1, y1, x2, y2, x3, y3, ...`` of finite numbers."""
    return isinstance(value, list) and all(
        isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all_finite(p) for p in value
    )


def is_rle(value: Any) -> bool:
    """Returns whether a value has the fields of run lengths; their content is not checked."""
    if not isinstance(value, dict):
        return False
    counts, size = value.get("counts"), value.get("size")
    sized = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    return isinstance(counts, str | list) and sized


def check_segmentation(
    report: Report, place: tuple[str, str], value: Any, box: list[float], size: tuple[int, int] | None
) -> Any:
    """
    Checks the segmentation of an object whose box is usable.

    Args:
        report: receives the findings.
        place: (file, record) for the report.
        value: the segmentation, as the file has it; not empty.
        box: x, y, width, height of the object, within its image.
        size: width and height of the image; None if not known.

    Returns:
        the segmentation to use; None if it shows nothing of the object.
    """
    if is_rle(value):
        found = _check_rle(report, place, value, size)
    elif isinstance(value, list) and all(_is_short(polygon) or is_polygons([polygon]) for polygon in value):
        found = _check_polygons(report, place, value, size)
    else:
        report.add("segmentation-malformed", *place, "segmentation", value)
        return None
    if found is None:
        return None
    usable, extent = found
    ends, object_ends = _ends(extent), _ends(box)
    allowed = [max(APART, SHARE_APART * side) for side in box[2:]] * 2
    if any(abs(a - b) > limit for a, b, limit in zip(ends, object_ends, allowed, strict=True)):
        shown = [round(float(number), 1) for number in extent]
        report.add("segmentation-box", *place, "segmentation", f"in {json.dumps(shown)}, bbox is {json.dumps(box)}")
    return usable


def _is_short(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) in (0, 2, 4) and all_finite(polygon)


def _ends(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def _check_rle(
    report: Report, place: tuple[str, str], value: dict[str, Any], size: tuple[int, int] | None
) -> tuple[Any, list[float]] | None:
    height, width = value["size"]
    if size is not None and (width, height) != size:
        shown = f"[{height}, {width}], the image's is [{size[1]}, {size[0]}]"
        report.add("rle-size", *place, "segmentation.size", shown)
        return None
    counts = run_lengths(value["counts"])
    if counts is None or sum(counts) != height * width:
        total = "no run lengths" if counts is None else f"{sum(counts)} pixels, not {height * width}"
        report.add("rle-malformed", *place, "segmentation.counts", total)
        return None
    ends = np.cumsum(np.array(counts, dtype=np.int64))
    first, last = ends[0::2][: len(ends) // 2], ends[1::2] - 1  # the first and the last pixel of each run of ones
    first, last = first[last >= first], last[last >= first]
    if not len(first):
        report.add("segmentation-empty", *place, "segmentation", "RLE without a pixel")
        return None
    over_columns = bool(np.any(first // height != last // height))
    top = 0 if over_columns else int(np.min(first % height))
    bottom = height if over_columns else int(np.max(last % height)) + 1
    left, right = int(first[0] // height), int(last[-1] // height) + 1
    return value, [left, top, right - left, bottom - top]


def run_lengths(counts: str | list[Any]) -> list[int] | None:
    """
    Returns the run lengths of a mask.

    Args:
        counts: a list of numbers, or COCO's text of them. A character less 48 has five bits of a number, the lowest
            ones first, and a sixth bit that says whether more follow; the highest bit is the sign. From the fourth
            number on, a number is the difference from the one before last.

    Returns:
        the numbers, or None if there are none, some are negative, or the text is not of that form.
    """
    if isinstance(counts, list):
        numbers = counts if all(type(number) is int for number in counts) else []
    else:
        numbers, number, shift = [], 0, 0
        for character in counts:
            bits = ord(character) - 48
            if not 0 <= bits < 64:
                return None
            number |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                if bits & 16:
                    number -= 1 << shift
                numbers.append(number + (numbers[-2] if len(numbers) > 2 else 0))
                number, shift = 0, 0
        if shift:
            return None
    return numbers if numbers and min(numbers) >= 0 else None


def _check_polygons(
    report: Report, place: tuple[str, str], value: list[list[float]], size: tuple[int, int] | None
) -> tuple[Any, list[float]] | None:
    with_area = [polygon for polygon in value if not _is_short(polygon) and _has_area(polygon)]
    if not with_area:
        report.add("segmentation-empty", *place, "segmentation", value)
        return None
    if len(with_area) < len(value):
        report.add("polygon-empty", *place, "segmentation", f"{len(value) - len(with_area)} of {len(value)} polygons")
    usable = with_area
    if size is not None:
        x, y, right, bottom = _ends(box_of_polygons(usable))
        over = max(-x, -y, right - size[0], bottom - size[1])
        if over > EDGE:
            clipped = [_clipped(polygon, size) for polygon in usable]
            usable = [polygon for polygon in clipped if len(polygon) >= 6 and _has_area(polygon)]
            kind = "segmentation-clipped" if usable else "segmentation-outside"
            shown = json.dumps([round(float(number), 1) for number in (x, y, right - x, bottom - y)])
            report.add(kind, *place, "segmentation", f"in {shown}, the image is {size[0]}x{size[1]}")
            if not usable:
                return None
    crossing = sum(map(crosses_itself, usable))
    if crossing:
        report.add("polygon-crossing", *place, "segmentation", f"{crossing} of {len(usable)} polygons")
    return usable, box_of_polygons(usable)


def _corners(polygon: list[float]) -> np.ndarray:
    """Returns the corners, ``(N, 2)``, without those that repeat the one before."""
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    return points[np.any(points != np.roll(points, 1, axis=0), axis=1)]


def _has_area(polygon: list[float]) -> bool:
    """Returns whether the corners do not all lie on one line; a figure of eight has area."""
    points = _corners(polygon)
    if len(points) < 3:
        return False
    away = points - points[0]
    farthest = away[np.argmax((away**2).sum(axis=1))]
    length = float(np.hypot(*farthest))
    return bool(np.max(np.abs(away[:, 0] * farthest[1] - away[:, 1] * farthest[0])) > 1e-6 * length)


def _clipped(polygon: list[float], size: tuple[int, int]) -> list[float]:
    """Returns the part of a polygon within an image; parts that are joined outside stay joined along the edge."""
    points = [(x, y) for x, y in zip(polygon[0::2], polygon[1::2], strict=True)]
    for axis, sign, limit in ((0, 1, 0), (0, -1, -size[0]), (1, 1, 0), (1, -1, -size[1])):
        kept: list[tuple[float, float]] = []
        for start, end in zip(points, points[1:] + points[:1], strict=True):
            inside = sign * start[axis] >= limit
            if inside:
                kept.append(start)
            if inside != (sign * end[axis] >= limit):
                share = (sign * limit - start[axis]) / (end[axis] - start[axis])
                other = start[1 - axis] + share * (end[1 - axis] - start[1 - axis])
                edge = float(sign * limit)
                kept.append((edge, other) if axis == 0 else (other, edge))
        points = kept
    return [number for point in points for number in point]


def crosses_itself(polygon: list[float]) -> bool:
    """Returns whether two sides of a polygon cross; sides that only touch do not."""
    start = _corners(polygon)
    end = np.roll(start, -1, axis=0)
    rows = max(_PAIRS // max(len(start), 1), 1)
    return any(
        np.any(
            (
                _turns(start[i : i + rows], end[i : i + rows], start)
                * _turns(start[i : i + rows], end[i : i + rows], end)
                < 0
            )
            & (_turns(start, end, start[i : i + rows]) * _turns(start, end, end[i : i + rows]) < 0).T
        )
        for i in range(0, len(start), rows)
    )


def _turns(start: np.ndarray, end: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Returns 1, -1 or 0 for each point to the left of, to the right of or on each side's line: ``(sides, points)``."""
    side = (end - start)[:, None]
    to = points[None] - start[:, None]
    return np.sign(side[..., 0] * to[..., 1] - side[..., 1] * to[..., 0])
