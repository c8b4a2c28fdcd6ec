"""
Image files below a root, found by the names in annotations.

Policy. A file is used if it lies under the image root when all links are followed; the root itself may be a link, and
an absolute name may point into it. A name whose folders do not exist, as labelling tools write them, means the only
file of its base name below the root, unless another record means that file, too.
"""

from __future__ import annotations

import collections
import os
import re
import stat
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence

from ...utils.files import IMAGE_ENDINGS, is_image, is_junk
from .findings import Report

__all__ = ["ImageFolder", "without_junk"]

# The digits that Label Studio puts in front of the name of an uploaded file.
_UPLOAD = re.compile(r"^[0-9a-f]{8}-(?=.)")
_SHOWN_CANDIDATES = 3


def without_junk(folder: str, names: Iterable[str], report: Report) -> list[str]:
    """Returns the sorted names in a folder without junk (:func:`is_junk`).

    Junk, and links to folders, which are not followed, are counted in the report.
    """
    kept = []
    for name in sorted(names):
        if is_junk(name):
            report.add("file-junk", os.path.join(folder, name))
            continue
        path = os.path.join(folder, name)
        if os.path.islink(path) and os.path.isdir(path):
            report.add("folder-link", path)
        kept.append(name)
    return kept


class ImageFolder:
    """Files under a root, found by the names that annotations give them."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._real_root = os.path.realpath(root)
        self._inside: dict[str, bool] = {}
        self._listings: dict[str, dict[str, str]] = {}
        self._by_base_name: dict[str, list[str]] | None = None

    def find_all(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """
        Returns the files that the names of a dataset's images mean.

        Args:
            names: the names as the annotations give them.

        Returns:
            the result of :meth:`find` for each name, or a file and ``"image-elsewhere"`` if the name does not exist and
            no other name means the only file of its base name below the root. Where there are several such files, the
            text of what was looked for names them.
        """
        found = [self.find(name) for name in names]
        lost = [index for index, (_, kind) in enumerate(found) if kind in ("image-missing", "image-outside")]
        if not lost:
            return found
        taken = {os.path.normpath(name) for name, kind in found if kind in ("", "image-path")}
        only: dict[int, str] = {}
        for index in lost:
            with_ending = self._with_ending(names[index])
            if len(with_ending) == 1 and with_ending[0] not in taken:
                only[index] = with_ending[0]
                continue
            is_meant, candidates = self._elsewhere(names[index])
            free = [candidate for candidate in candidates if candidate not in taken]
            if is_meant and len(candidates) == len(free) == 1:
                only[index] = free[0]
            elif len(free) > 1:
                found[index] = (f"{names[index]} (there are {_listed(free)})", found[index][1])
            elif free:
                found[index] = (f"{names[index]} (there is {free[0]})", found[index][1])
        names_of: dict[str, set[str]] = collections.defaultdict(set)
        for index, candidate in only.items():
            names_of[candidate].add(names[index])
        for index, candidate in only.items():
            others = len(names_of[candidate]) - 1
            hint = f"{names[index]} (there is {candidate}, which {others} other name{'s'[: others > 1]} could mean too)"
            found[index] = (hint, found[index][1]) if others else (candidate, "image-elsewhere")
        return found

    def find(self, name: str) -> tuple[str, str]:
        """
        Returns the file that a name means.

        Args:
            name: the name as the annotation gives it.

        Returns:
            the file's name relative to the root, and ``""``, or ``"image-path"`` if the annotation gives another name.
            If there is no such file, the path that was looked for, and ``"image-outside"`` or ``"image-missing"``.
        """
        if "\0" in name or re.match(r"[A-Za-z]:[\\/]", name):
            return name, "image-outside"
        slashed = name.replace("\\", "/")
        stripped = slashed.strip()
        forms = [name, slashed, stripped, *(unicodedata.normalize(form, stripped) for form in ("NFC", "NFD"))]
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
        """Returns the file with all links followed."""
        return os.path.realpath(os.path.join(self.root, relative))

    def contains(self, path: str) -> bool:
        """Returns whether a path, with all links followed, lies under the root."""
        real = os.path.realpath(path)
        return real == self._real_root or real.startswith(self._real_root.rstrip(os.sep) + os.sep)

    def _relative(self, name: str) -> str | None:
        """Returns a name relative to the root, or None if its text alone leads out of it."""
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
        """Returns the name, with a hint at the file that was probably meant, in other case or without first folders."""
        mode = self._mode(name)
        if mode is not None and stat.S_ISDIR(mode):
            return f"{name} (it is a folder)"
        parts = name.split("/")
        shorter = ("/".join(parts[index:]) for index in range(1, len(parts)))
        near = next((short for short in shorter if self._mode(short) is not None), None)
        folder = os.path.join(self.root, os.path.dirname(name))
        if folder not in self._listings:
            inside = os.path.isdir(folder) and self.contains(folder)
            self._listings[folder] = {entry.lower(): entry for entry in os.listdir(folder)} if inside else {}
        there = self._listings[folder]
        near = near or there.get(os.path.basename(name).lower())
        if near is None and is_image(name):
            stem = os.path.splitext(os.path.basename(name))[0].lower()
            near = next((there[other] for ending in IMAGE_ENDINGS if (other := f"{stem}{ending}") in there), None)
        return f"{name} (there is {near})" if near else name

    def _with_ending(self, name: str) -> list[str]:
        """Returns the image files that a name without an image's ending means: the name with one behind it."""
        slashed = name.replace("\\", "/").strip()
        relative = None if "\0" in slashed or is_image(slashed) else self._relative(slashed)
        if not relative:
            return []
        names = [f"{relative}{form}" for ending in IMAGE_ENDINGS for form in (ending, ending.upper())]
        modes = ((name, self._mode(name)) for name in names)
        return [
            name for name, mode in modes if mode is not None and stat.S_ISREG(mode) and self._is_inside(name, False)
        ]

    def _elsewhere(self, name: str) -> tuple[bool, list[str]]:
        """Returns the files that a missing name may mean, and whether one of them is certainly meant."""
        if "\0" in name:
            return False, []
        for form in _without_address(name.replace("\\", "/")):
            folder = os.path.dirname(form)
            inside = self._relative(folder) if folder else None
            # If the folder exists, the file is lost, and a file of the same name elsewhere is another image.
            path = os.path.join(self.root, inside or "")
            is_meant = not (inside and os.path.isdir(path) and self.contains(path))
            parts = [part for part in form.split("/") if part not in ("", ".", "..")]
            for index in range(len(parts) - 1):
                relative = "/".join(parts[index:])
                mode = self._mode(relative)
                if mode is not None and stat.S_ISREG(mode) and self._is_inside(relative, False):
                    return is_meant, [relative]
            for base in (parts[-1], _UPLOAD.sub("", parts[-1])) if parts else ():
                candidates = self._index().get(unicodedata.normalize("NFC", base), [])
                if candidates:
                    return is_meant, candidates
        return False, []

    def _index(self) -> dict[str, list[str]]:
        """Returns the files below the root by their base name; links to folders are not followed."""
        if self._by_base_name is None:
            self._by_base_name = {}
            for path, folders, files in os.walk(self.root):
                folders[:] = sorted(folder for folder in folders if not is_junk(folder))
                for file in sorted(files):
                    relative = os.path.relpath(os.path.join(path, file), self.root).replace(os.sep, "/")
                    is_link = os.path.islink(os.path.join(path, file))
                    if not is_junk(file) and self._is_inside(relative, is_link):
                        key = unicodedata.normalize("NFC", file)
                        self._by_base_name.setdefault(key, []).append(relative)
        return self._by_base_name


def _without_address(name: str) -> Iterator[str]:
    """Returns the paths that a name can mean: the name itself, and an address (URL) without all but its path."""
    yield name
    if "://" not in name and not {"?", "%"} & set(name):
        return
    try:
        address = urllib.parse.urlsplit(name)
        local = urllib.parse.parse_qs(address.query).get("d", [])
    except ValueError:
        return
    # Label Studio serves local files as /data/local-files/?d=PATH.
    yield from (path.replace("\\", "/") for path in local)
    yield urllib.parse.unquote(address.path)


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:_SHOWN_CANDIDATES])
    rest = len(names) - len(shown)
    return f"{', '.join(shown)} and {rest} more" if rest else f"{', '.join(shown[:-1])} and {shown[-1]}"
