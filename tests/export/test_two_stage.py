"""A two-stage detector's export: three integer programs, and a runtime that finds what Detectron2 would around them."""

import dataclasses
import functools
import json

import benchmark
import numpy as np
import onnxruntime
import other_machines
import pytest
import torch
import torch.nn.functional as F
from export_model import main
from helpers import QUANT, calibrated
from tiny_data import CLASSES, write_dataset
from two_stage import KEYPOINTS, MASK, rcnn, rcnn_cfg, shaped_batch

from aqdet.evaluation.exported import load_exported
from aqdet.export.agreement import OPTIMIZED, PLAIN, ROUNDED, TRAINED, compare
from aqdet.export.as_shipped_regions import as_shipped
from aqdet.export.folder import export_detector
from aqdet.export.integer_graph import check_integer
from aqdet.export.onnx_graph import build_onnx
from aqdet.export.parts import parts_of
from aqdet.export.program import Conv, DepthToSpace
from aqdet.export.reference import depth_to_space, space_to_depth
from aqdet.runtime import Detector, write_description
from aqdet.runtime.cli import main as run_detector
from aqdet.runtime.golden import self_test
from aqdet.runtime.preprocess import resize

GRAY = ("MODEL.PIXEL_STD", "[57.0, 57.0, 57.0]", "INPUT.MIN_SIZE_TEST", "0", "MODEL.FPN.RELU", "True")
SIGNED = ("MODEL.FPN.RELU", "False")
CONVS = ("MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN")
CONVS += ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True")
CONVS += ("MODEL.RPN.CONV_DIMS", "[-1, -1]")


@functools.cache
def shared(*overrides):
    """``(model, parts)``, made once; not to be changed."""
    model = rcnn(*MASK, *QUANT, *GRAY, *overrides)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.weight)
    with torch.no_grad():  # else all scores are nearly one
        for layer in (model.roi_heads.box_predictor.cls_score, model.proposal_generator.rpn_head.objectness_logits):
            layer.weight.mul_(50)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(100)
        if model.roi_heads.mask_on:
            model.roi_heads.mask_head.predictor.weight.mul_(50)
    model = calibrated(model.train(), shaped_batch(2, 64)).eval()
    return model, parts_of(model)


def codes_of(program, side, count=6):
    grid = program.image
    codes = np.random.default_rng(0).normal(0, 6, (count, program.channels, side, side)).round()
    return list((np.clip(codes, grid.quant_min, grid.quant_max) + grid.zero_point).astype(np.uint8))


