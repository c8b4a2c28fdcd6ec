"""
Image files: where they may lie, and what Detectron2's reader makes of them.

Policy. A file is used if, with all links followed, it lies under the image root; the root itself may be a link,
and an absolute name may point into it. Detectron2 turns an image as its EXIF orientation says before it
compares sizes, and so does this. Every mode that Pillow converts to RGB without clipping is used: grey is put
into three channels, a palette is looked up, alpha is dropped, CMYK is converted without a colour profile, and
colour of 16 bits a channel keeps its upper 8. Grey of 16 or 32 bits and floats would be clipped: refused.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Sequence

from PIL import Image
from tqdm import tqdm

from ...runtime.image import decode_image

__all__ = ["IMAGE_ENDINGS", "ImageFolder", "ScannedImage", "scan_images"]

# Of the files that are taken for images in a folder; a name in an annotation file may have any.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2")
USABLE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
EXIF_ORIENTATION = 0x0112
_ENDINGS_OF_FORMAT = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
}


class ImageFolder:
    """Files under a root, found by the names that annotations give them."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._real_root = os.path.realpath(root)
        self._inside: dict[str, bool] = {}
        self._listings: dict[str, dict[str, str]] = {}

    def find(self, name: str) -> tuple[str, str]:
        """
        The file that a name means.

        Args:
            name: as the annotation gives it.

        Returns:
            its name relative to the root, and ``""``, ``"image-path"`` if that is not the name given, or the
            kind of error: ``"image-outside"`` or ``"image-missing"``, then with what was looked for.
        """
        if "\0" in name or re.match(r"[A-Za-z]:[\\/]", name):
            return name, "image-outside"
        slashed = name.replace("\\", "/")
        forms = [name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))]
        outside = False
        for form in dict.fromkeys(forms):
            relative = self._relative(form)
            if relative is None:
                outside = True
                continue
            mode = self._mode(relative)
            if mode is None or not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                continue
            if not self._is_inside(relative, stat.S_ISLNK(mode)):
                return name, "image-outside"
            return relative, "" if relative == name else "image-path"
        if outside:
            return name, "image-outside"
        return self._with_hint(slashed), "image-missing"

    def real_path(self, relative: str) -> str:
        """The file with all links followed."""
        return os.path.realpath(os.path.join(self.root, relative))

    def contains(self, path: str) -> bool:
        """Whether a path, with all links followed, lies under the root."""
        real = os.path.realpath(path)
        return real == self._real_root or real.startswith(self._real_root.rstrip(os.sep) + os.sep)

    def _relative(self, name: str) -> str | None:
        """A name relative to the root, or None if its text alone leads out of it."""
        if os.path.isabs(name):
            for root in (os.path.abspath(self.root), self._real_root):
                if name.startswith(root.rstrip(os.sep) + os.sep):
                    return self._relative(os.path.relpath(name, root))
            return None
        depth = 0
        for part in name.split("/"):
            depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
            if depth < 0:
                return None
        return name

    def _mode(self, relative: str) -> int | None:
        try:
            return os.lstat(os.path.join(self.root, relative)).st_mode
        except (OSError, ValueError):
            return None

    def _is_inside(self, relative: str, is_link: bool) -> bool:
        path = os.path.join(self.root, relative)
        if is_link:
            return self.contains(path)
        folder = os.path.dirname(path)
        if folder not in self._inside:
            self._inside[folder] = self.contains(folder)
        return self._inside[folder]

    def _with_hint(self, name: str) -> str:
        """The name, with the file that was probably meant: of another case, or without the first folders."""
        parts = name.split("/")
        shorter = ("/".join(parts[index:]) for index in range(1, len(parts)))
        near = next((short for short in shorter if self._mode(short) is not None), None)
        folder = os.path.join(self.root, os.path.dirname(name))
        if folder not in self._listings:
            inside = os.path.isdir(folder) and self.contains(folder)
            self._listings[folder] = {entry.lower(): entry for entry in os.listdir(folder)} if inside else {}
        near = near or self._listings[folder].get(os.path.basename(name).lower())
        return f"{name} (there is {near})" if near else name


@dataclasses.dataclass(frozen=True)
class ScannedImage:
    """
    An image file as Detectron2's reader sees it.

    Attributes:
        width, height: in pixels after the turn that EXIF asks for; 0 if the file was not opened.
        turned: whether that turn swaps width and height.
        digest: of the decoded pixels; empty if they were not read.
        findings: pairs of a kind and a value.
    """

    width: int = 0
    height: int = 0
    turned: bool = False
    digest: str = ""
    findings: tuple[tuple[str, str], ...] = ()


def scan_images(paths: Sequence[str], depths: Sequence[str], *, title: str) -> list[ScannedImage]:
    """
    Looks at image files in parallel, with a progress bar on a terminal.

    Args:
        paths: of the files.
        depths: for each, ``"stat"``: its length; ``"header"``: also its size and mode; ``"pixels"``: also
            whether it decodes.
        title: of the progress bar.

    Returns:
        what was found, in the order of `paths`.
    """
    if not set(depths) - {"stat"}:
        return [_scan(path, "stat") for path in paths]
    # Decoding and hashing release the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(_scan, paths, depths)
        try:
            # None: no bar where the output is a file.
            return list(tqdm(found, total=len(paths), desc=title, unit="image", disable=None))
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
        digest = ""
        if depth == "pixels" and not any(kind == "image-mode" for kind, _ in findings):
            pixels = decode_image(path, "RGB")
            height, width = pixels.shape[:2]
            digest = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).hexdigest()
    except Exception as error:  # a damaged file can raise anything in a decoder
        return ScannedImage(findings=(("image-unreadable", f"{type(error).__name__}: {error}"),))
    if turned:
        findings.append(("image-turned", f"{width}x{height}"))
    return ScannedImage(width, height, turned, digest, tuple(findings))


def _orientation(image: Image.Image, depth: str) -> int:
    """The EXIF orientation; that of a PNG which has it after its pixels is seen only where these are read."""
    try:
        exif = image.getexif() if depth == "pixels" else Image.Image.getexif(image)
    except Exception:  # Detectron2 then takes the image as it is
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
