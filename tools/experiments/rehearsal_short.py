"""The smallest rehearsal: a few iterations of both stages of a family, in this process."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from rehearsal_scaling import CLASSIFIER, Family, Form, own_solver, scaled
from torch import Tensor

from aqdet.config import load_config
from aqdet.data import make_shapes, register_declared
from aqdet.engine import Trainer, check_config, fit_to_machine
from aqdet.engine.forward_state import leaving_no_trace, loss_normalizers, set_loss_normalizers
from aqdet.quantization import quantizers

ITERATIONS, IMAGES, SIDE = 16, 4, 64
NUM_BATCHES = 2
"""Of the training data, to tell whether the loss falls: from one iteration to the next it differs by their images."""
MAX_FACTOR, MIN_FACTOR = 2.0, 1.0003
"""No scale moves by more than the first in a short rehearsal, and every input's by more than the second."""


class Watch(HookBase):
    """Notes what a training has done to the loss of some batches, and to each learned scale or range.

    Attributes:
        before: The mean loss of the batches before the first iteration, in training mode.
        after: Their loss after the last iteration, on the same regions and with the same loss normalizers.
        factors: By the name of a quantizer, the largest factor by which an element has moved at any iteration, at
            least 1.
        inputs: The names of the quantizers of inputs whose scale always has a gradient.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        self.before = self.after = math.nan
        self.factors: dict[str, float] = {}
        self.inputs: set[str] = set()
        self._batches = batches
        self._starts: dict[str, Tensor] = {}
        self._normalizers: dict[str, float] | None = None

    def before_step(self) -> None:
        """Notes the loss, and the scales that calibration has left, before the first iteration."""
        if self._normalizers is None:
            self._normalizers = loss_normalizers(self.trainer.model.named_modules())
            self.before = self._loss()
            for name, quantizer in quantizers(self.trainer.model):
                learned = next(quantizer.parameters(), None)
                if learned is not None:
                    self._starts[name] = learned.detach().clone()
                    # PACT's range has a gradient only where it clips (1805.06085), and may clip nothing.
                    if quantizer.spec.role == "input" and quantizer.gradient != "pact":
                        self.inputs.add(name)

    def after_step(self) -> None:
        """Compares the scales with those at the start."""
        for name, quantizer in quantizers(self.trainer.model):
            if name in self._starts:
                ratio = next(quantizer.parameters()).detach() / self._starts[name]
                factor = max(ratio.max().item(), (1 / ratio).max().item())
                self.factors[name] = max(factor, self.factors.get(name, 1.0))

    def after_train(self) -> None:
        """Notes the loss."""
        self.after = self._loss()

    @torch.no_grad()
    def _loss(self) -> float:
        model = self.trainer.model
        total = 0.0
        with leaving_no_trace(model), EventStorage():
            for batch in self._batches:
                set_loss_normalizers(model.named_modules(), self._normalizers or {})
                torch.manual_seed(0)  # of the regions that a two-stage detector draws
                total += sum(loss.item() for loss in model(batch).values())
        return total / len(self._batches)


@dataclasses.dataclass(frozen=True)
class Stage:
    """The findings of a stage of a short rehearsal.

    Attributes:
        config: The config.
        before: The loss of some batches before the first iteration.
        after: The loss of the same batches after the last iteration.
        largest: The largest factor by which a scale or a range has moved; 1 without quantizers.
        smallest: The smallest factor by which an input's scale has moved; 1 without quantizers.
    """

    config: str
    before: float
    after: float
    largest: float
    smallest: float

    def __str__(self) -> str:
        text = f"{self.config}: loss {self.before:.3f} to {self.after:.3f}"
        if self.largest > 1:
            text += f", scales moved by at most x{self.largest:.3f}, those of inputs by at least x{self.smallest:.4f}"
        return text

    def fault(self) -> str:
        """Returns what is wrong, or ``""``."""
        if not self.after < self.before:
            return f"{self.config}: the loss does not fall, {self.before:.3f} to {self.after:.3f}"
        if self.largest > MAX_FACTOR:
            return f"{self.config}: a scale moved by x{self.largest:.3g} in {ITERATIONS} iterations"
        if self.largest > 1 and self.smallest < MIN_FACTOR:
            return f"{self.config}: an input's scale moved by x{self.smallest:.6g} alone in {ITERATIONS} iterations"
        return ""


def train_stage(path: Path, weights: str, output: str, seed: int, depth: int = 0) -> Stage:
    """Trains a stage with its own solver, from ``weights``, and leaves ``model_final.pth`` in ``output``.

    Args:
        path: The config.
        weights: A checkpoint, or "" for random weights.
        output: The folder of the run; its parent has the data.
        seed: The seed of the run.
        depth: The ResNet's depth, if it is not to be the config's own.
    """
    cfg = load_config(path)
    form = Form(ITERATIONS, IMAGES, SIDE, depth)
    overrides = [*scaled(cfg, form), *own_solver(cfg, form).overrides(), "SEED", str(seed), "MODEL.WEIGHTS", weights]
    data = os.path.dirname(output)
    if cfg.MODEL.META_ARCHITECTURE == CLASSIFIER:
        entries = [{"name": "rehearsal_crops", "root": write_crops(Path(data))}]
        overrides += ["DATASETS.IMAGE_FOLDERS", str(entries), "DATASETS.TRAIN", "('rehearsal_crops',)"]
    else:
        scenes = write_scenes(Path(data))
        entries = [{"name": "rehearsal_scenes", "json": str(scenes), "image_root": str(scenes.parent / "images")}]
        overrides += ["DATASETS.DECLARED", str(entries), "DATASETS.TRAIN", "('rehearsal_scenes',)"]
    overrides += ["DATASETS.TEST", "()", "OUTPUT_DIR", output, "MODEL.QUANT.CALIBRATION.NUM_BATCHES", "2"]
    overrides += ["SOLVER.CHECKPOINT_PERIOD", str(ITERATIONS)]
    cfg = load_config(path, overrides)
    check_config(cfg)
    fit_to_machine(cfg)
    register_declared(cfg)
    os.makedirs(output, exist_ok=True)
    trainer = Trainer(cfg)
    watch = Watch(list(itertools.islice(trainer.data_loader, NUM_BATCHES)))
    trainer.register_hooks([watch])
    trainer.resume_or_load(resume=False)
    trainer.train()
    return Stage(
        config=f"{path.parent.name}/{path.stem}",
        before=watch.before,
        after=watch.after,
        largest=max(watch.factors.values(), default=1.0),
        smallest=min((watch.factors[name] for name in watch.inputs), default=1.0),
    )


def write_scenes(folder: Path) -> Path:
    """Writes a few drawn scenes, if they are not there, and returns the file of their annotations."""
    return make_shapes(folder / "scenes", num_images=IMAGES, seed=1, size=2 * SIDE)


def write_crops(folder: Path) -> str:
    """Writes the objects of the scenes as folders of images, if they are not there, and returns the folder."""
    from crop_shapes import crop_records
    from detectron2.data.datasets import load_coco_json

    crops = folder / "crops"
    if not crops.is_dir():
        scenes = write_scenes(folder)
        crop_records(
            load_coco_json(str(scenes), str(scenes.parent / "images"), "rehearsal_cut"), crops, size=SIDE, margin=0.15
        )
    return str(crops)


def rehearse_shortly(families: Sequence[Family], output: str, seed: int) -> None:
    """Trains both stages of each family and prints what they showed.

    Raises:
        ValueError: In one line, after the last family, for stages that do not learn.
    """
    faults = []
    for number, family in enumerate(families, 1):
        folder = os.path.join(output, "short", family.name.replace("/", "_"))
        weights = ""
        for name, path in (("full", family.full), ("low", family.low)):
            stage = train_stage(path, weights, f"{folder}_{name}", seed)
            weights = os.path.join(f"{folder}_{name}", "model_final.pth")
            print(f"[{number}/{len(families)}] {stage}", flush=True)
            faults += [stage.fault()] * bool(stage.fault())
    if faults:
        raise ValueError("; ".join(faults))
