"""
Scenes of the embedded dataset, drawn procedurally for a detector to learn in minutes.

An image is a pure function of ``(seed, index, size)``: random integers come from PCG64, and shapes
are drawn from integer vertices without anti-aliasing, so that the same pixels are drawn everywhere.

Shape shorthand:
    H, W: height and width of an image, both equal to ``size``
    P: number of vertices of a polygon
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

__all__ = ["IMAGE_SIZE", "KEYPOINTS", "SHAPE_CLASSES", "draw_scene"]

IMAGE_SIZE = 192
SHAPE_CLASSES = ("circle", "ring", "square", "triangle", "cross", "star")
KEYPOINTS = ("centre", "left", "right", "top", "bottom")
"""Names of an object's keypoints; but for the first they are the extreme points of the upright shape.

Where an extreme has several points it is their middle, which for a star's top lies between its tips.
"""

# Difficulty. Ranges are inclusive.
NUM_OBJECTS = (3, 7)
# Areas of objects in pixels, within COCO's bands (32^2 and 96^2), and how often each range is drawn.
AREA_RANGES = {"small": (260, 1000), "medium": (1050, 9000), "large": (9300, 12500)}
BAND_PERCENT = {"small": 26, "medium": 52, "large": 22}
CONTRAST = (36, 100)  # grey levels between a distractor's or a line's colour and the background's, per channel
MIN_VISIBLE_PERCENT = 70  # an object that would hide more of another one is not drawn
STRETCH_PERCENT = (88, 114)  # width of an object against its height, before rotation
TURN_DEGREES = (-12, 12)  # turn of an object in degrees; distractors turn freely
# A class's mean colour, as blue, green and red above the background's, and the spread of its objects around it: large
# enough to meet other classes, and small enough for a detector to learn within minutes.
CLASS_TINTS = {
    "circle": (-50, -50, 70),
    "ring": (70, -50, -50),
    "square": (-50, 70, -50),
    "triangle": (60, 60, -60),
    "cross": (-60, 60, 60),
    "star": (60, -60, 60),
}
TINT_SPREAD = 24
TEXTURE_AMPLITUDE = (2, 10)
HUE = 24  # grey levels between the channels of the background and its brightness
BLOTCHES = {48: 8, 16: 5, 4: 3}  # cell in pixels -> grey levels, in the background
NUM_DISTRACTORS = (0, 2)
DISTRACTOR_AREA = (250, 5000)
NUM_LINES = (0, 3)
NUM_PATCHES = (0, 2)
PIXEL_NOISE = 4

_PLACEMENT_ATTEMPTS = 8
_DISTRACTORS = ("hexagon", "half_disc", "chevron", "splinter", "blob")
_SHIFT = 12
_HALF = 1 << (_SHIFT - 1)
# Cosine in 1/4096, so that vertices are integer arithmetic.
_COS = np.array([round(math.cos(math.radians(d)) * (1 << _SHIFT)) for d in range(360)], np.int64)
_REFERENCE_RADIUS = 1024


@dataclass(frozen=True)
class _Item:
    """
    A shape at its place.

    Attributes:
        kind: a class name, or the name of a distractor.
        polygons: outlines of int32 (P, 2) x, y vertices; the second one, if any, is a hole.
        mask: bool (H, W), the pixels that the shape covers.
        keypoints: int32 (K, 2), x and y in the order of ``KEYPOINTS``.
    """

    kind: str
    polygons: list[np.ndarray]
    mask: np.ndarray
    keypoints: np.ndarray


def draw_scene(seed: int, index: int, size: int = IMAGE_SIZE) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """
    Draws one image of the embedded dataset.

    Args:
        seed: seed of the split.
        index: index of the image in its split.
        size: height and width of the image in pixels.

    Returns:
        the image, uint8 (H, W, 3) in BGR, and its annotations: dicts with COCO's ``category_id``
        (from 1), ``bbox`` (x, y, width, height, of the whole shape), ``area``, ``segmentation``
        (a hole is joined to the outline by a slit), ``keypoints`` (invisible where another shape is in front),
        ``num_keypoints`` and ``iscrowd``.
    """
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    base = rng.integers(72, 184) + rng.integers(-HUE, HUE + 1, 3)
    canvas = _background(rng, base, size)
    for _ in range(_draw(rng, NUM_PATCHES)):
        _paint_patch(rng, canvas)
    lines = _draw(rng, NUM_LINES)
    for _ in range(lines // 2):
        _paint_line(rng, canvas, base)
    items = _place_items(rng, size)
    for item in items:
        _paint_item(rng, canvas, item, base)
    for _ in range(lines - lines // 2):
        _paint_line(rng, canvas, base)
    canvas += rng.integers(-PIXEL_NOISE, PIXEL_NOISE + 1, canvas.shape, dtype=np.int16)
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return image, [
        _annotation(item, items[number + 1 :]) for number, item in enumerate(items) if item.kind in SHAPE_CLASSES
    ]


def _draw(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


def _polar(radii: Sequence[int] | np.ndarray, degrees: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns vertices (P, 2) in 1/4096 pixel at the given radii (pixels) and angles."""
    angles = np.asarray(degrees, np.int64)
    cos, sin = _COS[angles % 360], _COS[(angles - 90) % 360]
    return np.stack([cos, sin], axis=1) * np.asarray(radii, np.int64)[:, None]


