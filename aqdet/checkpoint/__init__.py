"""Checkpoints, which are loaded strictly and without running code, and saved atomically."""

from .checkpointer import CLASSES_KEY, AqdetCheckpointer, build_checkpointer
from .detector import check_calibrated, load_detector
from .files import damage_of, load_pickled_arrays, load_weights_file, save_atomically
from .torchvision import convert_torchvision_resnet

__all__ = [
    "CLASSES_KEY",
    "AqdetCheckpointer",
    "build_checkpointer",
    "check_calibrated",
    "convert_torchvision_resnet",
    "damage_of",
    "load_detector",
    "load_pickled_arrays",
    "load_weights_file",
    "save_atomically",
]
