"""Training: trainer, checks, hooks, parameter groups."""

from .checks import check_names, fit_to_machine
from .trainer import Trainer, build_checkpointer

__all__ = ["Trainer", "build_checkpointer", "check_names", "fit_to_machine"]
