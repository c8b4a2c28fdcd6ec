"""Reader of image files, equal to Detectron2's, with Pillow and NumPy alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow clips values of these modes at 255 when it converts them to 8 bits.
_CLIPPED_MODES = ("I", "F")


def read_image(path: str | os.PathLike[str], channels: str = "BGR") -> np.ndarray:
    """Reads an image file, turned as its EXIF orientation says.

    Args:
        path: The file.
        channels: ``"BGR"`` or ``"RGB"``, the order in the result.

    Returns:
        An ``(H, W, 3)`` uint8 array. Grey is repeated, a palette is looked up, transparency is dropped, and the upper 8
        of 16 bits a channel are kept.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: In one line, if it is not an image, or cannot be read completely.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is a folder, not an image")
    try:
        return decode_image(path, channels)
    except Exception as error:  # a damaged file can raise anything in a decoder
        raise ValueError(f"{path}: not an image that Pillow can read: {' '.join(str(error).split())}") from error


def decode_image(file: str | os.PathLike[str] | BinaryIO, channels: str = "BGR") -> np.ndarray:
    """Decodes an image as :func:`read_image` does, and raises Pillow's own errors."""
    with Image.open(file) as image:
        turned = _turned(image)
        if turned.mode in _CLIPPED_MODES:
            raise ValueError(f"mode {turned.mode!r}, whose values have no known range")
        if turned.mode.startswith("I;16"):
            turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
        pixels = np.asarray(turned.convert("RGB"))
    return np.ascontiguousarray(pixels[:, :, ::-1]) if channels == "BGR" else pixels


def _turned(image: Image.Image) -> Image.Image:
    """Returns the image, turned as its EXIF orientation says, or as it is if the EXIF data cannot be read."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # Detectron2 takes such an image as it is, too
        orientation = None
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)
