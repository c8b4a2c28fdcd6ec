"""The full-precision auxiliary path: adaptors that read the low-precision trunk, and a head of its own.

After "Training Quantized Neural Networks with a Full-precision Auxiliary Module" (CVPR 2020, 1903.11236). The
path is scaffolding: its losses reach the quantized weights by a route that skips the head's quantizers, and
it is absent from evaluation and from what is shipped. It lives in ``model.auxiliary``.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn

TAPS = ("fpn",)
SCHEDULES = ("constant", "linear", "cosine")
INITS = ("head", "random")
PREFIX = "auxiliary."


class Adaptor(nn.Module):
    """Full-precision 1x1 convolution and norm, then ReLU: ``h = ReLU(A(o))``.

    It starts as the identity convolution. Deviation from the paper's public code, which starts at random
    and pre-trains the path in full precision first.

    Args:
        channels: of input and output.
        norm: see :func:`detectron2.layers.get_norm`.
    """

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        norm_layer = get_norm(norm, channels)
        self.conv = Conv2d(channels, channels, 1, bias=not norm, norm=norm_layer)
        nn.init.dirac_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same."""
        return torch.relu(self.conv(x))

    @torch.no_grad()
    def align(self, x: Tensor) -> None:
        """Sets the norm's affine to the statistics of ``x``, so that the adaptor passes ``x`` unchanged.

        Without this a fresh norm would centre and scale the features, and a head copied from the detector's
        own would see something that it was not trained on. Statistics are averaged over ranks.
        """
        norm = self.conv.norm
        if not isinstance(getattr(norm, "weight", None), nn.Parameter):
            return  # No norm, or a frozen one, which passes x unchanged as it is.
        moments = torch.stack([x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(moments)
            moments /= dist.get_world_size()
        mean, square = moments
        norm.bias.copy_(mean)
        norm.weight.copy_((square - mean.square()).clamp(min=0).add(norm.eps).sqrt())


class AuxiliaryPath(nn.Module):
    """Adaptors over the pyramid levels and a full-precision head, ``TAPS: fpn``.

    Args:
        adaptors: one for each level.
        head: maps the list of adapted levels to predictions, as the detector's own head does.
        loss_weight: factor of its losses at the start of training.
        schedule: ``"constant"``, or ``"linear"`` or ``"cosine"`` down to 0 at ``max_iter``.
        max_iter: length of training in iterations.

    Raises:
        ValueError: for an unknown schedule or a negative weight.
    """

    def __init__(
        self,
        *,
        adaptors: list[Adaptor],
        head: nn.Module,
        loss_weight: float,
        schedule: str,
        max_iter: int,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"MODEL.AUX.SCHEDULE must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if not loss_weight >= 0:
            raise ValueError(f"MODEL.AUX.LOSS_WEIGHT must not be negative, got {loss_weight}")
        self.adaptors = nn.ModuleList(adaptors)
        self.head = head
        self.loss_weight = loss_weight
        self.schedule = schedule
        self.max_iter = max_iter
        self.needs_alignment = False

    def forward(self, features: list[Tensor]) -> Any:
        """List of ``(N, C, H, W)``, one for each level, to what the head gives."""
        pairs = zip(self.adaptors, features, strict=True)
        if self.needs_alignment and self.training and not torch.is_grad_enabled():
            # The first calibration batch: in training mode, but training itself always has gradients.
            for adaptor, feature in zip(self.adaptors, features, strict=True):
                cast(Adaptor, adaptor).align(feature)
            self.needs_alignment = False
        return self.head([adaptor(feature) for adaptor, feature in pairs])

    def weight_at(self, iteration: int) -> float:
        """Factor of the losses at an iteration, by the schedule."""
        progress = min(max(iteration / max(self.max_iter, 1), 0.0), 1.0)
        if self.schedule == "linear":
            return self.loss_weight * (1 - progress)
        if self.schedule == "cosine":
            return self.loss_weight * 0.5 * (1 + math.cos(math.pi * progress))
        return self.loss_weight

    def initialize_from(self, head: nn.Module) -> None:
        """Starts the auxiliary head as a copy of a trained head of the same structure.

        Quantizer state is left out. The adaptors align themselves at the next calibration.
        """
        state = {key: value for key, value in head.state_dict().items()}
        own = self.head.state_dict()
        self.head.load_state_dict({key: copy.deepcopy(state[key]) for key in own})
        self.needs_alignment = True


def build_auxiliary(cfg: CfgNode, *, head: nn.Module, channels: list[int]) -> AuxiliaryPath:
    """The auxiliary path of a dense detector by ``MODEL.AUX``.

    Args:
        cfg: config.
        head: full-precision head for the path, not yet part of a model.
        channels: channels of each pyramid level.

    Raises:
        ValueError: in one line, for an unknown value of a ``MODEL.AUX`` key.
    """
    aux = cfg.MODEL.AUX
    if aux.TAPS not in TAPS:
        raise ValueError(f"MODEL.AUX.TAPS must be one of {', '.join(TAPS)}, got {aux.TAPS!r}")
    if aux.INIT not in INITS:
        raise ValueError(f"MODEL.AUX.INIT must be one of {', '.join(INITS)}, got {aux.INIT!r}")
    return AuxiliaryPath(
        adaptors=[Adaptor(c, aux.NORM) for c in channels],
        head=head,
        loss_weight=aux.LOSS_WEIGHT,
        schedule=aux.SCHEDULE,
        max_iter=cfg.SOLVER.MAX_ITER,
    )


def _owner(model: nn.Module) -> Any:
    """The model inside a DistributedDataParallel wrapper, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextlib.contextmanager
def detached_auxiliary(model: nn.Module) -> Iterator[nn.Module]:
    """Takes the auxiliary path out of a model for the duration, and puts the same one back.

    Inside, the model is the shipped detector: it has no auxiliary parameter. The optimizer keeps its
    references, so that training goes on afterwards as if nothing had happened.
    """
    owner = _owner(model)
    path = getattr(owner, "auxiliary", None)
    if path is None:
        yield model
        return
    owner.auxiliary = None
    try:
        yield model
    finally:
        owner.auxiliary = path


def strip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the auxiliary path."""
    return {key: value for key, value in state_dict.items() if not key.startswith(PREFIX)}
