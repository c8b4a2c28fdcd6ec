"""The second stage's arithmetic beside Detectron2's."""

import types

import numpy as np
import pytest
import torch
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from pycocotools import mask as coco_mask

from aqdet.runtime.decode import Detections
from aqdet.runtime.draw import draw
from aqdet.runtime.folder import PyramidLevel
from aqdet.runtime.records import run_lengths
from aqdet.runtime.regions import assign_levels, paste, softmax

RNG = np.random.default_rng(0)


def boxes_in(height, width, count):
    corners = RNG.uniform(-2, 1.05, (count, 4)).astype(np.float32)
    x = np.sort(np.clip(corners[:, :2], 0, 1), 1) * width
    y = np.sort(np.clip(corners[:, 2:], 0, 1), 1) * height
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1).astype(np.float32)
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


def test_regions_have_detectron2s_levels():
    sides = np.concatenate([RNG.uniform(0, 900, 2000), [112, 224, 448, 447.99, 0]]).astype(np.float32)
    ratios = np.exp(RNG.uniform(-1, 1, len(sides))).astype(np.float32)
    boxes = np.stack([0 * sides, 0 * sides, sides * ratios, sides / ratios], 1)
    pyramid = tuple(PyramidLevel(f"p{i}", "", 2**i) for i in range(2, 6))
    regions = types.SimpleNamespace(pyramid=pyramid, canonical_size=224, canonical_level=4)
    expected = assign_boxes_to_levels([Boxes(torch.from_numpy(boxes))], 2, 5, 224, 4).numpy()
    np.testing.assert_array_equal(assign_levels(boxes, regions), expected)
    assert set(expected) == {0, 1, 2, 3}


@pytest.mark.parametrize("side", [7, 28])
def test_masks_are_pasted_as_detectron2_does(side):
    height, width = 60, 90
    boxes = np.concatenate([boxes_in(height, width, 200)[:30], [[0, 0, width, height], [3.2, 4.1, 3.9, 4.4]]])
    boxes = boxes.astype(np.float32)
    probabilities = RNG.random((len(boxes), side, side)).astype(np.float32)
    theirs = paste_masks_in_image(torch.from_numpy(probabilities), torch.from_numpy(boxes), (height, width)).numpy()
    ours = paste(probabilities, boxes, (height, width))
    assert ours.dtype == bool and ours.shape == theirs.shape and theirs.any()
    assert np.count_nonzero(ours != theirs) <= 1e-4 * np.count_nonzero(theirs)  # at the threshold, by rounding
    assert paste(probabilities[:0], boxes[:0], (5, 6)).shape == (0, 5, 6)


def test_softmax_is_torchs():
    logits = RNG.normal(0, 5, (50, 7)).astype(np.float32)
    found = softmax(logits)
    np.testing.assert_allclose(found, torch.softmax(torch.from_numpy(logits), 1).numpy(), atol=1e-6)
    assert found.dtype == np.float32


def test_run_lengths_are_read_by_pycocotools():
    for share in (0.0, 0.3, 1.0):
        mask = RNG.random((13, 9)) < share
        found = run_lengths(mask)
        decoded = coco_mask.decode(coco_mask.frPyObjects(found, *found["size"]))
        np.testing.assert_array_equal(np.asarray(decoded), mask)


def test_a_mask_is_drawn_in_its_classs_colour_and_nothing_else_changes():
    image = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    mask = np.zeros((1, 40, 50), bool)
    mask[0, 10:30, 20:40] = True
    arguments = np.array([[20, 10, 40, 30]], np.float32), np.array([0.9], np.float32), np.array([1])
    plain = draw(image, Detections(*arguments), ("a", "b"))
    with_mask = draw(image, Detections(*arguments, mask), ("a", "b"))
    changed = (plain != with_mask).any(-1)
    assert not changed[~mask[0]].any() and changed[mask[0]].mean() > 0.5
    kept = Detections(*arguments, mask)[np.array([True])]
    assert kept.masks.shape == (1, 40, 50) and Detections(*arguments)[np.array([0])].masks is None
