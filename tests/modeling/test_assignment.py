"""ATSS against a plain slow reference, its limit cases, and the detector that learns by it."""

import statistics

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from helpers import AUX, FCOS, gradients, losses_of, make_batch, make_cfg, make_model
from tiny_data import write_dataset

from aqdet.data import register_declared
from aqdet.modeling.assignment import atss_overlaps

ATSS = (*FCOS, "MODEL.FCOS.ASSIGNMENT", "atss")
STRIDES = (8, 16, 32)


def points_of(size, strides=STRIDES):
    """The points of each level as FCOS has them: squares as large as the stride."""
    generator = DefaultAnchorGenerator(sizes=[[s] for s in strides], aspect_ratios=[1.0], strides=list(strides))
    return [a.tensor for a in generator([torch.zeros(1, 1, -(-size // s), -(-size // s)) for s in strides])]


def slow_atss(points, objects, candidates, side):
    """Index of each point's object, -1 for none: the paper's algorithm, object by object and point by point."""
    levels, owner = [level.tolist() for level in points], {}
    for index, (x1, y1, x2, y2) in enumerate(objects.tolist()):
        found = []
        for number, level in enumerate(levels):
            near = []
            for place, (left, top, right, bottom) in enumerate(level):
                x, y = (left + right) / 2, (top + bottom) / 2
                near.append(((x - (x1 + x2) / 2) ** 2 + (y - (y1 + y2) / 2) ** 2, place, x, y, right - left))
            for _, place, x, y, stride in sorted(near)[:candidates]:
                half = side * stride / 2
                width, height = min(x + half, x2) - max(x - half, x1), min(y + half, y2) - max(y - half, y1)
                shared = max(width, 0) * max(height, 0)
                overlap = shared / ((x2 - x1) * (y2 - y1) + 4 * half * half - shared)
                found.append((overlap, number, place, min(x - x1, y - y1, x2 - x, y2 - y) > 0))
        overlaps = [overlap for overlap, *_ in found]
        threshold = statistics.fmean(overlaps) + (statistics.stdev(overlaps) if len(overlaps) > 1 else 0)
        for overlap, number, place, is_inside in found:
            if overlap >= threshold and is_inside and overlap > owner.get((number, place), (0, -1))[0]:
                owner[number, place] = overlap, index
    return [
        owner.get((number, place), (0, -1))[1] for number, level in enumerate(levels) for place in range(len(level))
    ]


def fast_atss(points, objects, candidates, side):
    overlaps, index = atss_overlaps(points, objects, candidates=candidates, side=side).max(dim=0)
    return torch.where(overlaps > 0, index, -1).tolist()


@pytest.mark.parametrize("candidates, side", [(9, 8.0), (3, 8.0), (9, 4.0), (1, 5.0), (1000, 8.0)])
def test_positive_points_are_the_slow_references(candidates, side):
    generator = torch.Generator().manual_seed(0)
    points, positives = points_of(96), 0
    for _ in range(12):
        corner, extent = torch.rand(2, 6, 2, generator=generator)
        corner, extent = corner * 80, 2 + extent.square() * 70
        objects = torch.cat([corner, corner + extent], dim=1)
        expected = slow_atss(points, objects, candidates, side)
        assert fast_atss(points, objects, candidates, side) == expected
        positives += sum(index >= 0 for index in expected)
    assert positives > 40


def test_ties_of_distances_overlaps_and_objects():
    points = points_of(64)
    # Centred on a corner of four points of every level, on a point, and the same box twice.
    tied = torch.tensor([[16.0, 16, 48, 48], [10.0, 10, 30, 30], [10.0, 10, 30, 30], [0.0, 0, 64, 64]])
    for candidates in range(1, 12):
        expected = slow_atss(points, tied, candidates, 8.0)
        assert fast_atss(points, tied, candidates, 8.0) == expected
        assert 2 not in expected  # the first of equals has all of them
    # Of one candidate its own overlap is the mean, which it reaches.
    assert fast_atss(points_of(64, (16,)), tied[:1], 1, 8.0).count(0) == 1
    # All nine overlaps are equal: a deviation of 0, and all nine are positive, however their mean is rounded.
    for side in (33.0, 33.3, 37.7):
        low = 36 - side / 2
        box = torch.tensor([[low, low, low + side, low + side]])
        assert fast_atss(points_of(72, (8,)), box, 9, 16.0).count(0) == 9


def test_objects_without_points():
    points = points_of(64)
    # Smaller than a stride: with a point of the finest level inside, and with none.
    assert fast_atss(points, torch.tensor([[18.0, 18, 22, 22]]), 9, 8.0).count(0) == 1
    assert set(fast_atss(points, torch.tensor([[14.0, 14, 18, 18]]), 9, 8.0)) == {-1}
    for empty in ([20.0, 20, 20, 20], [20.0, 10, 20, 40]):
        assert set(fast_atss(points, torch.tensor([empty]), 9, 8.0)) == {-1}
    assert atss_overlaps(points, torch.zeros(0, 4), candidates=9, side=8.0).shape == (0, sum(map(len, points)))


def test_labels_and_boxes_of_a_batch():
    model, batch = make_model(*ATSS), make_batch(3, empty=(1,))
    instances = [x["instances"] for x in batch]
    anchors = model.anchor_generator([torch.zeros(1, 1, s, s) for s in (8, 4, 2, 1, 1)])
    labels, boxes = model.label_anchors(anchors, instances)
    for own, matched, image in zip(labels, boxes, instances, strict=True):
        expected = slow_atss([a.tensor for a in anchors], image.gt_boxes.tensor, 9, 8.0)
        classes = [3 if index < 0 else image.gt_classes[index].item() for index in expected]
        assert own.tolist() == classes
        for index, box in zip(expected, getattr(matched, "tensor", matched), strict=True):
            assert index < 0 or torch.equal(box, image.gt_boxes.tensor[index])
    assert (labels[1] == 3).all() and (labels[0] < 3).any()
    by_centre, _ = make_model(*FCOS).label_anchors(anchors, instances)
    assert not torch.equal(by_centre[0], labels[0])
    # The same by the interface of Detectron2's main branch.
    quality = model._match_anchors(instances[0].gt_boxes, anchors)
    assert torch.equal((quality.max(dim=0).values > 0), labels[0] < 3)


def test_a_crowd_is_no_object(tmp_path):
    """Detectron2's mapper leaves crowd regions out, so that no assignment sees them."""
    entry = write_dataset(tmp_path, "crowded", num_images=1)
    cfg = make_cfg(*ATSS, "DATASETS.DECLARED", str([entry]), "INPUT.RANDOM_FLIP", "none")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("crowded",)
    register_declared(cfg)
    (record,) = DatasetCatalog.get("crowded")
    crowd = {**record["annotations"][0], "bbox": [0, 0, record["width"], record["height"]], "iscrowd": 1}
    mapper = DatasetMapper(cfg, is_train=True)
    torch.manual_seed(0)
    alone, crowded = (mapper({**record, "annotations": record["annotations"] + more}) for more in ([], [crowd]))
    assert torch.equal(alone["instances"].gt_boxes.tensor, crowded["instances"].gt_boxes.tensor)


def test_both_heads_learn_the_same_points(monkeypatch):
    model, kept, calls = make_model(*ATSS, *AUX), [], []
    model.head.register_forward_hook(lambda m, i, o: kept.append(o))
    monkeypatch.setattr(model.auxiliary, "forward", lambda *_: kept[-1])
    real = model.label_anchors
    monkeypatch.setattr(model, "label_anchors", lambda *a: calls.append(1) or real(*a))
    model.loss_normalizer = 3.0
    losses = losses_of(model, make_batch())
    assert len(calls) == len(kept) == 1 and losses["loss_fcos_ctr"] > 0
    for key in ("loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"):
        assert torch.equal(losses[key], losses[f"aux_{key}"])


def test_a_step_with_empty_images_is_finite():
    model = make_model(*ATSS, *AUX)
    for empty in ((), (1,), (0, 1)):
        losses, grads = gradients(model, make_batch(empty=empty))
        assert all(torch.isfinite(value) for value in losses.values())
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        assert (losses["loss_fcos_ctr"] == 0) == (len(empty) == 2)


def test_decoding_is_that_of_fcos():
    one, other = (make_model(*arch).eval() for arch in (FCOS, ATSS))
    for a, b in zip(one(make_batch()), other(make_batch()), strict=True):
        assert len(a["instances"]) > 0 and torch.equal(a["instances"].scores, b["instances"].scores)
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("ASSIGNMENT", "center", "MODEL.FCOS.ASSIGNMENT must be one of fcos, atss, got 'center'"),
        ("ATSS_CANDIDATES", "0", "MODEL.FCOS.ATSS_CANDIDATES must be at least 1, got 0"),
        ("ATSS_SIDE", "0.0", "MODEL.FCOS.ATSS_SIDE must be above 0, got 0.0"),
    ],
)
def test_wrong_values_are_one_line(key, value, words):
    with pytest.raises(ValueError, match=words) as error:
        make_model(*ATSS, f"MODEL.FCOS.{key}", value)
    assert "\n" not in str(error.value)
