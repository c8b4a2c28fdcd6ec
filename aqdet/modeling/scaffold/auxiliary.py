"""The full-precision auxiliary path: adaptors that read the low-precision trunk, and a head of its own.

After "Training Quantized Neural Networks with a Full-precision Auxiliary Module" (CVPR 2020, 1903.11236). The
path is scaffolding: its losses reach the quantized weights by a route that skips later quantizers, and it is
absent from evaluation and from what is shipped. It lives in ``model.auxiliary``.

Deviation: here the operands of a sum are quantized (``RESIDUAL_NUM_BITS``, 8), as in the integer addition that is
shipped, and the path reads the sum of the quantized ones, so that it reads what the detector computes. The gradient
passes these quantizers straight through, but not where an operand is clipped; the paper's sums have none.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, cast

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn

from ...layers import forget_sites
from ...quantization.kernels import free_norms, keeping_less
from ..backbone import BottomUp, QuantFPN, build_fpn
from .adaptor import Adaptor, waiting_adaptors
from .aggregation import Aggregation, AggregationBlock, tapped_sums

TAPS = ("fpn", "backbone", "both")
SCHEDULES = ("constant", "linear", "cosine")
INITS = ("head", "random")


class AuxiliaryPath(nn.Module):
    """Adaptors over the low-precision trunk and a full-precision head.

    ``TAPS: fpn`` adapts the pyramid levels, which the head reads. ``TAPS: backbone`` aggregates the blocks'
    sums and ends in a float pyramid of its own, which the head reads. ``TAPS: both`` has one head, too, which
    reads the mean of the two: it sees features of the size that it was trained on, and its losses weigh as much as with
    either. It costs little more than ``backbone`` (RetinaNet R18, 640x640: ``fpn`` 55.6 GMACs, ``backbone`` 61.6 and
    ``both`` 62.2; with two heads it would be 117). An image classifier has ``backbone``, without a pyramid.

    Args:
        adaptors: one for each level of ``features``; empty for ``backbone``.
        trunk: maps the sums to levels by name; None for ``fpn``.
        levels: names of the levels that the head reads.
        head: maps the list of levels to predictions, as the model's own head does.
        loss_weight: factor of its losses at the start of training.
        schedule: ``"constant"``, or ``"linear"`` or ``"cosine"`` down to 0 at ``max_iter``.
        max_iter: length of training in iterations.
        head_prefix: prefix of the head's keys in the state dict of the model, for :meth:`initialize_from`.

    Raises:
        ValueError: for an unknown schedule or a negative weight.
    """

    def __init__(
        self,
        *,
        adaptors: Sequence[Adaptor] = (),
        trunk: nn.Module | None = None,
        levels: Sequence[str] = (),
        head: nn.Module,
        loss_weight: float,
        schedule: str,
        max_iter: int,
        head_prefix: str = "head.",
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"MODEL.AUX.SCHEDULE must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if not loss_weight >= 0:
            raise ValueError(f"MODEL.AUX.LOSS_WEIGHT must not be negative, got {loss_weight}")
        self.adaptors = nn.ModuleList(adaptors)
        self.trunk = trunk
        self.levels = list(levels)
        self.head = head
        self.loss_weight = loss_weight
        self.schedule = schedule
        self.max_iter = max_iter
        self._counterparts = {"trunk.": "backbone.", "head.": head_prefix}
        self._taps: list[Tensor] | None = None  # inside tapping()

    @contextlib.contextmanager
    def tapping(self, backbone: Any) -> Iterator[None]:
        """Reads the blocks of a backbone, whose forward pass is inside the context, where it aggregates them.

        The backbone keeps less for backward there, since the path keeps activations of its own.

        Args:
            backbone: the trunk, with its ResNet in ``bottom_up``.
        """
        with keeping_less():
            if self.trunk is None:
                yield
                return
            with tapped_sums(backbone.bottom_up) as self._taps:
                try:
                    yield
                finally:
                    self._taps = None

    def forward(self, features: Sequence[Tensor]) -> Any:
        """Computes the predictions of the head, see :meth:`read`."""
        with free_norms():
            return self.head(self.read(features))

    @free_norms()
    def read(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Computes the levels that the head reads, in full precision.

        Args:
            features: features that the model's own head reads, ``(N, C, H, W)`` for each level.

        Raises:
            RuntimeError: if it aggregates a backbone's blocks, and the backbone has not run in :meth:`tapping`.
        """
        adapted = []
        if len(self.adaptors):
            adapted = [adaptor(feature) for adaptor, feature in zip(self.adaptors, features, strict=True)]
        if self.trunk is None:
            return adapted
        if not self._taps:
            raise RuntimeError("the auxiliary path reads the backbone's blocks: run the backbone in its tapping()")
        own = self.trunk(self._taps)
        levels = [own[name] for name in self.levels]
        if adapted:
            levels = [(a + b) / 2 for a, b in zip(adapted, levels, strict=True)]
        return levels

    @property
    def needs_alignment(self) -> bool:
        """Whether adaptors wait for a calibration batch, see :func:`~aqdet.modeling.scaffold.adaptor.aligning`."""
        return bool(waiting_adaptors(self))

    def weight_at(self, iteration: int) -> float:
        """Returns the factor of the losses at an iteration, by the schedule."""
        progress = min(max(iteration / max(self.max_iter, 1), 0.0), 1.0)
        if self.schedule == "linear":
            return self.loss_weight * (1 - progress)
        if self.schedule == "cosine":
            return self.loss_weight * 0.5 * (1 + math.cos(math.pi * progress))
        return self.loss_weight

    def initialize_from(self, model: nn.Module, trained: Set[str] = frozenset()) -> list[str]:
        """Starts the path from a trained model: head, pyramid and the projections ``D`` as copies of its own.

        Quantizer state is left out. The next calibration aligns the adaptors, one after the other, so that each
        block's ``h`` starts as near to the trunk's own output as its adaptor can make it.

        Args:
            model: model whose ``backbone`` and heads have the structure of this path's.
            trained: keys of this path's state dict that stay as they are, such as those of a path with other taps.

        Returns:
            The keys that the model has no counterpart for. If there are any, nothing is changed.
        """
        adaptors = {f"{name}." for name, module in self.named_modules() if isinstance(module, Adaptor)}
        state = model.state_dict()
        copies, missing = {}, []
        for key, value in self.state_dict().items():
            if key.startswith(tuple(adaptors)) or key in trained:
                continue
            part, _, rest = key.partition(".")
            theirs = state.get(self._counterparts[f"{part}."] + rest)
            if theirs is not None and theirs.shape == value.shape:
                copies[key] = theirs.clone()
            elif not key.endswith("num_batches_tracked"):  # FrozenBN has none
                missing.append(key)
        if not missing:
            self.load_state_dict(copies, strict=False)
            for name, module in self.named_modules():
                if isinstance(module, AggregationBlock) and f"{name}.shortcut.weight" not in trained:
                    module.scale_shortcut()
                elif isinstance(module, Adaptor) and f"{name}.conv.weight" not in trained:
                    module.needs_alignment = True
        return missing


