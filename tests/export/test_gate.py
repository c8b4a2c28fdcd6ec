"""The gate: detections matched by hand, and what stops an export."""

import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from export_model import main
from helpers import make_cfg
from programs import OVERRIDES, image, trained_like
from tiny_data import CLASSES, write_dataset

from aqdet.export.as_shipped import AsShipped
from aqdet.export.folder import export_detector, golden_layers
from aqdet.export.gate import Matches, NotGoodEnough, as_bgr, check_loss, match
from aqdet.export.report import detections_line
from aqdet.runtime import Detector
from aqdet.runtime.golden import self_test


def found(*entries):
    """Detections (x, score, class), ten pixels wide."""
    instances = Instances((50, 200))
    instances.pred_boxes = Boxes(torch.tensor([[x, 0.0, x + 10, 10] for x, *_ in entries]).reshape(-1, 4))
    instances.scores = torch.tensor([score for _, score, _ in entries])
    instances.pred_classes = torch.tensor([cls for *_, cls in entries], dtype=torch.int64)
    return instances


def objects(*entries):
    instances = Instances((50, 200))
    instances.gt_boxes = Boxes(torch.tensor([[x, 0.0, x + 10, 10] for x, _ in entries]).reshape(-1, 4))
    instances.gt_classes = torch.tensor([cls for _, cls in entries], dtype=torch.int64)
    return instances


def test_match_by_hand():
    ours = found((0, 0.6, 0), (1, 0.9, 0), (50, 0.8, 1), (100, 0.7, 2))
    theirs = found((0, 0.5, 0), (50, 0.4, 0), (103, 0.3, 2))
    # The surest of the first two takes the box; another class is no match; three pixels off is one.
    assert match(ours, theirs) == [(1, 0), (3, 2)]
    assert match(found(), theirs) == match(ours, found()) == []
    assert match(ours, objects((100, 2), (160, 0))) == [(3, 0)]


def test_summary_by_hand():
    matches = Matches()
    trained = found((0, 0.9, 0), (50, 0.6, 1), (100, 0.3, 2), (150, 0.55, 0))
    exported = found((0, 0.8, 0), (50, 0.45, 1), (100, 0.35, 2))
    matches.add(trained, exported, objects((0, 0), (50, 1), (100, 2), (180, 0)))
    summary = matches.summary()
    assert (summary["trained"], summary["exported"], summary["matched"], summary["objects"]) == (3, 1, 2, 4)
    assert summary["mean_score_difference"] == pytest.approx(0.125)
    assert summary["largest_score_difference"] == pytest.approx(0.15)
    # At 0.5 the trained model hits two objects of four; the exported one's second hit has 0.45.
    assert summary["recall"] == 0.5 and summary["threshold"] == pytest.approx(0.45)
    assert "2 too (it has 1)" in detections_line(summary) and "0.450" in detections_line(summary)


def test_no_detections_and_no_objects_have_a_summary():
    summary = Matches().summary()
    assert summary["recall"] is None and summary["threshold"] is None and summary["matched"] == 0
    assert detections_line(summary) == (
        "The trained model has no detection with a score of at least 0.5 (the exported one has 0), so that none are "
        "compared."
    )


def evaluation(trained, exported):
    difference = None if exported is None else exported - trained
    values = {"trained": trained, "shipped": trained, "exported": exported, "difference": difference}
    return {"dataset": "d", "metrics": {"AP": values}}


def test_a_loss_above_the_stated_one_stops():
    check_loss(evaluation(50.0, 49.6), 0.5)
    check_loss(evaluation(50.0, 52.0), 0.0)
    with pytest.raises(NotGoodEnough, match=r"AP on d falls from 50.00 to 49.40 by the export, more than --max-loss"):
        check_loss(evaluation(50.0, 49.4), 0.5)
    for nothing in (evaluation(50.0, None), {"dataset": "d", "metrics": {}}):
        with pytest.raises(NotGoodEnough, match="d gives no AP by which --max-loss could be judged"):
            check_loss(nothing, 0.5)