def image(height=64, width=96):
    """``(H, W, 3)`` of noise with brighter blocks."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 120, (height, width, 3), dtype=np.uint8)
    pixels[10:40, 20:60] += 100
    pixels[45:60, 5:30, 1] += 80
    return pixels


@pytest.mark.parametrize("overrides", [(), SIGNED, CONVS], ids=["fc", "signed", "convs"])
@pytest.mark.parametrize("name, side", [("box", 7), ("mask", 14)])
def test_every_code_of_a_head_is_the_references_or_lies_at_a_tie(overrides, name, side):
    model, parts = shared(*overrides)
    program = parts.programs[name]
    assert check_integer(build_onnx(program))
    differences = compare(model, program, codes_of(program, side))
    for execution, limit in ((TRAINED, 2e-2), (ROUNDED, 3e-3), (PLAIN, 1e-3), (OPTIMIZED, 0)):
        own = [d for d in differences if d.execution == execution]
        codes = [d for d in own if not d.is_prediction]
        assert sum(d.count for d in codes) > 300 and not any(d.unexplained for d in own), execution
        assert sum(d.local for d in codes) <= limit * sum(d.count for d in codes), execution
        assert all(d.largest < 1e-3 for d in own if d.is_prediction)
    assert not any(d.local or d.whole or d.largest for d in differences if d.execution == OPTIMIZED)
    # Every layer's input is compared with the trained model's, the deconvolution's squares too.
    trained = {d.value for d in differences if d.execution == TRAINED}
    assert {operation.output for operation in program.operations} == trained


def test_the_first_stage_is_the_references_up_to_ties():
    model, parts = shared()
    pixels = image(64, 64).transpose(2, 0, 1)
    differences = compare(model, parts.first, [pixels])
    for execution in (TRAINED, ROUNDED, PLAIN, OPTIMIZED):
        assert not any(d.unexplained for d in differences if d.execution == execution), execution
    names = {d.value for d in differences if d.execution == TRAINED and d.is_prediction}
    assert names == {f"{kind}_p{level}" for kind in ("objectness", "deltas") for level in range(2, 7)}
    assert set(parts.first.pyramid) <= {d.value for d in differences if d.execution == TRAINED}


def test_a_wrong_deconvolution_is_found():
    model, parts = shared()
    program = parts.programs["mask"]
    operations = list(program.operations)
    index = next(i for i, o in enumerate(operations) if isinstance(o, DepthToSpace)) - 1
    conv = operations[index]
    assert isinstance(conv, Conv) and conv.weight.shape == (32, 8, 1, 1)
    operations[index] = dataclasses.replace(conv, weight=np.roll(conv.weight, 1, axis=0))
    differences = compare(model, dataclasses.replace(program, operations=tuple(operations)), codes_of(program, 14))
    assert {d.value for d in differences if d.unexplained and d.execution == TRAINED} == {conv.output}


def test_depth_to_space_is_pixel_shuffle_and_has_an_inverse():
    x = np.random.default_rng(0).integers(-9, 9, (2, 12, 3, 5))
    expected = F.pixel_shuffle(torch.from_numpy(x), 2).numpy()
    np.testing.assert_array_equal(depth_to_space(x, 2), expected)
    np.testing.assert_array_equal(space_to_depth(expected, 2), x)


def write_parts(folder, parts, cfg):
    content = parts.describe(cfg, [], lambda _: None)
    graphs = parts.graphs({})
    for name, graph in graphs.items():
        (folder / name).write_bytes(graph.SerializeToString())
    write_description(folder, {**content, "source": {}}, list(graphs))
    return Detector(folder)


@pytest.mark.parametrize(
    "overrides", [(), SIGNED, CONVS, ("MODEL.MASK_ON", "False")], ids=["fc", "signed", "convs", "boxes"]
)
def test_the_runtime_finds_what_detectron2_finds_around_the_same_networks(overrides, tmp_path):
    model, parts = shared(*overrides)
    write_parts(tmp_path, parts, rcnn_cfg(*MASK, *QUANT, *GRAY, *overrides))
    detector = Detector(tmp_path, size=(96, 200))
    pixels = image()
    found = detector(pixels)
    # The networks in torch, and around them Detectron2's proposals, RoIAlign, decoding, suppression and pasting.
    larger = resize(pixels, 96, 144).transpose(2, 0, 1)
    inputs = [{"image": torch.from_numpy(larger.copy()), "height": 64, "width": 96}]
    (theirs,) = as_shipped(model)(inputs)
    theirs = theirs["instances"]
    assert len(found) == len(theirs) > 5
    np.testing.assert_allclose(found.scores, theirs.scores.numpy(), atol=1e-5)
    np.testing.assert_array_equal(found.classes, theirs.pred_classes.numpy())
    np.testing.assert_allclose(found.boxes, theirs.pred_boxes.tensor.numpy(), atol=1e-3)
    if "MODEL.MASK_ON" in overrides:
        assert found.masks is None
        return
    masks = theirs.pred_masks.numpy()
    assert masks.any() and not masks.all()
    for own, other in zip(found.masks, masks, strict=True):  # an IoU of 0.99; a single pixel of a small mask is more
        assert np.count_nonzero(own ^ other) <= max(0.01 * np.count_nonzero(own | other), 1)
    assert np.count_nonzero(found.masks & masks) >= 0.99 * np.count_nonzero(found.masks | masks)


def test_images_of_a_batch_are_those_alone(tmp_path):
    _, parts = shared()
    detector = write_parts(tmp_path, parts, rcnn_cfg(*MASK, *QUANT, *GRAY))
    first, second = image(64, 96), image(64, 96)[:, ::-1].copy()
    for alone, together in zip((detector(first), detector(second)), detector.detect([first, second]), strict=True):
        for field in ("boxes", "scores", "classes", "masks"):
            np.testing.assert_array_equal(getattr(alone, field), getattr(together, field))


def test_a_folder_without_a_heads_graph_is_refused(tmp_path):
    _, parts = shared()
    write_parts(tmp_path, parts, rcnn_cfg(*MASK, *QUANT, *GRAY))
    (tmp_path / "mask.onnx").unlink()
    with pytest.raises(FileNotFoundError, match="mask.onnx does not exist: copy the whole folder"):
        Detector(tmp_path)


def test_keypoints_have_no_export():
    with pytest.raises(ValueError, match="MODEL.KEYPOINT_ON must be False for export"):
        parts_of(rcnn(*KEYPOINTS, *QUANT, *GRAY))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Config, checkpoint, folder and report of an export that was evaluated."""
    root = tmp_path_factory.mktemp("two_stage")
    entry = write_dataset(root / "data", "tiny_regions", num_images=2)
    content = json.loads((root / "data/tiny_regions.json").read_text())
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    (root / "data/tiny_regions.json").write_text(json.dumps(content))
    data = ("DATASETS.DECLARED", str([entry]), "DATASETS.TRAIN", "('tiny_regions',)")
    cfg = rcnn_cfg(*MASK, *QUANT, *GRAY, *data, "DATASETS.TEST", "('tiny_regions',)")
    model, _ = shared()
    torch.save({"model": model.state_dict()}, root / "model.pth")
    (root / "config.yaml").write_text(cfg.dump())
    report = export_detector(cfg, str(root / "model.pth"), root / "detector", dataset="tiny_regions")
    return root, cfg, report


