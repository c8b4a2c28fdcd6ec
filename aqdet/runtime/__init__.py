"""Runs an exported detector with NumPy, ONNX Runtime and Pillow alone; OpenCV is needed for videos only.

``Detector(folder)(image)`` for programs, ``python -m aqdet.runtime`` for the command line. Nothing here
imports torch or Detectron2; what is computed equals what Detectron2 computes around the network.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decode import Detections
    from .detector import Detector
    from .folder import Description, read_description, write_description

__all__ = ["Description", "Detections", "Detector", "read_description", "write_description"]

# Read by ONNX Runtime when it is imported. Otherwise it sends usage data, on Linux too since version 1.32, and
# writes files below the home directory. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Where each public name is defined. Imported when it is first asked for: reading images needs no ONNX Runtime.
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
