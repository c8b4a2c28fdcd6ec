"""Runs an exported detector with NumPy, ONNX Runtime and Pillow alone; OpenCV is needed for videos only.

Programs call ``Detector(folder)(image)``; the command line is ``python -m aqdet.runtime``. Nothing here imports torch
or Detectron2; preprocessing and decoding equal Detectron2's.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decode import Detections
    from .detector import Detector
    from .folder import Description, read_description, write_description

__all__ = ["Description", "Detections", "Detector", "read_description", "write_description"]

# ONNX Runtime reads this variable when it is imported. Without it, it sends usage data, on Linux since version 1.32,
# and writes files below the home directory. The value 0 allows that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# The module that defines each public name, imported on first use: reading images needs no ONNX Runtime.
_HOMES = {
    "Description": "folder",
    "Detections": "decode",
    "Detector": "detector",
    "read_description": "folder",
    "write_description": "folder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
