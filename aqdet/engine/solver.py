"""Parameter groups, and the optimizer's step for the parameters of quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList
from detectron2.solver.build import _create_gradient_clipper, get_default_optimizer_params
from torch import Tensor, nn

from ..modeling.config_requests import OPTIMIZER_KEYS, acknowledge
from ..quantization import quantizers

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


class RelativeStep(torch.optim.Optimizer):
    """Mix-in of an optimizer that steps the parameters of quantizers by a share of their size.

    A scale, a clipping range, an offset or a threshold ``p`` lies on an axis whose unit ``u`` is the quantizer's own
    scale (or alpha). It is learned as ``p = u t`` by Adam (1412.6980) on ``t``, whose gradient is ``u dL/dp``. So an
    iteration changes a scale by at most the share ``lr``, whatever its size, its number of elements, its bit width,
    the batch, the number of processes, and the optimizer of all other parameters. Plain steps differ by four orders of
    magnitude between an 8-bit weight scale and the scale of a large input: one explodes while the other stands still.

    Parameter groups with ``"relative": True`` follow this rule, and all others follow the optimizer mixed with.

    Args:
        params: Parameter groups, each with a key ``"relative"``.
        units: Relative parameter -> the parameter whose value before the step is its unit: itself, or another one of
            the same shape or of one element.
        clip: Clips the gradient of a parameter that is not relative, in place, before a step; None for no clipping.
        options: Options of the optimizer mixed with.
    """

    betas = (0.9, 0.999)
    eps = 1e-8

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        units: dict[Tensor, Tensor],
        clip: Callable[[Tensor], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self._units = units
        self._clip = clip

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """See :meth:`torch.optim.Optimizer.step`."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["relative"]]
        try:
            if self._clip is not None:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        self._clip(parameter)
            result = super().step(closure)  # type: ignore[safe-super]
        finally:
            self.param_groups = groups
        relative = [
            (group, [p for p in group["params"] if p.grad is not None]) for group in groups if group["relative"]
        ]
        # All units are read before the first step, since a unit may be in another group.
        units = [
            [unit.expand_as(p) for unit, p in zip(sizes, params, strict=True)]
            for sizes, (_, params) in zip(map(self._sizes, relative), relative, strict=True)
        ]
        for (group, params), units_of_group in zip(relative, units, strict=True):
            if params:
                self._step_relative(group, params, units_of_group)
        return result

    @torch.no_grad()
    def _sizes(self, group: tuple[dict[str, Any], list[Tensor]]) -> list[Tensor]:
        return list(torch._foreach_abs([self._units[p] for p in group[1]])) if group[1] else []

    @torch.no_grad()
    def _step_relative(self, group: dict[str, Any], params: list[Tensor], units: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        beta1, beta2 = self.betas
        grads = torch._foreach_mul([cast(Tensor, p.grad) for p in params], units)
        first, second = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_lerp_(second, torch._foreach_mul(grads, grads), 1 - beta2)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        counts = [step.item() for step in steps]  # on the CPU, so that no GPU is waited for
        sizes = torch._foreach_div(second, [1 - beta2**count for count in counts])
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, self.eps)
        shares = torch._foreach_div(first, [1 - beta1**count for count in counts])
        torch._foreach_div_(shares, sizes)
        # Adam's own bound is 3 times the learning rate, after gradients that were near zero.
        torch._foreach_clamp_max_(shares, 1.0)
        torch._foreach_clamp_min_(shares, -1.0)
        torch._foreach_mul_(shares, units)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, shares, alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`torch.optim.Optimizer.load_state_dict`.

        Raises:
            ValueError: If a version that stepped scales like weights has written the state.
        """
        if any("relative" not in group for group in state_dict["param_groups"]):
            if any(group["relative"] for group in self.param_groups):
                raise ValueError(
                    "the checkpoint's optimizer state is of an older version of aqdet, which stepped scales as it "
                    "stepped weights, and cannot be continued: start from its weights (MODEL.WEIGHTS, without --resume)"
                )
            groups = [{"relative": False, **group} for group in state_dict["param_groups"]]
            state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict(state_dict)


def with_relative_step(optimizer: type[torch.optim.Optimizer]) -> type[RelativeStep]:
    """Returns the class of an optimizer that steps quantizers' parameters as :class:`RelativeStep` does."""
    return type(f"Relative{optimizer.__name__}", (RelativeStep, optimizer), {})


def optimizer_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Returns Detectron2's parameter groups, with rules for parameters that it does not know.

    The parameters of quantizers step by a share of their size (:class:`RelativeStep`), at most ``QUANT.SCALE_LR``, and
    those of activations at most this times ``QUANT.INPUT.SCALE_LR_FACTOR``. They have no weight decay, except PACT's
    ``alpha``, which has its own. The shared affine parameters of one-BN-per-level lists decay like other norms. Every
    trainable parameter is in exactly one group.
    """
    solver, quant = cfg.SOLVER, cfg.MODEL.QUANT
    special: dict[nn.Parameter, dict[str, Any]] = {}
    for _, quantizer in quantizers(model):
        factor = quant.INPUT.SCALE_LR_FACTOR if quantizer.spec.role == "input" else 1.0
        for name, parameter in quantizer.named_parameters():
            special[parameter] = {
                "lr": quant.SCALE_LR * factor,
                "weight_decay": quant.PACT_ALPHA_DECAY if name == "alpha" else 0.0,
                "relative": True,
            }
    for module in model.modules():
        if isinstance(module, CycleBatchNormList) and solver.WEIGHT_DECAY_NORM is not None:
            for name, parameter in module.named_parameters(recurse=False):
                values = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY_NORM, "relative": False}
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
            result.append({**group, "params": rest, "relative": False})
    by_values: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter, values in special.items():
        if parameter.requires_grad:
            by_values.setdefault(tuple(values.items()), []).append(parameter)
    result.extend({"params": parameters, **dict(values)} for values, parameters in by_values.items())
    return result


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds SGD as Detectron2 does, or AdamW (1711.05101), over :func:`optimizer_groups`.

    The parameters of quantizers follow :class:`RelativeStep` with both.

    Raises:
        ValueError: If ``SOLVER.OPTIMIZER`` is unknown.
    """
    acknowledge(model, *OPTIMIZER_KEYS)
    solver = cfg.SOLVER
    options: dict[str, Any] = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.OPTIMIZER == "SGD":
        options.update(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    elif solver.OPTIMIZER != "AdamW":
        raise ValueError(f"SOLVER.OPTIMIZER must be one of {', '.join(OPTIMIZERS)}, got {solver.OPTIMIZER!r}")
    units: dict[Tensor, Tensor] = {}
    for _, quantizer in quantizers(model):
        # The first parameter of each quantizer is its scale or alpha; offsets and thresholds lie on the same axis.
        learned = list(quantizer.parameters())
        units.update({parameter: learned[0] for parameter in learned})
    if solver.CLIP_GRADIENTS.ENABLED:
        # Detectron2's maybe_add_gradient_clipping would clip quantizers' gradients too, which can have any size.
        options["clip"] = _create_gradient_clipper(solver.CLIP_GRADIENTS)
    return with_relative_step(OPTIMIZERS[solver.OPTIMIZER])(optimizer_groups(cfg, model), units=units, **options)
