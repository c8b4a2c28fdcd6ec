"""Questions about what autograd is doing."""

from __future__ import annotations

import torch


def is_recomputing() -> bool:
    """Returns whether this runs inside a backward, where activation checkpointing calls a forward once more.

    torch has no public way to ask; its own ``torch.utils.checkpoint`` asks in the same way.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
