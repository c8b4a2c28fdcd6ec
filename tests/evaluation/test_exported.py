"""Evaluation through an exported folder against evaluation of the model it comes from."""

import json
import logging
import sys

import pytest
import torch
import train_net as tool
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from tiny_data import CLASSES, write_dataset
from tiny_export import make_twin, write_folder

from aqdet.config import load_config
from aqdet.data import register_declared
from aqdet.engine import Trainer
from aqdet.engine import command as job
from aqdet.evaluation.exported import load_exported

NAME = "tiny_exported"


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    yield write_dataset(tmp_path_factory.mktemp("exported data"), NAME, size=80, classes=CLASSES)
    if NAME in DatasetCatalog:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


@pytest.fixture
def overrides(entry, tmp_path):
    return [
        *("DATASETS.DECLARED", str([entry]), "DATASETS.TRAIN", "()", "DATASETS.TEST", str((NAME,))),
        *("DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", "3"),
        *("MODEL.META_ARCHITECTURE", "QuantRetinaNet", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "100"),
        *("OUTPUT_DIR", str(tmp_path / "out")),
    ]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; gives its exit status and the last line of stderr."""
    monkeypatch.setattr(job, "setup_logger", lambda *args, **kwargs: None)
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def command(*arguments):
        status = 0
        monkeypatch.setattr("sys.argv", ["train_net.py", *map(str, arguments)])
        try:
            tool.invoke_main()
        except SystemExit as end:
            status = end.code
        return status, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return command


def test_the_metrics_are_those_of_the_model(run, overrides, tmp_path):
    # Nothing was trained: with all boxes kept some hit by chance, so that AP is not 0.
    model = make_twin(test_score_thresh=0.0, test_nms_thresh=0.9)
    folder = write_folder(tmp_path / "twin", model)
    assert run("--eval-only", "--exported", folder, *overrides)[0] == 0
    found = json.loads((tmp_path / "out" / "inference" / "metrics.json").read_text())
    cfg = load_config("", overrides)
    cfg.OUTPUT_DIR = str(tmp_path / "model")
    results = inference_on_dataset(model, Trainer.build_test_loader(cfg, NAME), Trainer.build_evaluator(cfg, NAME))
    assert results["bbox"]["AP"] > 0
    expected = json.loads((tmp_path / "model" / "inference" / "metrics.json").read_text())
    assert found == pytest.approx(expected)


def test_refusals(run, overrides, tmp_path):
    folder = write_folder(tmp_path / "twin", make_twin())
    status, line = run("--exported", folder, *overrides)
    assert (status, line) == (2, f"error: --exported {folder} can only be evaluated: add --eval-only")
    status, line = run("--eval-only", "--exported", tmp_path, *overrides)
    assert status == 2 and line.startswith("error: ") and "is not the folder of a finished export" in line
    other = write_folder(tmp_path / "other", make_twin(), classes=("disc", "cross", "car"))
    status, line = run("--eval-only", "--exported", other, *overrides)
    assert status == 2 and "detects the classes disc, cross, car, but tiny_exported of DATASETS.TEST has disc" in line


def test_what_the_config_says_otherwise_is_told(overrides, tmp_path, caplog):
    cfg = load_config("", [*overrides, "INPUT.MIN_SIZE_TEST", "70", "MODEL.RETINANET.NMS_THRESH_TEST", "0.6"])
    register_declared(cfg)
    folder = write_folder(tmp_path / "twin", make_twin())
    load_exported(cfg, folder)
    assert len(caplog.messages) == 2
    assert f"INPUT.MIN_SIZE_TEST is 70, but {folder} was exported with 64: using that" in caplog.messages
    assert f"MODEL.RETINANET.NMS_THRESH_TEST is 0.6, but {folder} was exported with 0.5: using that" in caplog.messages


def test_a_folder_without_class_names_is_told(overrides, tmp_path, caplog):
    cfg = load_config("", overrides)
    register_declared(cfg)
    folder = write_folder(tmp_path / "twin", make_twin(), classes=("class_0", "class_1", "class_2"))
    load_exported(cfg, folder)
    assert caplog.messages == [f"Only the number of classes of {folder} and {NAME} is compared: one does not name them"]


def test_the_output_is_detectron2s(overrides, entry, tmp_path):
    cfg = load_config("", overrides)
    register_declared(cfg)
    model = make_twin()
    exported = load_exported(cfg, write_folder(tmp_path / "twin", model))
    batch = next(iter(Trainer.build_test_loader(cfg, NAME)))
    with torch.no_grad():
        expected = model(batch)[0]["instances"]
    found = exported(batch)[0]["instances"]
    assert found.image_size == expected.image_size == (80, 80) and len(found) == len(expected) > 0
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert torch.allclose(found.scores, expected.scores, atol=1e-4)
    assert torch.allclose(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-2)


def test_without_onnx_runtime_the_command_says_what_to_install(run, overrides, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("aqdet.runtime", "aqdet.evaluation.exported"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, last = run("--config-file", "", "--eval-only", "--exported", tmp_path, *overrides)
    assert status == 2 and last.startswith("error: --exported needs onnxruntime: pip install '.[export]'")
