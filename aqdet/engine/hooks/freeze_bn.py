"""The hook that freezes BN statistics late in training."""

from __future__ import annotations

import logging

from detectron2.engine import HookBase
from torch.nn.modules.batchnorm import _BatchNorm

from ...modeling.scaffold import SCAFFOLD_PREFIXES
from ...utils.distributed import broadcast_from_main, unwrap

logger = logging.getLogger(__name__)


class FreezeBNHook(HookBase):
    """Freezes the running statistics of the detector's BNs from an iteration on, and normalizes by them.

    Their affine parameters go on training, and so does the auxiliary path. The hook sets the mode before each step,
    since evaluation switches the whole model back to training mode; so a resume needs no state. All processes freeze
    the main one's statistics, which are those in the checkpoint.

    Args:
        iteration: ``SOLVER.FREEZE_BN_ITER``.
        max_iter: ``SOLVER.MAX_ITER``; the hook warns if the iteration is not before it.

    Raises:
        ValueError: If the iteration is negative.
    """

    def __init__(self, iteration: int, max_iter: int | None = None) -> None:
        if iteration < 0:
            raise ValueError(f"SOLVER.FREEZE_BN_ITER must be -1 for never, or an iteration from 0, got {iteration}")
        if max_iter is not None and iteration >= max_iter:
            logger.warning(
                "SOLVER.FREEZE_BN_ITER %d is not before SOLVER.MAX_ITER %d: BN never freezes", iteration, max_iter
            )
        self._iteration = iteration

    def before_step(self) -> None:
        """Freezes the statistics from the given iteration on."""
        if self.trainer.iter < self._iteration:
            return
        model = self.trainer.model
        named = unwrap(model).named_modules()
        norms = [m for name, m in named if isinstance(m, _BatchNorm) and not name.startswith(SCAFFOLD_PREFIXES)]
        if self.trainer.iter == self._iteration:
            if not norms:
                logger.warning("SOLVER.FREEZE_BN_ITER: the detector has no BN to freeze")
                return
            logger.info("BN statistics are frozen from iteration %d on", self._iteration)
            broadcast_from_main(buffer for norm in norms for buffer in norm.buffers())
        for norm in norms:
            norm.eval()
