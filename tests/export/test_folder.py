"""The exported folder: what is in it, whole or not at all, and what the command line says."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from export_model import main
from helpers import make_cfg, make_model
from PIL import Image
from programs import OVERRIDES, RELU, SEVEN_BITS, STD, image, shared, trained_like
from tiny_data import CLASSES, write_dataset

from aqdet.checkpoint import load_detector
from aqdet.export import description
from aqdet.export import folder as module
from aqdet.export.agreement import TENSORRT
from aqdet.export.extract import extract
from aqdet.export.folder import export_detector
from aqdet.export.reference import run
from aqdet.export.report import agreement_totals
from aqdet.runtime.folder import read_description

AUX = ("MODEL.AUX.ENABLED", "True")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file of quantized training with its auxiliary path."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": trained_like(*AUX).state_dict(), "iteration": 3}, path)
    return str(path)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("export") / "detector"
    lines = []
    report = export_detector(
        make_cfg(*OVERRIDES, *AUX),
        checkpoint,
        output,
        images=list(image(40, 56)),
        config_name="mine.yaml",
        progress=lines.append,
    )
    return output, report, lines


def test_the_folder(exported):
    output, report, lines = exported
    names = {"detector.json", "README.md", "golden.npz", "model.onnx", "report.json", "report.md"}
    assert {path.name for path in output.iterdir()} == names
    assert list(output.parent.iterdir()) == [output]
    read = read_description(output)
    assert read.classes == ("class_0", "class_1", "class_2") and read.pad_value == (104, 116, 124)
    assert any("class_0 to class_2" in line for line in lines)
    assert [level.stride for level in read.levels] == [8, 16, 32, 64, 128]
    content = json.loads((output / "detector.json").read_text())
    assert set(content["files"]) == {"model.onnx", "golden.npz"}
    assert content["source"]["config"] == "mine.yaml" and len(content["source"]["weights_sha256"]) == 64
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(report))
    assert not any("auxiliary" in path.read_bytes().decode("latin1") for path in output.iterdir())


def test_sizes(exported):
    output, report, _ = exported
    sizes = report["sizes"]
    assert sizes["model.onnx"] == (output / "model.onnx").stat().st_size
    model = make_model(*STD, *RELU)
    assert sizes["float32_state_dict"] == sum(4 * value.numel() for value in model.state_dict().values())
    assert sizes["ratio"] > 7


def test_the_graph_is_the_detectors_and_says_so(exported, checkpoint):
    output, _, _ = exported
    program = extract(load_detector(make_cfg(*OVERRIDES, *AUX), checkpoint, device="cpu"))
    batch = image(32, 32)
    values = run(program, batch)
    session = onnxruntime.InferenceSession(output / "model.onnx", providers=["CPUExecutionProvider"])
    for info, found in zip(session.get_outputs(), session.run(None, {"image": batch}), strict=True):
        np.testing.assert_array_equal(found, values[info.name], info.name)
    said = session.get_modelmeta().custom_metadata_map
    content = json.loads((output / "detector.json").read_text())
    for key in ("classes", "decode", "anchors", "input", "outputs", "source"):
        assert json.loads(said[key]) == content[key], key
    assert said["strides"] == "[8, 16, 32, 64, 128]" and "Pillow" in said["preprocessing"]
    assert said["architecture"] == "RetinaNet" and said["aqdet_version"]


def test_others_may_read_it(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("aqdet.export.parts.compare", lambda *args, **options: [])
    before = os.umask(0o077)
    try:
        export_detector(make_cfg(*OVERRIDES), checkpoint, tmp_path / "detector")
    finally:
        os.umask(before)
    assert (tmp_path / "detector").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "detector").iterdir()} == {0o644}


def test_the_report_names_the_tightest_layer(exported):
    output, report, _ = exported
    text = (output / "report.md").read_text()
    assert f"Tightest int32 sum: {report['tightest']['layer']}" in text
    moves = [row["largest_move"] for row in report["operations"] if row["kind"] == "add"]
    assert len(moves) == 10 and "Scales of 10 sums are chosen so" in text and f"at most {max(moves):.3f} codes" in text
    for row in report["operations"]:
        assert f"| {row['output']} | {row['kind']} | {row['types']} |" in text


def test_an_export_is_replaced_and_nothing_else(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("aqdet.export.parts.compare", lambda *args, **options: [])
    cfg = make_cfg(*OVERRIDES)
    output = tmp_path / "detector"
    export_detector(cfg, checkpoint, output)
    (output / "old").write_text("")
    export_detector(cfg, checkpoint, output)
    assert not (output / "old").exists() and list(tmp_path.iterdir()) == [output]
    assert json.loads((output / "report.json").read_text())["agreement"]["random"] is True
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is no exported detector"):
        export_detector(cfg, checkpoint, other)
    assert (other / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("step", ["write_text", "write_description", "_publish"])
def test_a_failed_export_leaves_nothing(checkpoint, tmp_path, monkeypatch, step):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(module, step, fail)
    monkeypatch.setattr("aqdet.export.parts.compare", lambda *args, **options: [])
    with pytest.raises(OSError, match="disk full"):
        export_detector(make_cfg(*OVERRIDES), checkpoint, tmp_path / "detector")
    assert list(tmp_path.iterdir()) == []


def test_a_former_export_stays_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    former, aside = tmp_path / "detector", tmp_path / ".new"
    for folder in (former, aside):
        folder.mkdir()
        (folder / "from").write_text(folder.name)
    replace = os.replace

    def fail(source, target):
        if source == aside:
            raise OSError("not now")
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="not now"):
        module._publish(aside, former)
    assert (former / "from").read_text() == "detector" and len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    module._publish(aside, former)
    assert (former / "from").read_text() == ".new" and list(tmp_path.iterdir()) == [former]


def test_classes_are_those_of_the_test_set_where_there_is_no_other(tmp_path):
    entry = write_dataset(tmp_path / "d", "only_to_test_on")
    gone = {"name": "gone", "json": "gone.json", "image_root": "."}
    cfg = make_cfg("DATASETS.DECLARED", str([gone, entry]), "DATASETS.TRAIN", "('gone',)")
    cfg.DATASETS.TEST = (entry["name"],)
    names, ids = description.classes_of(cfg, 3, pytest.fail)
    assert names == list(CLASSES) and None not in ids


def test_tensorrts_flavour(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": trained_like(*SEVEN_BITS).state_dict()}, path)
    cfg = make_cfg(*OVERRIDES, *SEVEN_BITS)
    report = export_detector(cfg, str(path), tmp_path / "detector", images=list(image(32, 32)), tensorrt=True)
    content = json.loads((tmp_path / "detector" / "detector.json").read_text())
    assert set(content["files"]) == {"model.onnx", "model.tensorrt.onnx", "golden.npz"}
    totals = {total["execution"]: total for total in agreement_totals(report["agreement"])}
    assert len(totals) == 5 and totals[TENSORRT]["codes"] > 50_000 and totals[TENSORRT]["unexplained"] == 0
    text = (tmp_path / "detector" / "report.md").read_text()
    assert f"| {TENSORRT} |" in text and "| model.tensorrt.onnx |" in text


def test_a_detector_that_does_not_fit_tensorrt_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"layer backbone.bottom_up.stem.conv1.output .*zero point 0"):
        export_detector(make_cfg(*OVERRIDES, *AUX), checkpoint, tmp_path / "detector", tensorrt=True)
    assert list(tmp_path.iterdir()) == []


def export_model(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["export_model.py", *arguments])
    main()


def test_command_line(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(make_cfg(*OVERRIDES).dump())
    Image.fromarray(image(50, 70)[0].transpose(1, 2, 0)).save("one.png")
    small = ("INPUT.MIN_SIZE_TEST", "24", "INPUT.MAX_SIZE_TEST", "32")
    arguments = ("--config-file", "config.yaml", "--weights", checkpoint, "--output", "out", "--images", "one.png")
    entry = write_dataset(tmp_path / "data", "tiny_export_folder")
    data = ("DATASETS.DECLARED", str([entry]), "DATASETS.TRAIN", "('tiny_export_folder',)")
    data += ("MODEL.RETINANET.NUM_CLASSES", "0")
    export_model(monkeypatch, *arguments, *small, *data)
    out = capsys.readouterr().out
    assert "  trained: " in out and out.count(", 0 of them not at a rounding tie") == 4
    assert "Tightest int32 sum: " in out and "Network: " in out
    assert out.strip().splitlines()[-1].endswith("done: out (README.md, detector.json, report.md)")
    read = read_description("out")
    assert (read.min_size, read.channels, read.classes) == (24, "BGR", CLASSES)


def test_without_onnx_the_command_says_what_to_install(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(make_cfg(*OVERRIDES).dump())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest))
    for name in [name for name in sys.modules if name.startswith("aqdet.export")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as stop:
        export_model(monkeypatch, "--config-file", "config.yaml", "--weights", checkpoint, "--output", "out")
    assert stop.value.code == 2 and not Path("out").exists()
    assert capsys.readouterr().err.startswith("error: exported detectors need onnx: pip install '.[export]' ")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--weights", "none.pth"), "checkpoint 'none.pth' does not exist"),
        ((), "--weights: name a checkpoint of quantized training"),
        (("--weights", "none.pth", "--images", "none.png"), "--images none.png does not exist"),
        (("--weights", "none.pth", "--images", "empty"), "--images empty has no .bmp"),
        (("--weights", "none.pth", "--images", "config.yaml"), "--images config.yaml cannot be read"),
    ],
)
def test_wrong_input_gets_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(make_cfg(*OVERRIDES).dump())
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        export_model(monkeypatch, "--config-file", "config.yaml", "--output", "detector", *arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1
    assert not Path("detector").exists() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("MODEL.QUANT.ENABLED", "False"), "MODEL.QUANT.ENABLED is False"),
        (("MODEL.QUANT.WEIGHT.NUM_BITS", "3"), "weight_quantizer.num_bits is 4 in the checkpoint and 3 in the model"),
        (
            ("MODEL.QUANT.INPUT.QUANTIZER", "pact"),
            "input_quantizer.quantizer is lsq in the checkpoint and pact in the model",
        ),
        (("MODEL.FPN.OUT_CHANNELS", "24"), "does not fit the model"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(checkpoint, tmp_path, overrides, words):
    with pytest.raises(ValueError) as error:
        export_detector(make_cfg(*OVERRIDES, *overrides), checkpoint, tmp_path / "detector")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), 1e32])
def test_a_bad_scale_is_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys, value):
    model = trained_like()
    with torch.no_grad():
        model.head.cls_subnet[0].input_quantizer.scale.fill_(value)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(make_cfg(*OVERRIDES).dump())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        export_model(monkeypatch, "--config-file", "config.yaml", "--weights", "model.pth", "--output", "detector")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert f"layer head.cls_subnet.0.input_quantizer: its scale must be above 0 and at most 1e+06, got {value:g}" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model.pth"]


def test_float_checkpoint_is_refused(tmp_path):
    path = tmp_path / "float.pth"
    torch.save({"model": make_model(*STD, *RELU).state_dict()}, path)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS .*are not calibrated, .*: use a checkpoint of quantized"):
        export_detector(make_cfg(*OVERRIDES), str(path), tmp_path / "detector")


def test_other_anchors_are_refused():
    cfg = make_cfg(*OVERRIDES)
    model, program = shared()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    with pytest.raises(ValueError, match="MODEL.ANCHOR_GENERATOR.NAME must be DefaultAnchorGenerator"):
        description.describe_detector(cfg, model, program, [], print)