def test_an_image_as_the_runtime_takes_it():
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    assert as_bgr(pixels, "BGR")[0, 0].tolist() == [0, 4, 8]
    assert as_bgr(pixels, "RGB")[0, 0].tolist() == [8, 4, 0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a dataset, a config that names it, and a checkpoint."""
    root = tmp_path_factory.mktemp("gate")
    entry = write_dataset(root / "data", "tiny_gate")
    overrides = (
        *OVERRIDES,
        "INPUT.MIN_SIZE_TEST",
        "64",
        "INPUT.MAX_SIZE_TEST",
        "96",
        "DATASETS.DECLARED",
        str([entry]),
    )
    overrides += (
        "DATASETS.DECLARED",
        str([entry]),
        "DATASETS.TRAIN",
        "('tiny_gate',)",
        "DATASETS.TEST",
        "('tiny_gate',)",
    )
    (root / "config.yaml").write_text(make_cfg(*overrides).dump())
    torch.save({"model": trained_like().state_dict()}, root / "model.pth")
    return root, overrides


def command(monkeypatch, root, *arguments):
    given = ["--config-file", root / "config.yaml", "--weights", root / "model.pth", *arguments]
    monkeypatch.setattr("sys.argv", ["export_model.py", *map(str, given)])
    main()


def test_a_dataset_is_evaluated_and_everything_is_in_the_folder(run, tmp_path, monkeypatch, capsys):
    root, _ = run
    output = tmp_path / "detector"
    command(
        monkeypatch,
        root,
        "--output",
        output,
        "--max-loss",
        100,
        "--licence",
        "CC0-1.0",
        "--force",
        "--qonnx",
        64,
        "--c",
        64,
    )
    out = capsys.readouterr().out
    assert "## On tiny_gate" in out and "| AP |" in out and "Average Precision" not in out
    report = json.loads((output / "report.json").read_text())
    measured = report["evaluation"]
    assert measured["dataset"] == "tiny_gate" and {"AP", "APs", f"AP-{CLASSES[0]}"} <= set(measured["metrics"])
    alike = measured["shipped_detections"]
    assert alike["matched"] == alike["trained"] == alike["exported"] and alike["largest_score_difference"] < 1e-6
    assert report["agreement"]["training"] and not report["agreement"]["random"]
    assert {row["name"] for row in report["ranges"]["training"]} >= {"backbone.p3_stream.quantizer"}
    text = (output / "report.md").read_text()
    assert "## On tiny_gate" in text and "| backbone.p3_stream.quantizer | 0." in text
    card = (output / "README.md").read_text()
    assert card.startswith("# RetinaNet detector, weights of 4 bits (8 in 11 of ")
    assert ", inputs of 4 bits (8 in 11 of " in card.splitlines()[0]
    assert (
        "CC0-1.0" in card and "Trained on: tiny_gate" in card and "--self-test" in card and ", ".join(CLASSES) in card
    )
    assert "| AP |" in card and "`golden.npz`" in card and "`model.qonnx.onnx`" in card
    assert set(json.loads((output / "detector.json").read_text())["files"]) == {
        "model.onnx",
        "golden.npz",
        "model.qonnx.onnx",
        "detector.c",
        "detector.h",
    }
    assert report["c"]["size"] == 64 and f"{report['c']['arena']:,} bytes of arena" in out
    assert f"{report['c']['flash']:,} of constants (flash)" in text and "`detector.c`" in card
    assert "static uint8_t arena[" in (output / "detector.c").read_text()


def test_the_golden_vectors_pass_on_the_machine_that_made_them(run, tmp_path):
    root, overrides = run
    output = tmp_path / "detector"
    pictures = list(image(200, 90))
    export_detector(make_cfg(*overrides), str(root / "model.pth"), output, images=pictures, force=True)
    checks = self_test(output)
    assert all(check.passed for check in checks), checks
    golden = np.load(output / "golden.npz")
    assert golden["image"].shape == (96, 90, 3)
    codes = [key.removeprefix("codes/") for key in golden.files if key.startswith("codes/")]
    assert 3 <= len(codes) <= 7 and codes[0] == "backbone.bottom_up.stem.conv1.output"
    assert len(Detector(output).classes) == 3


def test_in_the_arithmetic_that_ships_the_detections_are_the_exported_ones(run, tmp_path):
    root, overrides = run
    picture = image(64, 90)[0]
    export_detector(make_cfg(*overrides), str(root / "model.pth"), tmp_path / "detector", images=[picture], force=True)
    expected = Detector(tmp_path / "detector", score_threshold=0.001)(as_bgr(picture, "BGR"))
    model = trained_like()
    model.test_score_thresh = 0.001
    found = AsShipped(model)([{"image": torch.from_numpy(picture), "height": 64, "width": 90}])[0]["instances"]
    assert len(found) == len(expected) > 20
    # Decoded in torch and in NumPy, whose exponentials differ in the last bit: it may order two of equal scores.
    np.testing.assert_allclose(found.scores.numpy(), expected.scores, rtol=1e-6)
    rows = [
        np.column_stack([classes, boxes, scores])
        for classes, boxes, scores in (
            (found.pred_classes.numpy(), found.pred_boxes.tensor.numpy(), found.scores.numpy()),
            (expected.classes, expected.boxes, expected.scores),
        )
    ]
    ours, theirs = (values[np.lexsort(np.round(values[:, :5], 1).T)] for values in rows)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-3)


def test_golden_layers_are_values_of_the_program():
    from programs import shared

    _, program = shared()
    names = golden_layers(program)
    assert len(set(names)) == len(names) and set(names) <= {operation.output for operation in program.operations}


@pytest.mark.parametrize("options", [("--max-loss", 100), ()])
def test_a_scale_times_100_stops_with_3_and_nothing_is_written(run, tmp_path, monkeypatch, capsys, options):
    root, _ = run
    model = trained_like()
    with torch.no_grad():
        model.backbone.p4_stream.quantizer.alpha.mul_(100)
    torch.save({"model": model.state_dict()}, tmp_path / "broken.pth")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, root, "--output", tmp_path / "out", "--weights", tmp_path / "broken.pth", *options)
    err = capsys.readouterr().err
    assert stop.value.code == 3 and err.count("\n") == 1
    assert "layer backbone.p4_stream.quantizer: " in err and "its scale is too large" in err and "--force" in err
    assert [path.name for path in tmp_path.iterdir()] == ["broken.pth"]


def test_a_loss_stops_with_3_and_leaves_the_former_export(run, tmp_path, monkeypatch, capsys):
    root, _ = run
    output = tmp_path / "detector"
    output.mkdir()
    (output / "detector.json").write_text("former")
    monkeypatch.setattr("aqdet.export.folder._check_ranges", lambda *_: ({}, []))
    monkeypatch.setattr("aqdet.export.parts.compare", lambda *_, **__: [])
    monkeypatch.setattr("aqdet.export.folder.evaluate_both", lambda *_: {**evaluation(50.0, 40.0), **REST})
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, root, "--output", output, "--dataset", "tiny_gate", "--max-loss", 0.5)
    assert stop.value.code == 3 and "AP on d falls from 50.00 to 40.00" in capsys.readouterr().err
    assert (output / "detector.json").read_text() == "former" and [p.name for p in tmp_path.iterdir()] == ["detector"]


REST = {"images": 1, "detections": Matches().summary(), "shipped_detections": Matches().summary()}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--dataset", "nowhere"), "--dataset 'nowhere': DATASETS.TEST: no dataset 'nowhere'"),
        (("--max-loss", "nan"), "--max-loss"),
        (("--max-loss", "1", "DATASETS.TEST", "()"), "--max-loss: name the --dataset"),
    ],
)
def test_wrong_arguments(run, tmp_path, monkeypatch, capsys, arguments, words):
    root, _ = run
    monkeypatch.setattr("aqdet.export.folder._check_ranges", lambda *_: ({}, []))
    monkeypatch.setattr("aqdet.export.parts.compare", lambda *_, **__: [])
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, root, "--output", tmp_path / "out", *arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
