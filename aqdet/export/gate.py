"""The gate before an export: AP and detections of the exported detector beside the trained model's, on a dataset."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from numpy.typing import NDArray
from torch import nn

from ..data import register_declared
from ..evaluation import build_evaluator
from ..evaluation.exported import ExportedDetector
from ..runtime import Detector
from .as_shipped_regions import as_shipped

SHOWN = 0.5
"""Score from which on a detection of the trained model counts as one that a user sees."""
_OVERLAP = 0.5
_SECONDS_BETWEEN_LINES = 5.0


class NotGoodEnough(ValueError):
    """Raised for a detector that must not ship.

    Attributes:
        exit_status: The exit status of a program that stops for it.
    """

    exit_status = 3


@dataclasses.dataclass
class Matches:
    """Detections of the trained and of the exported model, image by image.

    Attributes:
        trained, exported: Numbers of detections with a score of at least :data:`SHOWN`.
        matched: How many detections of ``trained`` have an exported one of the same class at an intersection over union
            of 0.5.
        differences: Differences of the matched detections' scores, exported less trained.
        hits: Scores of the detections that hit an object of their class, for both models.
        objects: The number of objects in the dataset.
    """

    trained: int = 0
    exported: int = 0
    matched: int = 0
    objects: int = 0
    differences: list[float] = dataclasses.field(default_factory=list)
    hits: tuple[list[float], list[float]] = dataclasses.field(default_factory=lambda: ([], []))

    def add(self, trained: Instances, exported: Instances, objects: Instances) -> None:
        """Counts one image."""
        shown = trained[trained.scores >= SHOWN]
        self.trained += len(shown)
        self.exported += int((exported.scores >= SHOWN).sum())
        pairs = match(shown, exported)
        self.matched += len(pairs)
        self.differences += [float(exported.scores[j] - shown.scores[i]) for i, j in pairs]
        self.objects += len(objects)
        for found, hits in zip((trained, exported), self.hits, strict=True):
            hits += [float(found.scores[i]) for i, _ in match(found, objects)]

    def summary(self) -> dict[str, float | int | None]:
        """Returns numbers for a report; at ``threshold`` the exported model has the trained one's recall at SHOWN."""
        wanted = sum(score >= SHOWN for score in self.hits[0])
        best = sorted(self.hits[1], reverse=True)
        differences = np.abs(np.array(self.differences or [0.0]))
        return {
            "trained": self.trained,
            "exported": self.exported,
            "matched": self.matched,
            "objects": self.objects,
            "mean_score_difference": float(differences.mean()),
            "largest_score_difference": float(differences.max()),
            "recall": wanted / self.objects if self.objects else None,
            "threshold": best[wanted - 1] if 0 < wanted <= len(best) else None,
        }


def match(found: Instances, others: Instances) -> list[tuple[int, int]]:
    """Pairs detections with objects or other detections of their class, by descending score, each at most once."""
    if not len(found) or not len(others):
        return []
    overlaps = pairwise_iou(_boxes(found), _boxes(others))
    overlaps[_classes(found)[:, None] != _classes(others)[None]] = 0
    pairs = []
    for index in torch.argsort(found.scores, descending=True, stable=True).tolist():
        value, other = overlaps[index].max(0)
        if value >= _OVERLAP:
            pairs.append((index, int(other)))
            overlaps[:, other] = 0
    return pairs


def _boxes(instances: Instances) -> Boxes:
    return instances.pred_boxes if instances.has("pred_boxes") else instances.gt_boxes


def _classes(instances: Instances) -> torch.Tensor:
    return instances.pred_classes if instances.has("pred_classes") else instances.gt_classes


