"""What a training of masks needs of its data."""

import pytest
from helpers import make_cfg
from two_stage import MASK, rcnn_cfg

from aqdet.data.mask_check import check_masks

POLYGON, RLE = [[0.0, 0, 5, 0, 5, 5]], {"size": [8, 8], "counts": [0, 64]}


def records(*outlines, crowd=0):
    annotations = [{"bbox": [0, 0, 5, 5], "category_id": 0, "iscrowd": crowd, "segmentation": o} for o in outlines]
    return [{"file_name": "a.png", "annotations": []}, {"file_name": "b.png", "annotations": annotations}]


def test_objects_without_outline_or_of_another_form_are_named_with_the_way_out():
    for outlines, words in (
        (
            (POLYGON, None),
            "MASK_ON is True, but 1 of 2 objects in DATASETS.TRAIN .* no segmentation, one in b.png",
        ),
        ((POLYGON, []), "but 1 of 2 objects"),
        ((RLE, POLYGON), "1 of 2 objects in .* mask .RLE.* one in b.png, .* INPUT.MASK_FORMAT bitmask reads both"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            check_masks(rcnn_cfg(*MASK), records(*outlines))
        assert "\n" not in str(error.value)


def test_what_is_trained_passes():
    check_masks(rcnn_cfg(*MASK), records(POLYGON, POLYGON))
    check_masks(rcnn_cfg(*MASK, "INPUT.MASK_FORMAT", "bitmask"), records(POLYGON, RLE))
    check_masks(rcnn_cfg(*MASK), records(RLE, crowd=1))
    check_masks(rcnn_cfg(), records(None))
    check_masks(make_cfg(*MASK), records(None))
