"""Training: trainer, hooks, parameter groups."""

from .trainer import Trainer, build_checkpointer, fit_to_machine

__all__ = ["Trainer", "build_checkpointer", "fit_to_machine"]
