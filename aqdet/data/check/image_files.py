"""
Image files as Detectron2's reader sees them.

Policy. Detectron2 turns an image as its EXIF orientation says before it compares sizes, and so does this check. Every
mode that Pillow converts to RGB without clipping is used: grey is put into three channels, a palette is looked up,
alpha is dropped, CMYK is converted without a colour profile, and colour of 16 bits a channel keeps its upper 8. Grey of
16 or 32 bits and floats would be clipped, and are refused.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Sequence

from PIL import Image

from ...runtime.image import EXIF_ORIENTATION, decode_image
from ...utils.progress import progress_bar
from .statistics import colours_of

__all__ = ["ScannedImage", "scan_images"]

USABLE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_ENDINGS_OF_FORMAT = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
}


@dataclasses.dataclass(frozen=True)
class ScannedImage:
    """
    An image file as Detectron2's reader sees it.

    Attributes:
        width, height: size in pixels after the turn that EXIF asks for; 0 if the file was not opened.
        turned: whether that turn swaps width and height.
        digest: digest of the decoded pixels; empty if they were not read.
        colours: result of :func:`aqdet.data.check.statistics.colours_of`; empty if pixels were not read.
        findings: pairs of a kind of finding and a value.
    """

    width: int = 0
    height: int = 0
    turned: bool = False
    digest: str = ""
    findings: tuple[tuple[str, str], ...] = ()
    colours: tuple[float, ...] = ()


def scan_images(paths: Sequence[str], depths: Sequence[str], *, title: str) -> list[ScannedImage]:
    """
    Looks at image files in parallel, with progress on standard error.

    Args:
        paths: paths of the files.
        depths: the depth of the look at each file: ``"stat"``, its length; ``"header"``, its size and mode too;
            ``"pixels"``, also whether it decodes.
        title: text in front of the progress.

    Returns:
        a result for each file, in the order of `paths`.
    """
    if not set(depths) - {"stat"}:
        return [_scan(path, "stat") for path in paths]
    # Decoding and hashing release the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(_scan, paths, depths)
        try:
            return list(progress_bar(found, total=len(paths), unit="image", title=title))
        except BaseException:
            # An interrupt does not wait for the images that are left.
            pool.shutdown(cancel_futures=True)
            raise


def _scan(path: str, depth: str) -> ScannedImage:
    try:
        if os.stat(path).st_size == 0:
            return ScannedImage(findings=(("image-empty", "0 bytes"),))
        if depth == "stat":
            return ScannedImage()
        with Image.open(path) as image:
            findings = _header_findings(image, path)
            turned = _orientation(image, depth) in (5, 6, 7, 8)
            width, height = image.size[::-1] if turned else image.size
        digest, colours = "", tuple[float, ...]()
        if depth == "pixels" and not any(kind == "image-mode" for kind, _ in findings):
            pixels = decode_image(path, "RGB")
            height, width = pixels.shape[:2]
            digest = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).hexdigest()
            colours = colours_of(pixels)
    except Exception as error:  # a damaged file can raise anything in a decoder
        return ScannedImage(findings=(("image-unreadable", f"{type(error).__name__}: {error}"),))
    if turned:
        findings.append(("image-turned", f"{width}x{height}"))
    return ScannedImage(width, height, turned, digest, tuple(findings), colours)


def _orientation(image: Image.Image, depth: str) -> int:
    """Returns the EXIF orientation; a PNG that stores it after its pixels shows it only where these are read."""
    try:
        exif = image.getexif() if depth == "pixels" else Image.Image.getexif(image)
    except Exception:  # Detectron2 takes such an image as it is
        return 1
    return exif.get(EXIF_ORIENTATION, 1)


def _header_findings(image: Image.Image, path: str) -> list[tuple[str, str]]:
    if image.mode not in USABLE_MODES:
        return [("image-mode", image.mode)]
    found = []
    if image.mode != "RGB":
        found.append(("image-converted", image.mode))
    if ";16" in repr(getattr(image, "tile", "")):
        found.append(("image-sixteen", image.mode))
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        found.append(("image-frames", str(getattr(image, "n_frames", 1))))
    ending = os.path.splitext(path)[1].lower()
    if ending not in _ENDINGS_OF_FORMAT.get(image.format or "", (ending,)):
        found.append(("image-ending", f"{image.format} in {ending or 'a file without one'}"))
    return found
