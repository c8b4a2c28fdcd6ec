"""Checkpoint files, which are read without running code, and written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import re
import zipfile
from http.client import HTTPException
from typing import IO, Any, cast
from urllib.parse import urlparse

import numpy as np
import torch
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import get_cache_dir

from ..utils.files import open_replacing

logger = logging.getLogger(__name__)

CAFFE2 = "Caffe2"
"""The ``__author__`` in a file with Caffe2's names."""
_ALLOWED_GLOBALS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers of numpy arrays and nothing else, which is all a model zoo file needs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def load_pickled_arrays(file: IO[bytes]) -> dict[str, Any]:
    """Reads a ``.pkl`` of Detectron2's or Caffe2's model zoo.

    Raises:
        pickle.UnpicklingError: If it is not a dict of containers, numbers, strings and numpy arrays.
    """
    data = _ArrayUnpickler(file, encoding="latin1").load()
    if not isinstance(data, dict):
        raise pickle.UnpicklingError(f"it is a {type(data).__name__}, not a dict")
    return data


def load_weights_file(path: str) -> dict[str, Any]:
    """Calls ``torch.load`` on a file that may hold tensors and plain containers only.

    Raises:
        OSError: If it cannot be read.
        ValueError: In one line, if it holds anything else or is damaged.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which torch's reader makes of a file that ends too early
            raise
        raise ValueError(f"checkpoint {path!r} is refused, it is damaged: it ends too early") from error
    except Exception as error:  # Damaged input makes the unpickler raise almost anything.
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = _what_it_is(path) or "it is damaged or was not written by torch.save"
        if code:
            reason = f"it holds more than tensors and containers: {code.group(1)}; save the state_dict() of a model"
        raise ValueError(f"checkpoint {path!r} is refused, {reason}") from error
    if not isinstance(data, dict):
        raise ValueError(f"checkpoint {path!r} holds no state dict but a {type(data).__name__}")
    return data


def _what_it_is(path: str) -> str:
    """Returns what a file is that torch.save has not written, and the way out; ``""`` if it is not known."""
    with open(path, "rb") as file:
        start = file.read(200)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is the pointer of a file in Git LFS: fetch the file by git lfs pull"
    if start.lstrip()[:1] == b"<":
        return "it is a web page, so that a download has gone wrong"
    # The length of the header in 8 bytes, and the header as JSON.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        return "it is of safetensors, which are not read: write what load_file gives by torch.save"
    with contextlib.suppress(zipfile.BadZipFile):
        if any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            return "it is a TorchScript program: save the state_dict() of the model"
    return ""


def load_zoo_file(path: str, name: str) -> dict[str, Any]:
    """Reads a pickled checkpoint of a model zoo as Detectron2's checkpointer does, without running code.

    Args:
        path: The file, whose name ends in ``.pkl``.
        name: The user's name for it, for messages.

    Returns:
        A dict with ``"model"``, and with ``"matching_heuristics"`` if its keys are to be matched by their suffixes.

    Raises:
        OSError: If the file cannot be read.
        ValueError: In one line, if it holds anything but arrays or is damaged.
    """
    try:
        with open(path, "rb") as file:
            data = load_pickled_arrays(file)
    except OSError:
        raise
    except Exception as error:  # Damaged input makes the unpickler raise almost anything.
        reason = " ".join(str(error).split())
        raise ValueError(f"checkpoint {name!r} is refused, it must hold only arrays: {reason}") from error
    if "model" in data and "__author__" in data:
        return data
    data = data.get("blobs", data)
    model = {key: v for key, v in data.items() if not key.endswith("_momentum")}
    return {"model": model, "__author__": CAFFE2, "matching_heuristics": True}


def read_checkpoint(path: str, name: str) -> dict[str, Any]:
    """Reads a checkpoint of either kind: ``.pkl`` of a model zoo, or any other name for a file of ``torch.save``.

    Args:
        path: The file on this machine.
        name: The user's name for it, for messages.

    Returns:
        A dict with ``"model"``, a dict of tensors or arrays by name.

    Raises:
        OSError: If the file cannot be read.
        ValueError: In one line, if it holds code, is damaged or holds no state dict.
    """
    data = load_zoo_file(path, name) if path.endswith(".pkl") else load_weights_file(path)
    found = [str(key) for key, value in data.items() if _is_state_dict(value) and value]
    if "model" in data:
        others = [key for key in found if key != "model"]
        if others:
            logger.warning("%s has state dicts beside its 'model', which are left out: %s", name, ", ".join(others))
    elif _is_state_dict(data):
        data = {"model": data}
    elif "state_dict" in found or len(found) == 1:
        entry = "state_dict" if "state_dict" in found else found[0]
        others = [key for key in found if key != entry]
        logger.info("%s: its entry %r is read%s", name, entry, f", and {', '.join(others)} left out" * bool(others))
        data = {"model": data[entry]}
    elif found:
        raise ValueError(f"checkpoint {name!r} has several state dicts, {', '.join(found)}: save one as 'model'")
    if not _is_state_dict(data.get("model")):
        raise ValueError(f"checkpoint {name!r} holds no state dict of tensors")
    return data


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor | np.ndarray) for key, tensor in value.items()
    )


def local_path_of(name: str) -> str:
    """Returns the file behind a URL, also one of ``detectron2://`` and ``catalog://``, and fetches it if necessary.

    Raises:
        ValueError: In one line that names the cache file, if it cannot be fetched.
    """
    if "://" not in name:
        return name
    try:
        return PathManager.get_local_path(name)
    except (OSError, HTTPException, RuntimeError, KeyError) as error:
        cached = cache_file_of(name)
        way_out = f"; a copy of the file can be put at {cached}, where it is looked for first" if cached else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"checkpoint {name!r} cannot be fetched: {reason}{way_out}") from error


def cache_file_of(url: str) -> str:
    """Returns the file that a URL is cached in; ``""`` for a kind of URL that is not cached under its own name."""
    if url.startswith(Detectron2Handler.PREFIX):
        url = Detectron2Handler.S3_DETECTRON2_PREFIX + url.removeprefix(Detectron2Handler.PREFIX)
    if url.startswith("catalog://"):
        try:
            url = ModelCatalog.get(url.removeprefix("catalog://"))
        except (KeyError, RuntimeError):
            return ""
    parsed = urlparse(url)
    filename = url.split("/")[-1]
    if parsed.scheme not in ("http", "https", "ftp") or not filename or url.startswith("https://1drv.ms/"):
        return ""
    return os.path.join(get_cache_dir(), os.path.dirname(parsed.path.lstrip("/")), filename)


def save_atomically(data: Any, path: str) -> None:
    """Calls ``torch.save`` on a file beside the target, flushes it to disk, then renames it.

    Raises:
        OSError: In one line that names the file and, if the disk is full, the space that it needs.
    """
    with open_replacing(path, "wb", durable=True, needed=_size_of(data)) as file:
        target = _FirstError(file)
        try:
            torch.save(data, cast(IO[bytes], target))
        except Exception as error:  # PyTorch's writer raises another error instead of the system's.
            raise target.error or error from None


class _FirstError:
    """A file for ``torch.save`` that keeps the first error of the operating system.

    Attributes:
        error: The error; None as long as there is none.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        """Writes to the file."""
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Does nothing; the file is flushed when it is complete."""


def _size_of(data: Any) -> int:
    """Returns the bytes of all tensors in nested containers."""
    if isinstance(data, torch.Tensor):
        return data.numel() * data.element_size()
    if isinstance(data, dict):
        data = list(data.values())
    return sum(map(_size_of, data)) if isinstance(data, list | tuple) else 0


def damage_of(path: str) -> str:
    """Returns a text on the damage of a file of :func:`save_atomically`, by its checksums; ``""`` without damage."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return f"{wrong} has a wrong checksum" if wrong else ""


def checksums(path: str) -> list[tuple[str, int]]:
    """Returns names and checksums of the contents of a file of :func:`save_atomically`; none for another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [(entry.filename, entry.CRC) for entry in archive.infolist()]
    except (OSError, zipfile.BadZipFile):
        return []
