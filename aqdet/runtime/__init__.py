"""Runs an exported detector with numpy, onnxruntime and opencv alone.

``Detector(folder)(image)`` for programs, ``python -m aqdet.runtime`` for the command line. Nothing here
imports torch or Detectron2; what is computed equals what Detectron2 computes around the network.
"""

from .decode import Detections
from .detector import Detector
from .folder import Description, read_description, write_description

__all__ = ["Description", "Detections", "Detector", "read_description", "write_description"]
