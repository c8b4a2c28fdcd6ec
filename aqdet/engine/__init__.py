"""Training: trainer, checks, hooks, parameter groups, starting and resuming."""

from .checks import check_config, fit_to_machine
from .numbers import NonFiniteLoss
from .resume import Interrupted
from .trainer import Trainer, build_checkpointer

__all__ = ["Interrupted", "NonFiniteLoss", "Trainer", "build_checkpointer", "check_config", "fit_to_machine"]
