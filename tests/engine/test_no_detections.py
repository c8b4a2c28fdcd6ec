"""A training whose detector finds nothing ends with what to look at."""

import json

import pytest
from helpers import FCOS, QUANT, make_cfg

from aqdet.engine.no_detections import describe_nothing_found


def describe(tmp_path, *overrides, scores=(), ap=0.0, tests=("a",)):
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", str(tests), *overrides)
    results = {"bbox": {"AP": ap}} if len(tests) == 1 else {"a": {"bbox": {"AP": 5.0}}, "b": {"bbox": {"AP": ap}}}
    folder = tmp_path / "inference" / ("" if len(tests) == 1 else tests[-1])
    folder.mkdir(parents=True)
    (folder / "coco_instances_results.json").write_text(json.dumps([{"score": score} for score in scores]))
    return describe_nothing_found(cfg, results)


def test_likely_causes_come_in_order(tmp_path):
    text = describe(tmp_path, *QUANT, "SOLVER.BASE_LR", "0.02")
    assert text.startswith("no detection on a has a score above MODEL.RETINANET.SCORE_THRESH_TEST 0.05. Likely causes")
    words = ["(1) SOLVER.BASE_LR 0.02", "(2) MODEL.ANCHOR_GENERATOR.SIZES", "(3) the classes", "(4) MODEL.RETINANET.SC"]
    assert sorted(words, key=text.index) == words and "\n" not in text
    assert "where quantization sets in" in text and "MODEL.WEIGHTS is empty" in text


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("SOLVER.MAX_ITER", "0"), "(1) nothing was trained (SOLVER.MAX_ITER 0)"),
        (("SOLVER.MAX_ITER", "7"), "SOLVER.MAX_ITER 7 too short for random weights"),
        (FCOS, "(2) the objects are too small in images of INPUT.MIN_SIZE_TRAIN (800,)"),
    ],
)
def test_causes_are_of_the_config(tmp_path, overrides, words):
    assert words in describe(tmp_path, *overrides)


def test_detections_that_are_all_wrong(tmp_path):
    text = describe(tmp_path, scores=(0.1, 0.25), tests=("a", "b"))
    assert text.startswith("AP is 0 on b, with 2 detections, whose best score is 0.250. Likely causes")


@pytest.mark.parametrize("ap", [0.1, float("nan")])
def test_nothing_is_said_of_a_detector_that_finds_something(tmp_path, ap):
    assert describe(tmp_path, ap=ap, scores=(0.9,)) == ""


def test_nothing_is_said_of_classifiers():
    cfg = make_cfg("MODEL.META_ARCHITECTURE", "QuantClassifier")
    assert describe_nothing_found(cfg, {"classification": {"top1": 0.0}}) == ""
