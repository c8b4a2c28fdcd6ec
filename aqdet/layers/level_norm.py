"""Batch norms of the pyramid levels."""

from __future__ import annotations

from typing import Any

from detectron2.layers import CycleBatchNormList
from torch import Tensor, nn

from ..quantization.graph import refuse_recomputing


class LevelNorms(CycleBatchNormList):
    """A batch norm for each pyramid level, each with an affine of its own (AQD, 2007.06919).

    Detectron2's list, which this one is used as, has statistics for each level and one affine for all. A state dict
    with one affine loads, as every level's.

    Args:
        length: number of levels, in whose order the module is called.
        bn_class: class of the batch norms.
        kwargs: arguments of ``bn_class``.
    """

    def __init__(self, length: int, bn_class: type[nn.Module] = nn.BatchNorm2d, **kwargs: Any) -> None:
        super().__init__(length, bn_class, affine=False, **kwargs)
        for level in range(length):
            self[level] = bn_class(**kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the next level's batch norm to ``(N, C, H, W)``.

        Raises:
            RuntimeError: see :func:`~aqdet.quantization.graph.refuse_recomputing`.
        """
        refuse_recomputing()
        return super().forward(x)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            shared = state_dict.pop(prefix + name, None)
            if shared is not None:
                for level in range(len(self)):
                    state_dict.setdefault(f"{prefix}{level}.{name}", shared)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Says which affine there is."""
        return "affine of each level"
