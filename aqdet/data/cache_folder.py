"""The cache folder, which holds the embedded dataset and the results of checks of declared datasets."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir", "set_cache_dir"]

_cache_dir = ""


def set_cache_dir(path: str) -> None:
    """Sets the folder; ``""`` for ``$AQDET_CACHE`` or ``~/.cache/aqdet``."""
    global _cache_dir
    _cache_dir = path


def cache_dir() -> Path:
    """Returns the folder that :func:`set_cache_dir` has set."""
    default = os.environ.get("AQDET_CACHE") or "~/.cache/aqdet"
    return Path(_cache_dir or default).expanduser()
