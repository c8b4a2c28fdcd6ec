"""
Datasets: the embedded one, declared ones and their check, mappers and loader.

Names are looked up when they are first used: reading and checking data needs neither torch nor Detectron2, the rest
does. ``aqdet.data.embedded.register`` registers the embedded dataset.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .embedded.folder import make_shapes
    from .embedded.scenes import SHAPE_CLASSES
    from .mappers import build_mapper
    from .registry import check_datasets, check_num_classes, complete_num_classes, register_declared

_MODULES = {
    "SHAPE_CLASSES": "embedded.scenes",
    "build_mapper": "mappers",
    "check_datasets": "registry",
    "check_num_classes": "registry",
    "complete_num_classes": "registry",
    "make_shapes": "embedded.folder",
    "register_declared": "registry",
}

__all__ = [
    "SHAPE_CLASSES",
    "build_mapper",
    "check_datasets",
    "check_num_classes",
    "complete_num_classes",
    "make_shapes",
    "register_declared",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