def test_the_benchmark_refuses_it_in_one_line(exported, monkeypatch):
    root, _, _ = exported
    words = ["benchmark.py", "export", "--model", root / "detector", "--config-file", root / "config.yaml"]
    monkeypatch.setattr("sys.argv", [str(word) for word in (*words, "--weights", root / "model.pth")])
    with pytest.raises(SystemExit, match="^error: .* is a two-stage detector, three graphs around .*RoiAlign.* none"):
        benchmark.main()


def test_the_folder_has_three_graphs_and_says_what_they_are(exported):
    root, _, report = exported
    folder = root / "detector"
    names = {path.name for path in folder.iterdir()}
    assert {"model.onnx", "box.onnx", "mask.onnx", "detector.json", "golden.npz", "report.md", "README.md"} <= names
    content = json.loads((folder / "detector.json").read_text())
    assert content["architecture"] == "RCNN" and content["classes"] == list(CLASSES)
    assert set(content["files"]) == {"model.onnx", "box.onnx", "mask.onnx", "golden.npz"}
    assert report["executed"]["RoiAlign"] == 8 and report["executed"]["DepthToSpace"] == 1
    assert not any(d["unexplained"] for d in report["agreement"]["values"])
    rows = {row["output"]: row for row in report["operations"]}
    assert rows["class_logits"]["weight_bits"] == 8 and rows["mask_logits"]["kind"] == "conv"
    readme = (folder / "README.md").read_text()
    assert "`box.onnx`: classes and boxes of regions" in readme and "segm AP" in readme
    sizes = report["sizes"]
    shipped = sum(sizes[name] for name in ("model.onnx", "box.onnx", "mask.onnx"))
    assert sizes["ratio"] == pytest.approx(sizes["float32_state_dict"] / shipped)
    fc1 = next(row for row in report["operations"] if row.get("layer") == "roi_heads.box_head.fc1")
    graph = onnxruntime.InferenceSession(folder / "box.onnx", providers=["CPUExecutionProvider"])
    assert fc1["weight_bits"] == 4 and [i.name for i in graph.get_inputs()][:3] == [
        "codes_p2",
        "rois_p2",
        "image_of_p2",
    ]
    # Packed: 4 bits a weight of the fully connected layers, 8 of the predictors.
    assert (folder / "box.onnx").stat().st_size < 0.75 * fc1["in_channels"] * 49 * fc1["out_channels"] + 12_000


def test_the_gate_has_masks_and_so_has_an_evaluation_through_the_folder(exported):
    _, cfg, report = exported
    evaluation = report["evaluation"]
    assert {"AP", "segm AP", "segm AP50"} <= set(evaluation["metrics"])
    assert all(values["exported"] is not None for name, values in evaluation["metrics"].items() if "AP5" in name)
    model = load_exported(cfg, exported[0] / "detector")
    record = {"file_name": str(exported[0] / "data/0.png"), "height": 64, "width": 64}
    instances = model([record])[0]["instances"]
    assert instances.pred_masks.shape == (len(instances), 64, 64) and instances.pred_masks.dtype == torch.bool


def test_it_runs_from_the_command_line_and_checks_itself(exported, tmp_path, capsys):
    folder = exported[0] / "detector"
    assert all(check.passed for check in self_test(folder))
    run_detector(
        [str(folder), str(exported[0] / "data/0.png"), "--json", str(tmp_path / "found.json"), "--threshold", "0"]
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found and all(entry["segmentation"]["size"] == [64, 64] for entry in found)
    run_detector([str(folder), str(exported[0] / "data/0.png"), "--output", str(tmp_path / "found.png")])
    assert (tmp_path / "found.png").is_file() and "written to" in capsys.readouterr().out


def test_other_machines_get_all_graphs(exported, tmp_path):
    folder = exported[0] / "detector"
    other_machines.write_all_layers(folder, tmp_path / "all", None)
    checks = self_test(tmp_path / "all")
    assert len(checks) > 50 and all(check.passed for check in checks)


@pytest.mark.parametrize("form", ["--end-to-end", "--qonnx", "--c", "--tensorrt"])
def test_other_forms_are_refused_by_name_before_anything_is_loaded(form, exported, tmp_path, monkeypatch, capsys):
    value = ["64"] if form in ("--qonnx", "--c") else []
    config = ["--config-file", str(exported[0] / "config.yaml"), "--weights", "missing.pth"]
    monkeypatch.setattr("sys.argv", ["export_model.py", *config, "--output", str(tmp_path / "x"), form, *value])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {form}: ") and not (tmp_path / "x").exists()
