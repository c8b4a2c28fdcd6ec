"""The hook that warns of quantizers that do not learn."""

from __future__ import annotations

import logging
from typing import cast

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from ...layers import output_first
from ...quantization import Quantizer, quantizers
from ...quantization.functional import SCALE_EPS

logger = logging.getLogger(__name__)

_MAX_LISTED = 5


class QuantizerWatchHook(HookBase):
    """Warns once of each quantizer that does not learn as it should, and names it.

    The warnings are for scales at their floor, layers whose weights all have one quantized value, and scales or
    clipping ranges that have changed by more than a factor of ``MAX_FACTOR`` or not at all since this process began to
    train. The hook looks every ``period`` iterations and after the last one.

    Args:
        period: The number of iterations between two looks; a look costs about as much as quantizing the weights once.
    """

    MAX_FACTOR = 4.0

    def __init__(self, period: int = 100) -> None:
        self._period = period
        self._said: set[str] = set()
        self._started: dict[str, Tensor] = {}

    def before_step(self) -> None:
        """Records the first scales and ranges, which are known after calibration."""
        if not self._started:
            self._started = _sizes(self.trainer.model)

    def after_step(self) -> None:
        """Checks the quantizers every ``period`` iterations and after the last one."""
        next_iteration = self.trainer.iter + 1
        if next_iteration % self._period == 0 or next_iteration == self.trainer.max_iter:
            model = self.trainer.model
            self._warn(
                [name for name, q in quantizers(model) if _is_at_floor(q)],
                "quantizers have a scale at its floor, below which it cannot shrink",
            )
            self._warn(
                [name for name, module in model.named_modules() if _has_one_value(module)],
                "layers have one quantized value for all their weights, and so no function",
            )
            moved = {
                name: torch.maximum(size / self._started[name], self._started[name] / size).max().item()
                for name, size in _sizes(model).items()
                if name in self._started
            }
            self._warn(
                [name for name, factor in moved.items() if factor > self.MAX_FACTOR],
                f"quantizers have a scale that moved by more than x{self.MAX_FACTOR:g} since training started "
                "(MODEL.QUANT.SCALE_LR, SOLVER.BASE_LR)",
            )
            if next_iteration - self.trainer.start_iter >= self._period:
                self._warn(
                    [name for name, factor in moved.items() if factor == 1 and not _may_clip_nothing(model, name)],
                    "quantizers have a scale that has not moved since training started: no gradient reaches it",
                )

    def _warn(self, names: list[str], what: str) -> None:
        new = [name for name in names if name not in self._said]
        self._said.update(new)
        if new:
            more = ", ..." * (len(new) > _MAX_LISTED)
            logger.warning("%d %s: %s%s", len(new), what, ", ".join(new[:_MAX_LISTED]), more)


def _sizes(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the scale or alpha of every quantizer that learns one, by name."""
    learned = {name: next(quantizer.parameters(), None) for name, quantizer in quantizers(model) if quantizer.is_active}
    return {
        name: p.detach().abs().clamp(min=SCALE_EPS) for name, p in learned.items() if p is not None and p.requires_grad
    }


def _may_clip_nothing(model: nn.Module, name: str) -> bool:
    """Returns whether a quantizer may clip nothing, and then has no gradient, as PACT's (1805.06085)."""
    return cast(Quantizer, model.get_submodule(name)).gradient == "pact"


@torch.no_grad()
def _is_at_floor(quantizer: Quantizer) -> bool:
    if not quantizer.is_active:
        return False
    grid = quantizer.grid()
    scale = getattr(quantizer, "scale", None) if grid is None else grid.scale
    return scale is not None and bool((scale <= SCALE_EPS).any())


@torch.no_grad()
def _has_one_value(module: nn.Module) -> bool:
    quantizer = getattr(module, "weight_quantizer", None)
    if not isinstance(quantizer, Quantizer) or not quantizer.is_active:
        return False
    weight = quantizer.fake_quantize(output_first(module)).reshape(quantizer.num_scales, -1)
    return bool((weight == weight[:, :1]).all())