def dataset_records(cfg: CfgNode, dataset: str) -> tuple[CfgNode, list[dict[str, Any]]]:
    """Returns a config whose test set is a dataset, and the dataset's records.

    Raises:
        ValueError: In one line, if the dataset is unknown or has no records.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = (dataset,)
    try:
        register_declared(cfg, train=False)
        records = DatasetCatalog.get(dataset)
    except (ValueError, KeyError) as error:
        raise ValueError(f"--dataset {dataset!r}: {error}") from error
    if not records:
        raise ValueError(f"--dataset {dataset!r} has no images")
    return cfg, records


def evaluate_both(
    cfg: CfgNode,
    model: nn.Module,
    folder: str | os.PathLike[str],
    dataset: str,
    progress: Callable[[str], object] = lambda _: None,
    float_model: nn.Module | None = None,
) -> dict[str, Any]:
    """Evaluates the trained model, its copy in the arithmetic that ships, and the exported folder on the same images.

    The trained model and the copy differ by rounding: of biases to int32, of the scales of sums, and by float32's error
    at ties, which later layers carry on. The networks of the copy and of the folder have the same codes, and differ by
    the runtime's own reading, resizing and decoding.

    Args:
        cfg: The config of the detector; it is not changed.
        model: The trained, fake-quantized detector.
        folder: The exported folder.
        dataset: The name of a registered or declared dataset.
        progress: A function that is called with a line of text from time to time.
        float_model: The full-precision detector that ``model`` was made from, if it was made without training.

    Returns:
        ``dataset``, ``images``, ``metrics`` (``trained``, ``shipped``, ``exported``, and the ``difference`` between
        ``exported`` and ``trained``), and comparisons with the exported detections (:meth:`Matches.summary`):
        ``detections`` of the trained model, ``shipped_detections`` of the copy. With a ``float_model`` there are its
        metrics, ``float``, and its comparison, ``float_detections``.

    Raises:
        ValueError: In one line, if the dataset is unknown, has other classes or no records.
    """
    cfg, records = dataset_records(cfg, dataset)
    objects = {record["image_id"]: _objects(record) for record in records}
    exported = ExportedDetector(Detector(folder, threads=torch.get_num_threads()))
    models: dict[str, nn.Module] = {"trained": model, "shipped": as_shipped(model)}
    if float_model is not None:
        models["float"] = float_model
    matches = {name: Matches() for name in models}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        evaluators = [build_evaluator(cfg, dataset, os.path.join(scratch, name)) for name in (*matches, "exported")]
        for evaluator in evaluators:
            evaluator.reset()
        start = printed = time.monotonic()
        done = 0
        for inputs in build_detection_test_loader(cfg, dataset):
            outputs = [*(each(inputs) for each in models.values()), exported(inputs)]
            for evaluator, output in zip(evaluators, outputs, strict=True):
                evaluator.process(inputs, output)
            for index, entry in enumerate(inputs):
                shipped = outputs[-1][index]["instances"]
                for own, output in zip(matches.values(), outputs, strict=False):
                    own.add(output[index]["instances"].to("cpu"), shipped, objects[entry["image_id"]])
            done += len(inputs)
            now = time.monotonic()
            if now - printed > _SECONDS_BETWEEN_LINES:
                printed = now
                left = (len(records) - done) * (now - start) / done
                progress(f"{dataset}: {done} of {len(records)} images, ETA {int(left) // 60}:{int(left) % 60:02d} min")
        with contextlib.redirect_stdout(io.StringIO()):  # output of pycocotools
            results_of = [evaluator.evaluate() or {} for evaluator in evaluators]
    found = [_by_name(results) for results in results_of]
    metrics = {}
    for name, value in found[0].items():
        if isinstance(value, int | float):
            values = dict(zip((*matches, "exported"), (results.get(name) for results in found), strict=True))
            metrics[name] = {**values, "difference": _difference(value, values["exported"])}
    summaries = {name: found.summary() for name, found in matches.items()}
    evaluation: dict[str, Any] = {"dataset": dataset, "images": len(records), "metrics": metrics}
    evaluation["detections"] = summaries.pop("trained")
    return evaluation | {f"{name}_detections": summary for name, summary in summaries.items()}


def _by_name(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the metrics of all tasks by name; those of the second and further tasks are named as ``segm AP``."""
    found: dict[str, Any] = {}
    for task, values in results.items():
        prefix = f"{task} " if found else ""
        found |= {f"{prefix}{name}": value for name, value in values.items()}
    return found


def _objects(record: dict[str, Any]) -> Instances:
    annotations = [entry for entry in record.get("annotations", ()) if not entry.get("iscrowd", 0)]
    boxes = [BoxMode.convert(entry["bbox"], entry["bbox_mode"], BoxMode.XYXY_ABS) for entry in annotations]
    instances = Instances((record.get("height", 0), record.get("width", 0)))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor([entry["category_id"] for entry in annotations], dtype=torch.int64)
    return instances


def _difference(trained: float, exported: float | None) -> float | None:
    if exported is None or not math.isfinite(trained) or not math.isfinite(exported):
        return None
    return exported - trained


def check_loss(evaluation: dict[str, Any], max_loss: float) -> None:
    """Checks that the exported model's AP is at most ``max_loss`` below the trained one's.

    If a float model was quantized without training, the float model's AP is compared instead.

    Raises:
        NotGoodEnough: In one line, if the loss is larger, or if there is no AP to compare.
    """
    metrics: dict[str, dict[str, Any]] = evaluation["metrics"]
    name = next(iter(metrics), "")
    values = metrics.get(name, {})
    start, exported = values.get("float", values.get("trained")), values.get("exported")
    difference = None if start is None else _difference(start, exported)
    if difference is None:
        raise NotGoodEnough(f"{evaluation['dataset']} gives no {name or 'AP'} by which --max-loss could be judged")
    if -difference > max_loss:
        raise NotGoodEnough(
            f"{name} on {evaluation['dataset']} falls from {start:.2f} to {exported:.2f} by the "
            f"{'quantization' if 'float' in values else 'export'}, more than --max-loss {max_loss:g}"
        )


def as_bgr(image: NDArray[np.uint8], channels: str) -> NDArray[np.uint8]:
    """Returns a network's image, ``(3, H, W)``, in the form of the runtime's input: ``(H, W, 3)`` BGR."""
    pixels = image.transpose(1, 2, 0)
    return np.ascontiguousarray(pixels if channels == "BGR" else pixels[:, :, ::-1])