def _outline(kind: str, radius: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns a shape's upright outlines (P, 2) in 1/4096 pixel around the origin."""
    disc = np.arange(0, 360, 10)
    if kind == "circle":
        return [_polar([radius] * 36, disc)]
    if kind == "ring":
        return [_polar([radius] * 36, disc), _polar([radius * 9 // 16] * 36, disc)]
    if kind == "square":
        return [_polar([radius] * 4, range(45, 360, 90))]
    if kind == "triangle":
        return [_polar([radius] * 3, range(30, 360, 120))]
    if kind == "star":
        return [_polar([radius, radius * 15 // 32] * 5, range(18, 378, 36))]
    if kind == "cross":
        arm = radius * 11 // 32
        corner = [(radius, -arm), (radius, arm), (arm, arm)]
        quarter = np.array(corner, np.int64)
        turns = [quarter]
        for _ in range(3):
            turns.append(np.stack([-turns[-1][:, 1], turns[-1][:, 0]], axis=1))
        return [np.concatenate(turns) << _SHIFT]
    if kind == "hexagon":
        return [_polar([radius] * 6, range(0, 360, 60))]
    if kind == "half_disc":
        return [_polar([radius] * 19, range(0, 190, 10))]
    if kind == "chevron":
        inner = radius * 5 // 8
        return [_polar([radius, radius // 5, radius, inner], [0, 60, 120, 60])]
    if kind == "splinter":
        return [_polar(rng.integers(radius // 3, radius + 1, 4), [0, 50, 180, 240])]
    return [_polar(rng.integers(radius // 2, radius + 1, 9), range(0, 360, 40))]


def _keypoints(outline: np.ndarray) -> np.ndarray:
    """Returns the keypoints (K, 2) of an upright outline (P, 2) around the origin; an edge's extreme is its middle."""
    extremes = [
        outline[outline[:, axis] == pick(outline[:, axis])].sum(axis=0)
        // (outline[:, axis] == pick(outline[:, axis])).sum()
        for axis in (0, 1)
        for pick in (np.min, np.max)
    ]
    return np.stack([np.zeros(2, np.int64), *extremes])


def _shoelace(points: np.ndarray) -> float:
    x, y = points[:, 0].astype(np.int64), points[:, 1].astype(np.int64)
    return abs(int((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())) / 2


def _polygon_area(polygons: list[np.ndarray]) -> float:
    return _shoelace(polygons[0]) - sum(_shoelace(hole) for hole in polygons[1:])


@functools.cache
def _reference_area(kind: str) -> int:
    """Returns the number of pixels that a shape of the reference radius covers; for random outlines, of one outline."""
    outlines = _outline(kind, _REFERENCE_RADIUS, np.random.Generator(np.random.PCG64(0)))
    return int(_polygon_area([points >> _SHIFT for points in outlines]))


def _place_items(rng: np.random.Generator, size: int) -> list[_Item]:
    """Chooses shapes from back to front, none of which hides too much of an object behind it."""
    wanted = [True] * _draw(rng, NUM_OBJECTS) + [False] * _draw(rng, NUM_DISTRACTORS)
    items: list[_Item] = []
    for position in rng.permutation(len(wanted)):
        for _ in range(_PLACEMENT_ATTEMPTS):
            item = _random_item(rng, size, is_object=wanted[position])
            if item is not None and _keeps_visible(items, item):
                items.append(item)
                break
    return items


def _keeps_visible(items: list[_Item], top: _Item) -> bool:
    hidden = top.mask.copy()
    for item in reversed(items):
        if item.kind in SHAPE_CLASSES:
            total = int(item.mask.sum())
            visible = int((item.mask & ~hidden).sum())
            if visible * 100 < total * MIN_VISIBLE_PERCENT:
                return False
        hidden |= item.mask
    return True


def _random_item(rng: np.random.Generator, size: int, is_object: bool) -> _Item | None:
    """Returns a shape at a random place inside the image; None if it does not fit."""
    if is_object:
        kind = SHAPE_CLASSES[rng.integers(len(SHAPE_CLASSES))]
        band = int(rng.integers(100))
        shares = iter(BAND_PERCENT.items())
        name, limit = next(shares)
        while band >= limit:
            name, share = next(shares)
            limit += share
        area = AREA_RANGES[name]
    else:
        kind = _DISTRACTORS[rng.integers(len(_DISTRACTORS))]
        area = DISTRACTOR_AREA
    # Square roots, so that sides rather than areas are evenly spread.
    side = _draw(rng, (math.isqrt(area[0]) + 1, math.isqrt(area[1])))
    stretch = _draw(rng, STRETCH_PERCENT)
    angle = _draw(rng, TURN_DEGREES) % 360 if is_object else int(rng.integers(360))
    cos, sin = int(_COS[angle]), int(_COS[(angle - 90) % 360])
    radius = max(3, side * _REFERENCE_RADIUS // math.isqrt(_reference_area(kind)))
    upright, outlines = _outline(kind, radius, rng), []
    for points in [*upright, _keypoints(upright[0])]:
        x = points[:, 0] * (100 + stretch) // 200
        y = points[:, 1] * 100 // ((100 + stretch) // 2)
        turned = np.stack([x * cos - y * sin, x * sin + y * cos], axis=1)
        outlines.append((turned + (_HALF << _SHIFT)) >> (2 * _SHIFT))
    *outlines, keypoints = outlines
    low, high = outlines[0].min(axis=0), outlines[0].max(axis=0)
    room = size - 2 - (high - low)
    if (room < 1).any():
        return None
    offset = 1 + rng.integers(0, room) - low
    polygons = [(points + offset).astype(np.int32) for points in outlines]
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, polygons, 1, lineType=cv2.LINE_8)
    return _Item(kind, polygons, mask.astype(bool), (keypoints + offset).astype(np.int32))


def _annotation(item: _Item, in_front: list[_Item]) -> dict[str, Any]:
    rows, columns = np.nonzero(item.mask.any(axis=1))[0], np.nonzero(item.mask.any(axis=0))[0]
    outline = item.polygons[0]
    for hole in item.polygons[1:]:
        outline = np.concatenate([outline, outline[:1], hole[:1], hole[:0:-1], hole[:1]])
    hidden = [any(other.mask[y, x] for other in in_front) for x, y in item.keypoints]
    visibility = np.where(hidden, 1, 2)
    return {
        "category_id": SHAPE_CLASSES.index(item.kind) + 1,
        "bbox": [
            int(columns[0]),
            int(rows[0]),
            int(columns[-1] - columns[0] + 1),
            int(rows[-1] - rows[0] + 1),
        ],
        "area": _polygon_area(item.polygons),
        # Vertices are pixels; COCO counts from a pixel's corner.
        "segmentation": [[float(value) + 0.5 for value in outline.ravel()]],
        # Keypoints are indices of pixels in COCO, too.
        "keypoints": np.column_stack([item.keypoints, visibility]).ravel().tolist(),
        "num_keypoints": len(KEYPOINTS),
        "iscrowd": 0,
    }


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns a pattern around zero, plain, stripes, checks or blotches: int16 (H, W, 1)."""
    kind, amplitude = int(rng.integers(4)), _draw(rng, TEXTURE_AMPLITUDE)
    period = _draw(rng, (3, 9))
    rows, columns = np.arange(height)[:, None], np.arange(width)
    if kind == 0:
        pattern = np.zeros((height, width), np.int64)
    elif kind == 1:
        a, b = rng.integers(-2, 3, 2)
        pattern = (rows * a + columns * (b if a or b else 1)) // period % 2 * 2 - 1
    elif kind == 2:
        pattern = (rows // period + columns // period) % 2 * 2 - 1
    else:
        pattern = _blotches(rng, 1, period, height, width)[:, :, 0]
    return (pattern * amplitude)[:, :, None].astype(np.int16)


def _blotches(rng: np.random.Generator, amplitude: int, cell: int, *shape: int) -> np.ndarray:
    """Returns square cells with a random value each: int16 (H, W, C)."""
    height, width, channels = (*shape, 1)[:3]
    rows, columns = -(-height // cell), -(-width // cell)
    values = rng.integers(-amplitude, amplitude + 1, (rows, columns, channels), dtype=np.int16)
    return values.repeat(cell, axis=0)[:height].repeat(cell, axis=1)[:, :width]


def _background(rng: np.random.Generator, base: np.ndarray, size: int) -> np.ndarray:
    """Returns the base colour with a slope of light, blotches at three scales and texture: int16 (H, W, 3)."""
    slope = rng.integers(-40, 41, 2)
    ramp = np.arange(size) - size // 2
    light = (ramp[:, None] * slope[0] + ramp * slope[1]) // size
    canvas = light[:, :, None].astype(np.int16) + base.astype(np.int16)
    for cell, amplitude in BLOTCHES.items():
        canvas += _blotches(rng, amplitude, cell, size, size, 3)
    return canvas + _texture(rng, size, size) // 2


def _colour(rng: np.random.Generator, base: np.ndarray) -> np.ndarray:
    signs = rng.integers(0, 2, 3) * 2 - 1
    return base + signs * rng.integers(CONTRAST[0], CONTRAST[1] + 1, 3)


def _paint_item(rng: np.random.Generator, canvas: np.ndarray, item: _Item, base: np.ndarray) -> None:
    colour = _colour(rng, base).astype(np.int16)
    if item.kind in CLASS_TINTS:
        spread = rng.integers(-TINT_SPREAD, TINT_SPREAD + 1, 3)
        colour = (base + np.array(CLASS_TINTS[item.kind]) + spread).astype(np.int16)
    left, top, width, height = cv2.boundingRect(item.polygons[0])
    box = slice(top, top + height), slice(left, left + width)
    filled = _texture(rng, height, width) + colour
    np.copyto(canvas[box], filled, where=item.mask[box][:, :, None])
    if rng.integers(2):
        edge = np.zeros(canvas.shape[:2], np.uint8)
        cv2.polylines(edge, item.polygons, True, 1, thickness=1, lineType=cv2.LINE_8)
        canvas[edge.astype(bool)] = colour + rng.integers(-40, 41)


def _paint_line(rng: np.random.Generator, canvas: np.ndarray, base: np.ndarray) -> None:
    ends = rng.integers(0, canvas.shape[0], 4).tolist()
    stroke = np.zeros(canvas.shape[:2], np.uint8)
    thickness = _draw(rng, (1, 3))
    cv2.line(stroke, ends[:2], ends[2:], 1, thickness=thickness, lineType=cv2.LINE_8)
    canvas[stroke.astype(bool)] = _colour(rng, base)


def _paint_patch(rng: np.random.Generator, canvas: np.ndarray) -> None:
    height, width = rng.integers(12, 64, 2)
    top, left = rng.integers(0, canvas.shape[0] - 8, 2)
    patch = canvas[top : top + height, left : left + width]
    patch += rng.integers(-44, 45, patch.shape, dtype=np.int16)
