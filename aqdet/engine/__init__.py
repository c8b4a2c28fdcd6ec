"""Training: trainer, checks, hooks, parameter groups, starting and resuming."""

from .checks import check_names, fit_to_machine
from .resume import Interrupted
from .trainer import Trainer, build_checkpointer

__all__ = ["Interrupted", "Trainer", "build_checkpointer", "check_names", "fit_to_machine"]
