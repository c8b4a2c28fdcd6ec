"""Numbers that annotation files give as numbers, as text, or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .findings import Report

__all__ = ["all_finite", "box_of_polygons", "four_numbers", "integer_of", "whole_number"]


def whole_number(value: Any) -> int | None:
    """Returns an integer given as such, as a float without fraction, or as text; None for anything else."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        try:
            return whole_number(float(value)) if "." in value else int(value)
        except (ValueError, OverflowError):
            return None
    return None


def integer_of(report: Report, place: tuple[str, str], field: str, value: Any, error: str, repaired: str) -> int | None:
    """
    Returns an integer field of a record.

    Args:
        report: receives the findings.
        place: (file, record) for the report.
        field: name of the field.
        value: the value as the file has it.
        error, repaired: the kind of finding if the value is no integer, and if it had to be converted to one.

    Returns:
        the integer, or None if there is none.
    """
    number = whole_number(value)
    if number is None:
        report.add(error, *place, field, value)
    elif type(value) is not int:
        report.add(repaired, *place, field, value)
    return number


def four_numbers(value: Any) -> list[float] | None:
    """Returns four numbers given as such or as text; None for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    numbers = []
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float | str):
            return None
        try:
            as_float = float(number)
        except (ValueError, OverflowError):
            return None
        numbers.append(as_float if isinstance(number, str) else number)
    return numbers


def all_finite(values: list[Any]) -> bool:
    """Returns whether all values are numbers, none of them NaN or infinite."""
    try:
        return {*map(type, values)} <= {int, float} and all(map(math.isfinite, values))
    except OverflowError:
        return False


def polygon_of_box(box: Sequence[float]) -> list[float]:
    """Returns the outline of a box ``(x, y, width, height)`` as COCO's polygon."""
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    return [left, top, right, top, right, bottom, left, bottom]


def box_of_polygons(polygons: Sequence[Sequence[float]]) -> list[float]:
    """Returns the box ``x, y, width, height`` around polygons ``x1, y1, x2, y2, ...``."""
    xs = [x for polygon in polygons for x in polygon[0::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
