"""From a file or pixels to the network's input, pixel for pixel as Detectron2 does at test time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from .folder import Description

# Bits behind the point of Pillow's 8-bit resampling coefficients.
_PRECISION_BITS = 22
# Values that are filtered at a time, to stay in the processor's cache.
_BLOCK = 1 << 16


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decodes an image file, turned as its EXIF orientation says.

    Returns:
        ``(H, W, 3)`` uint8, BGR; grey is repeated, transparency and depth beyond 8 bits are dropped. As training
        reads it, but for a CMYK file, whose values OpenCV and Pillow round differently: one level apart.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is not an image that can be read whole.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    data = path.read_bytes()
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise ValueError(f"{path}: not an image that OpenCV can read")
    return image


def output_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Size after Detectron2's ``ResizeShortestEdge``: ``(height, width)`` with its order of roundings.

    The shorter edge becomes ``min_size``, or less where the longer one would pass ``max_size``. A ``min_size``
    of 0 leaves the size as it is.
    """
    if min_size == 0:
        return height, width
    scale = min_size / min(height, width)
    new_height, new_width = (float(min_size), scale * width) if height < width else (scale * height, float(min_size))
    if max(new_height, new_width) > max_size:
        scale = max_size / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_height + 0.5), int(new_width + 0.5)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bilinear resize, bit for bit.

    A triangle filter that widens with the reduction, in two passes, each with coefficients rounded to 22 bits
    and a result rounded to 8; an axis that keeps its length has no pass. Along the width first, or, as Pillow
    does since version 13, along the height first where that loses more than twice as many pixels.
    ``cv2.resize`` reads two pixels an axis whatever the reduction, which gives other values.

    Args:
        image: ``(H, W, C)`` uint8.
        height, width: of the result, at least 1.

    Returns:
        ``(height, width, C)`` uint8.
    """
    lost_height, lost_width = image.shape[0] - height, image.shape[1] - width
    passes = [(1, width), (0, height)]
    if lost_height > 0 and lost_height > 2 * lost_width:
        passes.reverse()
    for axis, length in passes:
        if image.shape[axis] != length:
            image = _resample(image.swapaxes(0, axis), length).swapaxes(0, axis)
    return np.ascontiguousarray(image)


def _resample(image: np.ndarray, length: int) -> np.ndarray:
    """Filters the first axis of an ``(L, M, C)`` image to ``length``."""
    first, coefficients = _coefficients(image.shape[0], length)
    rows = image.astype(np.int32, order="C")
    result = np.empty((length, *image.shape[1:]), np.uint8)
    step = max(_BLOCK // rows[0].size, 1)
    for start in range(0, length, step):
        block = slice(start, start + step)
        total = np.full(result[block].shape, 1 << (_PRECISION_BITS - 1), np.int32)
        for tap in range(coefficients.shape[1]):
            part = rows[np.minimum(first[block] + tap, len(rows) - 1)]
            part *= coefficients[block, tap, None, None]
            total += part
        total >>= _PRECISION_BITS
        result[block] = total
    return result


def _coefficients(length: int, new_length: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel ``(new_length,)`` and weights ``(new_length, taps)`` int32 of each output pixel."""
    scale = length / new_length
    support = max(scale, 1.0)
    centre = (np.arange(new_length) + 0.5) * scale
    # A cast truncates as C's does.
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + support + 0.5).astype(np.int64), length)
    pixel = first[:, None] + np.arange((stop - first).max())
    weights = 1.0 - np.abs((pixel - centre[:, None] + 0.5) * (1.0 / support))
    weights[(weights < 0) | (pixel >= stop[:, None])] = 0.0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # added in order, as Pillow does
    return first, (weights * (1 << _PRECISION_BITS) + 0.5).astype(np.int32)


def make_batch(images: Sequence[np.ndarray], description: Description) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Resizes images, orders their channels, and pads them at the right and the bottom to one size.

    Args:
        images: each ``(H, W, 3)`` uint8, BGR.
        description: of the detector.

    Returns:
        the batch, ``(N, 3, H, W)`` uint8, and each image's ``(height, width)`` in it.

    Raises:
        ValueError: if an array is not such an image.
    """
    resized = []
    for image in images:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"an image must be a uint8 array (H, W, 3) in BGR order, got {got}")
        if 0 in image.shape:
            raise ValueError(f"an image must have pixels, got the shape {image.shape}")
        size = output_size(image.shape[0], image.shape[1], description.min_size, description.max_size)
        if 0 in size:
            raise ValueError(f"an image of {image.shape[:2]} (height, width) would be resized to {size}: too narrow")
        resized.append(resize(image, *size))
    sizes = [(image.shape[0], image.shape[1]) for image in resized]
    step = description.size_divisibility
    height, width = (-(-max(edges) // step) * step for edges in zip(*sizes, strict=True))
    batch = np.empty((len(resized), 3, height, width), np.uint8)
    batch[:] = np.array(description.pad_value, np.uint8)[:, None, None]
    for pixels, image in zip(batch, resized, strict=True):
        ordered = image if description.channels == "BGR" else image[:, :, ::-1]
        pixels[:, : image.shape[0], : image.shape[1]] = ordered.transpose(2, 0, 1)
    return batch, sizes