def build_auxiliary(
    cfg: CfgNode,
    *,
    head: nn.Module,
    backbone: Backbone,
    shapes: Mapping[str, ShapeSpec],
    head_prefix: str = "head.",
) -> AuxiliaryPath:
    """Builds the auxiliary path of a model by ``MODEL.AUX``.

    Args:
        cfg: config.
        head: full-precision head for the path, not yet part of a model.
        backbone: the trunk, with its ResNet in ``bottom_up``; its structure is read, nothing of it is kept.
        shapes: the features that the model's head reads, by name.
        head_prefix: prefix of the head's keys in the state dict of the model.

    Raises:
        ValueError: in one line, for an unknown value of a ``MODEL.AUX`` key, or taps that the backbone lacks.
    """
    aux = cfg.MODEL.AUX
    if aux.TAPS not in TAPS:
        raise ValueError(f"MODEL.AUX.TAPS must be one of {', '.join(TAPS)}, got {aux.TAPS!r}")
    if aux.INIT not in INITS:
        raise ValueError(f"MODEL.AUX.INIT must be one of {', '.join(INITS)}, got {aux.INIT!r}")
    adaptors: list[Adaptor] = []
    trunk: BottomUp | QuantFPN | None = None
    if isinstance(backbone, BottomUp) and aux.TAPS != "backbone":
        raise ValueError(f"MODEL.AUX.TAPS must be 'backbone' where there is no pyramid, got {aux.TAPS!r}")
    if aux.TAPS in ("fpn", "both"):
        adaptors = [Adaptor(shape.channels, aux.NORM) for shape in shapes.values()]
    if aux.TAPS in ("backbone", "both"):
        if not isinstance(backbone, (BottomUp, QuantFPN)):
            raise ValueError(
                f"MODEL.AUX.TAPS {aux.TAPS!r} reads the blocks of a build_quant_* backbone: MODEL.BACKBONE.NAME "
                f"must be one, got {cfg.MODEL.BACKBONE.NAME!r}"
            )
        aggregation = Aggregation(cast(ResNet, backbone.bottom_up), norm=aux.NORM)
        is_pyramid = isinstance(backbone, QuantFPN)
        trunk = build_fpn(cfg, aggregation, norm=aux.NORM) if is_pyramid else BottomUp(aggregation)
    path = AuxiliaryPath(
        adaptors=adaptors,
        trunk=trunk,
        levels=list(shapes),
        head=head,
        loss_weight=aux.LOSS_WEIGHT,
        schedule=aux.SCHEDULE,
        max_iter=cfg.SOLVER.MAX_ITER,
        head_prefix=head_prefix,
    )
    forget_sites(path)
    return path
