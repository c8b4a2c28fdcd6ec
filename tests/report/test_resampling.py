"""The bootstrap over images against COCO's evaluation of a dataset that has the drawn images as copies."""

import contextlib
import copy
import io
import itertools
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aqdet.report.detections import average_precision
from aqdet.report.resampling import interval, matches_of, resampled_ap, weighted_average_precision

NUM_IMAGES, CLASSES = 7, (3, 5, 9)


def scene(seed):
    """Ground truth and detections of some images: hits of any overlap, misses, crowds, and a class without objects."""
    draw = np.random.default_rng(seed)
    images = [{"id": 10 * i, "width": 100, "height": 100} for i in range(NUM_IMAGES)]
    truth, found = [], []
    for image in images:
        ranks = itertools.count()
        for category in CLASSES[:2]:
            for _ in range(draw.integers(0, 4)):
                x, y, side = (int(v) for v in draw.integers(5, 50, 3))
                box = [x, y, side, side]
                crowd = int(draw.random() < 0.2)
                truth.append({"image_id": image["id"], "category_id": category, "bbox": box, "iscrowd": crowd})
                for _ in range(draw.integers(0, 3)):
                    shift = draw.normal(0, side / 10, 4)
                    # Equal in several images, but not within one, where copies would have another order.
                    score = round(float(draw.random()), 1) + next(ranks) / 1000
                    found.append((image["id"], category, [float(v) for v in np.add(box, shift)], score))
        found.append((image["id"], int(draw.choice(CLASSES)), [0.0, 0.0, 20.0, 20.0], 0.4))
    return images, truth, found


def evaluation_of(images, truth, found, limit=100):
    truth = [{"area": t["bbox"][2] * t["bbox"][3], "id": i, **t} for i, t in enumerate(truth, 1)]
    coco = COCO()
    coco.dataset = {"images": images, "annotations": truth, "categories": [{"id": c, "name": str(c)} for c in CLASSES]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        keys = ("image_id", "category_id", "bbox", "score")
        evaluation = COCOeval(coco, coco.loadRes([dict(zip(keys, d, strict=True)) for d in found]), "bbox")
        evaluation.params.maxDets = [1, 10, limit]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def copies(images, truth, found, weights):
    """The dataset with each image as often as its weight."""
    shown, objects, detections = [], [], []
    for image, weight in zip(images, weights, strict=True):
        for _ in range(weight):
            key = len(shown) + 1
            shown.append({**image, "id": key})
            objects += [{**copy.deepcopy(t), "image_id": key} for t in truth if t["image_id"] == image["id"]]
            detections += [(key, *d[1:]) for d in found if d[0] == image["id"]]
    return shown, objects, detections


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [100, 2])
def test_weights_are_copies_of_images(seed, limit):
    data = scene(seed)
    evaluation = evaluation_of(*data, limit=limit)
    classes, recalls = matches_of(evaluation), np.asarray(evaluation.params.recThrs)
    ones = np.ones(NUM_IMAGES, int)
    assert weighted_average_precision(classes, ones, recalls) == pytest.approx(average_precision(evaluation), abs=1e-9)
    for draw in range(4):
        weights = np.random.default_rng(draw).multinomial(NUM_IMAGES, np.full(NUM_IMAGES, 1 / NUM_IMAGES))
        expected = average_precision(evaluation_of(*copies(*data, weights), limit=limit))
        assert weighted_average_precision(classes, weights, recalls) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_draws_are_the_same_for_all_runs_and_of_a_seed():
    images, truth, found = scene(1)
    evaluation, worse = (evaluation_of(images, truth, d) for d in (found, found[::2]))
    first = resampled_ap([evaluation, worse, evaluation], draws=20)
    assert first.shape == (3, 20) and (first[0] == first[2]).all() and (first[0] != first[1]).any()
    assert (first == resampled_ap([evaluation, worse, evaluation], draws=20)).all()
    assert (first[0] != resampled_ap([evaluation], draws=20, seed=1)[0]).any()
    with pytest.raises(ValueError, match="different images"):
        resampled_ap([evaluation, evaluation_of(images[:3], truth, found[:1])])


def test_a_draw_without_objects_has_no_ap_and_counts_not():
    images, truth, found = scene(2)
    only = [t for t in truth if t["image_id"] == images[0]["id"]]
    values = resampled_ap([evaluation_of(images, only, found)], draws=30)[0]
    assert 0 < np.isnan(values).sum() < 30
    low, high = interval(values)
    assert 0 <= low <= high <= 100 and not math.isnan(low)
    assert interval(np.full(5, math.nan)) is None
    assert interval(np.arange(101.0)) == (5.0, 95.0)
