"""Other processes that pretend, beside :mod:`pretended_gpu`: what they do together is counted, and nobody waits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from pretended_gpu import ledger_in_use, place
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore


def _gather(output: Tensor, own: Tensor, *_: Any, **__: Any) -> None:
    """Stands for a collective in which all processes have what this one has."""
    ledger_in_use().collectives["all_gather", place()] += 1
    if not getattr(own, "inner", own).is_meta:
        output.view(-1, own.numel()).copy_(own.view(1, -1))


def _reduce(tensor: Tensor, *_: Any, **__: Any) -> None:
    ledger_in_use().collectives["all_reduce", place()] += 1


@contextlib.contextmanager
def processes(number: int) -> Iterator[None]:
    """Pretends to be one of several processes, whose sums and gathered values are those of this one."""
    if number == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    gathers = [name for name in ("all_gather_into_tensor", "all_gather_single") if hasattr(dist, name)]
    try:
        with contextlib.ExitStack() as stack:
            for name in gathers:
                stack.enter_context(mock.patch.object(dist, name, _gather))
            stack.enter_context(mock.patch.object(dist, "all_reduce", _reduce))
            yield
    finally:
        dist.destroy_process_group()
