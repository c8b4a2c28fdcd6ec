"""The network's input from pixels, equal to Detectron2's at test time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .folder import Description


def output_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Returns the ``(height, width)`` after Detectron2's ``ResizeShortestEdge``, with its order of roundings.

    The shorter edge becomes ``min_size``, or less if the longer one would exceed ``max_size``. A ``min_size``
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
    """Resizes with Pillow's bilinear filter, which Detectron2 uses; ``cv2.resize`` gives other values.

    Args:
        image: ``(H, W, 3)`` uint8.
        height, width: Size of the result in pixels, at least 1.

    Returns:
        An ``(height, width, 3)`` uint8 array.
    """
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def make_batch(images: Sequence[np.ndarray], description: Description) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Resizes images, orders their channels, and pads them at the right and the bottom to one size.

    Args:
        images: Images ``(H, W, 3)`` uint8, BGR.
        description: The description of the detector.

    Returns:
        The batch, ``(N, 3, H, W)`` uint8, and each image's ``(height, width)`` in it.

    Raises:
        ValueError: If an array is not such an image.
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
