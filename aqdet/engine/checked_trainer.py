"""Detectron2's trainers of one step, which here stop when a loss or a gradient is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

_MIN_GRAD_SCALE = 2.0**-16
"""Smallest scale of mixed precision. It starts at ``2^16``, so that 32 steps in a row were skipped at this value."""


class NonFiniteLoss(FloatingPointError):
    """Raised when a loss, or its gradient, is infinite or not a number."""


class _CheckedLosses:
    """Checks the losses of all processes before the weights move, where Detectron2 checks those of the main one."""

    def _write_metrics(self, loss_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        losses = [value.detach().float() for value in loss_dict.values()]
        numbers = torch.stack([*losses, *self._norms()])
        hidden = self._hidden_failure()
        is_wrong = torch.isfinite(numbers).all().logical_not().float() + float(bool(hidden))
        if comm.get_world_size() > 1:
            dist.all_reduce(is_wrong, dist.ReduceOp.MAX)
        # One copy of all, the processes' flag too: each that is read by itself waits for the GPU.
        *found, flag = torch.cat([numbers, is_wrong.view(1)]).cpu()
        values = dict(zip(loss_dict, found, strict=False))
        if flag.item():
            wrong = ", ".join(f"{name} {value.item()}" for name, value in values.items() if not torch.isfinite(value))
            wrong = wrong or hidden or self._wrong_gradients(found[len(values) :])
            raise NonFiniteLoss(next(text for text in comm.all_gather(wrong) if text))
        super()._write_metrics(values, *args, **kwargs)  # type: ignore[misc]

    def _norms(self) -> list[Tensor]:
        """Returns norms of gradients that have to be finite, 0-dim."""
        return []

    def _wrong_gradients(self, norms: list[Tensor]) -> str:
        """Describes what is wrong with the gradients, by :meth:`_norms`; "" if they are finite."""
        return ""

    def _hidden_failure(self) -> str:
        """Describes what is wrong with the training although the losses may be finite; "" if nothing is."""
        return ""


class CheckedTrainer(_CheckedLosses, SimpleTrainer):
    """Detectron2's ``SimpleTrainer``, which stops when a loss or a gradient is not finite.

    All processes raise :class:`NonFiniteLoss` when a loss of one of them is not finite. A gradient can be infinite
    although the loss is finite, through values that the loss masks.
    """

    def _norms(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        return [nn.utils.get_total_norm(gradients).float()] if gradients else []

    def _wrong_gradients(self, norms: list[Tensor]) -> str:
        if all(torch.isfinite(norm) for norm in norms):
            return ""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        wrong = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
        if wrong:
            return f"gradients of {len(wrong)} parameters, {wrong[-1]} among them"
        largest = max(gradients, key=lambda name: gradients[name].abs().max().item())
        return f"norm of the gradient, which is largest in {largest}"


class CheckedAMPTrainer(_CheckedLosses, AMPTrainer):
    """Detectron2's ``AMPTrainer``, which stops when a loss is not finite or every step is skipped.

    The scaler of mixed precision skips steps whose gradients are not finite. If it skips step after step, the model
    does not train any more, which the losses do not show.
    """

    def _hidden_failure(self) -> str:
        scale = self.grad_scaler.get_scale()
        if scale >= _MIN_GRAD_SCALE:
            return ""
        return f"gradients in step after step, until mixed precision scaled the loss by {scale:.1e}"
