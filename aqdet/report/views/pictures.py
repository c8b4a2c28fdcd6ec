"""The worst and the best images, with the boxes, and masks if there are any, of the ground truth and of each run."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image
from pycocotools import mask as coco_mask

from ..detections import FALSE, FOUND, MISSED, Outcome, f1, has_masks, image_outcomes, rank_images
from ..evaluation_results import TestSet
from ..layer_facts import UNREADABLE
from ..run_folder import Run
from .table import LegendEntry

_COLUMNS = {2: "two", 3: "three", 5: "three", 6: "three"}  # columns by number of pictures; else four
PICTURE_SIDE = 640
"""Length in pixels of the longer side of an embedded picture."""
OUTCOME_COLOURS = {FOUND: "#1f6feb", FALSE: "#d9480f", MISSED: "#b4007f"}
_TRUTH_COLOUR = "#1a7f37"
_OUTCOME_TEXT = {FOUND: "found", FALSE: "false detection", MISSED: "missed object"}


def pictures(runs: Sequence[Run], sets: Sequence[TestSet], min_score: float, count: int) -> dict[str, Any] | None:
    """Returns the images of each test set, or None if there are no detections.

    Args:
        runs: The runs; an image that cannot be read is noted with them.
        sets: The test sets.
        min_score: The lowest score of the detections that count.
        count: How many of the worst and of the best images are shown.
    """
    shown_sets = []
    for number, test_set in enumerate(sets):
        shown = [(run, e) for run, e in zip(runs, test_set.evaluations, strict=True) if e is not None]
        if not shown or test_set.truth is None or not test_set.truth.imgs or count == 0:
            continue
        outcomes = [image_outcomes(evaluation, min_score) for _, evaluation in shown]
        masks = any(has_masks(evaluation) for _, evaluation in shown)
        ranked = rank_images(outcomes)
        groups = []
        for name, chosen in (("worst", ranked[:count]), ("best", ranked[max(count, len(ranked) - count) :][::-1])):
            rows = []
            for rank, (image_id, score) in enumerate(chosen):
                found = [(run, by_image[image_id]) for (run, _), by_image in zip(shown, outcomes, strict=True)]
                rows.append(_row(test_set, image_id, score, found, masks, f"{name}-{number}-{rank}"))
            if rows:
                groups.append({"title": f"{name.capitalize()} images", "rows": rows})
        shown_sets.append({"name": test_set.name, "groups": groups})
    if not shown_sets:
        return None
    legend = [LegendEntry(_OUTCOME_TEXT[kind], colour) for kind, colour in OUTCOME_COLOURS.items()]
    return {"sets": shown_sets, "legend": legend, "min_score": f"{min_score:g}"}


def _row(
    test_set: TestSet,
    image_id: int,
    score: float,
    found: Sequence[tuple[Run, Sequence[Outcome]]],
    masks: bool,
    key: str,
) -> dict[str, Any]:
    """Returns one image with its panels: the ground truth, with its masks if asked for, and one for each run."""
    assert test_set.truth is not None
    record = test_set.truth.imgs[image_id]
    path = os.path.join(test_set.image_root, record["file_name"])
    row: dict[str, Any] = {"title": f"{record['file_name']}: F1 {score:.2f}", "key": key, "unreadable": ""}
    try:
        if os.path.isabs(record["file_name"]) or os.path.normpath(record["file_name"]).startswith(os.pardir):
            raise ValueError("it is outside of the image root")
        width, height = int(record["width"]), int(record["height"])  # Of the annotations, which the boxes refer to.
        jpeg = _jpeg(path)
    except UNREADABLE as error:
        for run, _ in found:
            run.note(f"no picture: {path} cannot be read: {' '.join(str(error).split())}")
        return {**row, "unreadable": path}
    objects = [
        Outcome("truth", tuple(a["bbox"]), a["category_id"], None, a.get("segmentation") if masks else None)
        for a in test_set.truth.imgToAnns.get(image_id, [])
        if not a.get("iscrowd")
    ]
    letter = max(width, height) / 34
    text = f"{len(objects)} object{'s' * (len(objects) != 1)}"
    panels = [{"title": "ground truth", "caption": text, "boxes": _boxes(objects, test_set, letter)}]
    for run, outcomes in found:
        counts = [f"{sum(o.kind == kind for o in outcomes)} {kind}" for kind in (FOUND, FALSE, MISSED)]
        text = f"{', '.join(counts)}; F1 {f1(outcomes):.2f}"
        panels.append({"title": run.name, "caption": text, "boxes": _boxes(outcomes, test_set, letter)})
    return {
        **row,
        "width": width,
        "height": height,
        "jpeg": jpeg,
        "letter": f"{letter:.1f}",
        "panels": panels,
        "grid": _COLUMNS.get(len(panels), "four"),
    }


def _boxes(outcomes: Sequence[Outcome], test_set: TestSet, letter: float) -> list[dict[str, Any]]:
    """Returns the boxes, large ones first; classes are written where something is wrong, and for the truth."""
    boxes = []
    for outcome in sorted(outcomes, key=lambda o: -o.box[2] * o.box[3]):
        x, y, width, height = (round(value, 1) for value in outcome.box)
        name = test_set.class_name(outcome.category_id)
        score = "" if outcome.score is None else f" {outcome.score:.2f}"
        boxes.append(
            {
                "kind": outcome.kind,
                "x": x,
                "y": y,
                "width": width,
                "height": height,
                "outline": outline(outcome.segmentation),
                "colour": OUTCOME_COLOURS.get(outcome.kind, _TRUTH_COLOUR),
                "tip": f"{name}{score}: {_OUTCOME_TEXT.get(outcome.kind, 'object')}",
                "tag": name if outcome.kind != FOUND else "",
                "tag_x": f"{x + letter * 0.2:.1f}",
                "tag_y": f"{max(y + letter * 0.95, letter):.1f}",
            }
        )
    return boxes


def outline(segmentation: Any) -> str:
    """Returns the outline of polygons or of a mask as the path of an SVG, in pixels of the image; "" for neither."""
    if not segmentation:
        return ""
    if isinstance(segmentation, dict):
        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, *rle["size"])
        mask = np.ascontiguousarray(coco_mask.decode(rle))
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        parts = [contour.reshape(-1, 2) + 0.5 for contour in contours]  # Contours go through the centres of pixels.
    else:
        parts = [np.reshape(polygon, (-1, 2)) for polygon in segmentation]
    return "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in part) + "Z" for part in parts)


def _jpeg(path: str) -> str:
    """Returns the image as a data URI, no larger than needed, upright as the evaluation reads it."""
    image = Image.fromarray(np.asarray(read_image(path, format="RGB"), dtype=np.uint8))
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
