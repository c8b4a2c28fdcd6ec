"""Questions about what autograd is doing."""

from __future__ import annotations

import torch


def is_recomputing() -> bool:
    """Returns whether this runs inside a backward, where activation checkpointing calls a forward once more.

    torch has no public way to ask; its own ``torch.utils.checkpoint`` asks in the same way.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def refuse_recomputing() -> None:
    """Refuses a call of a norm that has an affine for each pyramid level, where checkpointing computes it once more.

    Raises:
        RuntimeError: because which level is computed once more is not known: levels may come in any order.
    """
    if is_recomputing():
        raise RuntimeError(
            "activation checkpointing cannot compute norms with an affine of each level again, since it does not tell "
            "the level: leave the head out of it, or set MODEL.HEAD_LEVEL_AFFINE False"
        )
