"""Training: trainer, checks, hooks, parameter groups, starting and resuming."""

from ..checkpoint import build_checkpointer
from .checked_trainer import NonFiniteLoss
from .config_check import check_config, fit_to_machine
from .hooks.interrupt import Interrupted
from .prepare import Preparation, prepare, prepare_trainer
from .solver import build_optimizer
from .trainer import Trainer

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
