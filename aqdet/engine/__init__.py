"""Training: trainer, checks, hooks, parameter groups, starting and resuming."""

from .checks import check_config, fit_to_machine
from .numbers import NonFiniteLoss
from .prepare import Preparation, prepare, prepare_trainer
from .resume import Interrupted
from .solver import build_optimizer
from .trainer import Trainer, build_checkpointer

__all__ = [
    "Interrupted",
    "NonFiniteLoss",
    "Preparation",
    "Trainer",
    "build_checkpointer",
    "build_optimizer",
    "check_config",
    "fit_to_machine",
    "prepare",
    "prepare_trainer",
]
