"""The scaffold of a model: all that it has during training alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ...utils.distributed import unwrap
from .auxiliary import AuxiliaryPath
from .distillation import Distillation

AUXILIARY_PREFIX = "auxiliary."
SCAFFOLD_PREFIXES = (AUXILIARY_PREFIX, "extra_head.")
"""Prefixes of the state-dict keys that a shipped model does not have."""


@dataclasses.dataclass
class Scaffold:
    """All that a model has during training alone; by default nothing.

    Attributes:
        auxiliary: full-precision path over the trunk, or None.
        extra_head: another head like the model's own, whose losses are added, or None.
        extra_loss_weight: factor of its losses.
        distillation: teacher and its losses; set by the trainer, otherwise None.
    """

    auxiliary: AuxiliaryPath | None = None
    extra_head: nn.Module | None = None
    extra_loss_weight: float = 1.0
    distillation: Distillation | None = None


class Scaffolded:
    """Mixin of the models that can have a scaffold, before their ``nn.Module``.

    Its parts are attributes of the model, so that their state-dict keys are ``auxiliary.*`` and ``extra_head.*``.
    """

    auxiliary: AuxiliaryPath | None
    extra_head: nn.Module | None
    extra_loss_weight: float
    distillation: Distillation | None

    @property
    def scaffold(self) -> Scaffold:
        """The parts that the model has at the moment; assign one to replace them."""
        return Scaffold(self.auxiliary, self.extra_head, self.extra_loss_weight, self.distillation)

    @scaffold.setter
    def scaffold(self, scaffold: Scaffold) -> None:
        for field in dataclasses.fields(scaffold):
            setattr(self, field.name, getattr(scaffold, field.name))


@contextlib.contextmanager
def without_scaffold(model: nn.Module) -> Iterator[nn.Module]:
    """Takes the scaffold out of a model for the duration, and puts the same back.

    Inside, the model is the shipped one: it has no parameter of the scaffold. The optimizer keeps its references, so
    that training goes on afterwards as if nothing had happened. A model that has no scaffold stays as it is.
    """
    owner = unwrap(model)
    if not isinstance(owner, Scaffolded):
        yield model
        return
    scaffold = owner.scaffold
    owner.scaffold = Scaffold()
    try:
        yield model
    finally:
        owner.scaffold = scaffold


def strip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict without the keys of the scaffold."""
    return {key: value for key, value in state_dict.items() if not key.startswith(SCAFFOLD_PREFIXES)}
