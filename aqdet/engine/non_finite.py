"""The explanation of a loss or gradient that is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ..data.loader import OtherLoader, seed_generators
from ..utils.distributed import unwrap
from .diagnosis import describe_scales, find_origin
from .forward_state import leaving_no_trace

if TYPE_CHECKING:
    from .trainer import Trainer


def explain_non_finite(trainer: Trainer, wrong: str) -> str:
    """Repeats the forward pass of an iteration and says in one line where the first tensor that is not finite is.

    All processes call this together, with the state from before the iteration put back.

    Args:
        trainer: The trainer, in the iteration.
        wrong: The losses or gradients that are not finite.
    """
    model = unwrap(trainer.model)
    if isinstance(trainer.data_loader, OtherLoader):
        return f"not finite in iteration {trainer.iter}: {wrong}; its images are not known"
    trainer.data_loader.start = trainer.iter
    batch = next(iter(trainer.data_loader))
    seed_generators(trainer.data_loader.seed, trainer.iter, comm.get_rank())
    amp = torch.autocast("cuda", enabled=trainer.cfg.SOLVER.AMP.ENABLED)
    with torch.no_grad(), EventStorage(trainer.iter), leaving_no_trace(model), amp:
        origin = find_origin(model, lambda: model(batch))
    words = [f"not finite in iteration {trainer.iter}: {wrong}"]
    if origin is not None:
        level = f", level {origin.level}" * bool(origin.level)
        words.append(f"first tensor that is not finite: {origin.what}{level}")
        words.append(f"scales around it: {describe_scales(model, origin.around)}")
    else:
        words.append("parameters and outputs of layers are finite: it arises behind them")
    words.append(f"learning rate {max(group['lr'] for group in trainer.optimizer.param_groups):.3g}")
    words.append(f"images {', '.join(str(image.get('image_id', image.get('file_name'))) for image in batch)}")
    # The process where it happened knows most: the others' tensors are finite.
    texts = comm.all_gather("; ".join(words) if origin is not None else "")
    return next((text for text in texts if text), "; ".join(words))
