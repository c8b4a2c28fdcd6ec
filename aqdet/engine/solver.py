"""Parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import Tensor, nn

from ..quantization import quantizers

OPTIMIZERS = ("SGD", "AdamW")


class ScaledAdamW(torch.optim.AdamW):
    """AdamW (1711.05101) that moves some parameters in steps of a size of their own.

    Adam's step is about the learning rate whatever the parameter: a scale of 0.0003, as an 8-bit weight has, would
    double in one iteration, and one of 3 stand still. In units of the scale both change by the same share.

    Args:
        params: parameters or groups, see :class:`torch.optim.AdamW`, which the other options are for too.
        units: parameter to the one whose value, where the step starts, its step is multiplied by: itself or another,
            of the same shape or of one element. Weight decay is as ever.
    """

    def __init__(self, params: Iterable[Any], *, units: dict[Tensor, Tensor], **options: Any) -> None:
        super().__init__(params, **options)
        self._units = units

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """See :meth:`torch.optim.Optimizer.step`."""
        scaled = [
            (parameter, parameter.detach() * (1 - group["lr"] * group["weight_decay"]), self._units[parameter])
            for group in self.param_groups
            for parameter in group["params"]
            if parameter in self._units and parameter.grad is not None
        ]
        sizes = [unit.detach().abs() for _, _, unit in scaled]
        result = super().step(closure)
        with torch.no_grad():
            for (parameter, decayed, _), size in zip(scaled, sizes, strict=True):
                parameter.sub_(decayed).mul_(size).add_(decayed)
        return result


def optimizer_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Detectron2's parameter groups, with rules for what it does not know.

    Scales and clipping ranges get ``SCALE_LR_FACTOR`` and no weight decay, except PACT's ``alpha``, which has
    its own; the shared affine of one-BN-per-level lists decays like other norms. Every trainable parameter
    is in exactly one group.
    """
    solver, quant = cfg.SOLVER, cfg.MODEL.QUANT
    special: dict[nn.Parameter, dict[str, float]] = {}
    for _, quantizer in quantizers(model):
        for name, parameter in quantizer.named_parameters():
            special[parameter] = {
                "lr": solver.BASE_LR * quant.SCALE_LR_FACTOR,
                "weight_decay": quant.PACT_ALPHA_DECAY if name == "alpha" else 0.0,
            }
    for module in model.modules():
        if isinstance(module, CycleBatchNormList) and solver.WEIGHT_DECAY_NORM is not None:
            for name, parameter in module.named_parameters(recurse=False):
                values = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY_NORM}
                if name == "bias":
                    values["lr"] *= solver.BIAS_LR_FACTOR
                    if solver.WEIGHT_DECAY_BIAS is not None:
                        values["weight_decay"] = solver.WEIGHT_DECAY_BIAS
                special[parameter] = values
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    result = []
    for group in groups:
        rest = [p for p in group["params"] if p not in special]
        if rest:
            result.append({**group, "params": rest})
    by_values: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, values in special.items():
        if parameter.requires_grad:
            by_values.setdefault((values["lr"], values["weight_decay"]), []).append(parameter)
    for (lr, weight_decay), parameters in by_values.items():
        result.append({"params": parameters, "lr": lr, "weight_decay": weight_decay})
    return result


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD as Detectron2 builds it, or :class:`ScaledAdamW`, over :func:`optimizer_groups`.

    With AdamW a quantizer's parameters move in units of its scale or clipping range, so that the learning rate times
    ``MODEL.QUANT.SCALE_LR_FACTOR`` is the share by which an iteration changes it. SGD needs no such units: the
    gradient factor of LSQ (1902.08153) is made for it.

    Raises:
        ValueError: for an unknown ``SOLVER.OPTIMIZER``.
    """
    solver = cfg.SOLVER
    groups = optimizer_groups(cfg, model)
    if solver.OPTIMIZER == "SGD":
        return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(
            groups,
            lr=solver.BASE_LR,
            momentum=solver.MOMENTUM,
            nesterov=solver.NESTEROV,
            weight_decay=solver.WEIGHT_DECAY,
        )
    if solver.OPTIMIZER == "AdamW":
        units = {}
        for _, quantizer in quantizers(model):
            # The first parameter of each is its scale or alpha; offsets and thresholds lie on the same axis.
            learned = list(quantizer.parameters())
            units.update({parameter: learned[0] for parameter in learned})
        return maybe_add_gradient_clipping(cfg, ScaledAdamW)(
            groups, units=units, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY
        )
    raise ValueError(f"SOLVER.OPTIMIZER must be one of {', '.join(OPTIMIZERS)}, got {solver.OPTIMIZER!r}")
