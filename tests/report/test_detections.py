"""Curves and outcomes against hand-made data and a plain reference."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_data import write_dataset

from aqdet.report.detections import (
    FALSE,
    FOUND,
    MISSED,
    Outcome,
    average_precision,
    evaluate,
    f1,
    has_masks,
    image_outcomes,
    load_truth,
    precision_recall,
    rank_images,
)

# The two objects of every image of write_dataset, as x, y, width, height.
FIRST, SECOND, NOWHERE = [4, 5, 36, 33], [20, 10, 30, 50], [0, 0, 3, 3]


@pytest.fixture
def judged(tmp_path):
    """Function of detections (image id, category id, box, score): their evaluation."""

    def run(detections, change=None, masks=None):
        entry = write_dataset(tmp_path / "data", "judged")
        if change is not None:
            content = json.loads(Path(entry["json"]).read_text())
            change(content)
            Path(entry["json"]).write_text(json.dumps(content))
        results = [dict(zip(("image_id", "category_id", "bbox", "score"), d, strict=True)) for d in detections]
        for result, mask in zip(results, masks or (), strict=False):
            result["segmentation"] = mask
        path = tmp_path / "results.json"
        path.write_text(json.dumps(results))
        return evaluate(load_truth(entry["json"], "judged"), path)

    return run


def interpolated(scores_and_hits, num_objects):
    """Precision at 101 recalls: the best precision at that recall or a higher one, by definition."""
    points, found = [], 0
    for rank, (_, hit) in enumerate(sorted(scores_and_hits, key=lambda pair: -pair[0]), 1):
        found += hit
        points.append((found / num_objects, found / rank))
    return [max((p for r, p in points if r >= recall - 1e-12), default=0.0) for recall in np.linspace(0, 1, 101)]


SOME = [
    (1, 1, FIRST, 0.9),
    (2, 1, NOWHERE, 0.8),
    (2, 1, FIRST, 0.7),
    (3, 1, NOWHERE, 0.6),
    (4, 1, FIRST, 0.55),
    (1, 2, SECOND, 0.3),
]


def test_curve_against_its_definition(judged):
    evaluation = judged(SOME)
    recall, precision = precision_recall(evaluation, 0.5, 1)
    hits = [(score, box is FIRST) for _, category, box, score in SOME if category == 1]
    assert recall == pytest.approx(np.linspace(0, 1, 101))
    assert precision == pytest.approx(interpolated(hits, 4))
    assert precision[0] == pytest.approx(1) and precision[60] == pytest.approx(3 / 5) and precision[80] == 0


@pytest.mark.parametrize("limit, found", [(100, 2), (2, 2), (1, 1)])
def test_only_the_best_detections_of_an_image_and_class_count(tmp_path, limit, found):
    entry = write_dataset(tmp_path / "data", "limited")
    content = json.loads(Path(entry["json"]).read_text())
    for annotation in content["annotations"]:
        annotation["category_id"] = 1
    Path(entry["json"]).write_text(json.dumps(content))
    results = [
        {"image_id": image["id"], "category_id": 1, "bbox": box, "score": score}
        for image in content["images"]
        for box, score in ((FIRST, 0.9), (SECOND, 0.8))
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    evaluation = evaluate(load_truth(entry["json"], "limited"), tmp_path / "results.json", limit)
    expected = 100 * sum(level / 100 <= found / 2 for level in range(101)) / 101
    assert average_precision(evaluation) == pytest.approx(expected)


def test_mean_curve_and_ap_are_those_of_pycocotools(judged):
    evaluation = judged(SOME)
    each = [precision_recall(evaluation, 0.75, category)[1] for category in (1, 2)]
    assert precision_recall(evaluation, 0.75)[1] == pytest.approx(np.mean(each, axis=0))
    assert precision_recall(evaluation, 0.75, 3) is None  # a class without objects
    evaluation.summarize()
    assert average_precision(evaluation) == pytest.approx(100 * evaluation.stats[0])
    means = [precision_recall(evaluation, iou)[1].mean() for iou in evaluation.params.iouThrs]
    assert average_precision(evaluation) == pytest.approx(100 * np.mean(means))


def test_a_box_of_iou_0_6_counts_at_0_5_only(judged):
    evaluation = judged([(1, 1, [4, 5, 36, 33 * 0.6], 0.9)])
    assert precision_recall(evaluation, 0.5, 1)[1][0] == pytest.approx(1)
    assert precision_recall(evaluation, 0.75, 1)[1].max() == 0


def test_outcomes_of_images(judged):
    outcomes = image_outcomes(judged([*SOME, (4, 2, FIRST, 0.9)]), 0.5)
    kinds = {key: sorted((o.kind, o.category_id) for o in rows) for key, rows in outcomes.items()}
    # The detection with score 0.3 is left out, so that its object is missed.
    assert kinds[1] == [(FOUND, 1), (MISSED, 2)]
    assert kinds[2] == [(FALSE, 1), (FOUND, 1), (MISSED, 2)]
    assert kinds[3] == [(FALSE, 1), (MISSED, 1), (MISSED, 2)]
    assert kinds[4] == [(FALSE, 2), (FOUND, 1), (MISSED, 2)]
    (found,) = [o for o in outcomes[1] if o.kind == FOUND]
    assert found.box == (4, 5, 36, 33) and found.score == 0.9
    assert f1(outcomes[1]) == pytest.approx(2 / 3) and f1(outcomes[2]) == pytest.approx(0.5)
    assert f1(outcomes[3]) == 0 and f1([]) == 1


def test_masks_are_those_of_the_detections_and_of_missed_objects_where_there_are_any(judged):
    mask, polygon = {"size": [64, 64], "counts": "PPPP1"}, [[4, 5, 40, 5, 40, 38]]

    def outlined(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = polygon

    for masks, found in (([mask], mask), ([], None)):
        evaluation = judged(SOME[:1], outlined, masks)
        assert has_masks(evaluation) == bool(masks)
        outcomes = image_outcomes(evaluation, 0.5)
        assert [o.segmentation for o in outcomes[1] if o.kind == FOUND] == [found]
        missed = [o.segmentation for rows in outcomes.values() for o in rows if o.kind == MISSED]
        assert len(missed) == 7 and missed == [polygon if masks else None] * 7


def test_two_detections_of_one_object(judged):
    rows = image_outcomes(judged([(1, 1, FIRST, 0.9), (1, 1, FIRST, 0.8)]), 0.5)[1]
    assert sorted((o.kind, o.score) for o in rows if o.category_id == 1) == [(FALSE, 0.8), (FOUND, 0.9)]


def test_crowds_are_neither_found_nor_missed(judged):
    def to_crowd(content):
        content["annotations"][0]["iscrowd"] = 1

    rows = image_outcomes(judged([(1, 1, FIRST, 0.9)], to_crowd), 0.5)[1]
    assert [(o.kind, o.category_id) for o in rows] == [(MISSED, 2)]


def test_nothing_detected(judged):
    evaluation = judged([])
    assert average_precision(evaluation) == 0
    assert {len(rows) for rows in image_outcomes(evaluation, 0.5).values()} == {2}


def test_ranking_takes_the_mean_over_runs_and_then_the_id():
    hit, miss = Outcome(FOUND, (0, 0, 1, 1), 1, 0.9), Outcome(MISSED, (0, 0, 1, 1), 1)
    runs = [{7: [hit], 3: [miss], 5: [hit, miss]}, {7: [miss], 3: [hit], 5: [miss]}]
    assert rank_images(runs) == [(5, pytest.approx(1 / 3)), (3, 0.5), (7, 0.5)]


@pytest.mark.parametrize("text", ["{", "{}", '[{"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]'])
def test_what_is_no_results_file_is_one_line(judged, tmp_path, text):
    evaluation = judged([])
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match="odd.json: no detections of this dataset") as error:
        evaluate(evaluation.cocoGt, tmp_path / "odd.json")
    assert "\n" not in str(error.value)
