"""Check of the segmentations that a training of masks reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.config import CfgNode


def reads_masks(cfg: CfgNode) -> bool:
    """Returns whether a config trains and evaluates masks."""
    return bool(cfg.MODEL.MASK_ON and cfg.MODEL.META_ARCHITECTURE.endswith("GeneralizedRCNN"))


def check_masks(cfg: CfgNode, records: Iterable[Mapping[str, Any]]) -> None:
    """Checks that every object has an outline of the form that the config reads, where masks are trained.

    Detectron2 would stop in the middle of the training, or in the loss, without saying which object lacks it.

    Args:
        cfg: the config.
        records: the records of ``DATASETS.TRAIN``, in Detectron2's form.

    Raises:
        ValueError: in one line, naming the first image with such an object and the way out.
    """
    if not reads_masks(cfg):
        return
    total, lacking, runs = 0, [], []
    for record in records:
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd", 0):
                continue  # left out by the mapper
            total += 1
            outline = annotation.get("segmentation")
            if not outline:
                lacking.append(record["file_name"])
            elif isinstance(outline, Mapping) and cfg.INPUT.MASK_FORMAT == "polygon":
                runs.append(record["file_name"])
    where = f"of {total} objects in DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}"
    if lacking:
        raise ValueError(
            f"MODEL.MASK_ON is True, but {len(lacking)} {where} have no segmentation, one in {lacking[0]}: "
            "MODEL.MASK_ON False trains on boxes alone"
        )
    if runs:
        raise ValueError(
            f"{len(runs)} {where} have a mask (RLE) for segmentation, one in {runs[0]}, and INPUT.MASK_FORMAT is "
            "polygon: INPUT.MASK_FORMAT bitmask reads both"
        )
