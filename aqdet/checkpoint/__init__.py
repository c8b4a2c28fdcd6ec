"""Checkpoints: loaded without running code, loaded strictly, saved atomically."""

from .checkpointer import AqdetCheckpointer, damage_of, load_pickled_arrays, load_weights_file, save_atomically
from .torchvision import convert_torchvision_resnet

__all__ = [
    "AqdetCheckpointer",
    "convert_torchvision_resnet",
    "damage_of",
    "load_pickled_arrays",
    "load_weights_file",
    "save_atomically",
]
