"""The program that quantizes without training: from a float checkpoint to a folder that runs, a table and advice."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from helpers import load_tool, make_cfg
from lively import STD, lively
from tiny_data import write_dataset

from aqdet.export.post_training import advice, training_command
from aqdet.quantization import CALIBRATION_METHODS
from aqdet.runtime import Detector

SIZES = ("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96", "DATALOADER.NUM_WORKERS", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a dataset, a float config that names it, and a checkpoint."""
    root = tmp_path_factory.mktemp("quantize")
    entry = write_dataset(root / "data", "tiny_quantize", num_images=5)
    data = ("DATASETS.DECLARED", str([entry]), "DATASETS.TRAIN", "('tiny_quantize',)")
    (root / "config.yaml").write_text(make_cfg(*STD, *SIZES, *data).dump())
    torch.save({"model": lively().state_dict()}, root / "model.pth")
    return root


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["tools/quantize.py", *map(str, arguments)])
    load_tool("quantize").main()


def ours(root):
    return (
        "--config-file",
        root / "config.yaml",
        "--weights",
        root / "model.pth",
        "--batch-size",
        2,
        "--method",
        "minmax",
    )


def test_with_a_dataset(run, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "w8.pth"
    options = ("--output", tmp_path / "w8", "--dataset", "tiny_quantize", "--save-checkpoint", saved, "--force")
    command(monkeypatch, *ours(run), *options)
    out = capsys.readouterr().out
    assert "calibrating on 5 images of tiny_quantize" in out and "error of the outputs" in out
    table = out[out.index("float  ") :]
    assert "8 bits, exported" in table and "\nAP  " in table and "size, MB" in table and "found again" in table
    assert "AP-disc" not in table
    assert f"train_net.py --config-file {run / 'config.yaml'} MODEL.QUANT.ENABLED True" in table
    report = json.loads((tmp_path / "w8" / "report.json").read_text())
    assert {"float", "exported"} <= set(report["evaluation"]["metrics"]["AP"])
    assert "| | float | quantized |" in (tmp_path / "w8" / "report.md").read_text()
    assert "| | float | as it ships |" in (tmp_path / "w8" / "README.md").read_text()
    # What was saved is a checkpoint of quantized training, beside the config that reads it.
    monkeypatch.setattr("sys.argv", ["export_model.py"])
    from aqdet.checkpoint import load_detector
    from aqdet.config import load_config

    load_detector(load_config(tmp_path / "w8.yaml"), str(saved))


def test_neither_weights_nor_a_config_of_others_is_replaced(run, tmp_path, monkeypatch, capsys):
    weights = run / "model.pth"
    before = weights.read_bytes()
    (tmp_path / "mine.yaml").write_text("SEED: 1")
    for saved, words in (
        (weights, "--save-checkpoint .* would replace a file that is read"),
        (run / "config.pth", "the config beside it .* would replace a file that is read"),
        (tmp_path / "mine.pth", "mine.yaml, which it has not written: name another file"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, *ours(run), "--output", tmp_path / "w8", "--save-checkpoint", saved)
        assert re.search(words, f"{stop.value} {capsys.readouterr().err}")
    assert weights.read_bytes() == before and (tmp_path / "mine.yaml").read_text() == "SEED: 1"


def test_detectron2s_config_and_zoo_file_and_images_alone(tmp_path, monkeypatch, capsys):
    names = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "MODEL.RETINANET.NORM", "", *SIZES)
    (tmp_path / "theirs.yaml").write_text(make_cfg(*STD, *names, theirs=True).dump())
    arrays = {key: value.numpy() for key, value in lively(*names, theirs=True).state_dict().items()}
    with open(tmp_path / "model.pkl", "wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file)
    write_dataset(tmp_path / "photos", "unused", num_images=3)
    given = ("--config-file", tmp_path / "theirs.yaml", "--weights", tmp_path / "model.pkl", "--method", "minmax")
    options = ("--images", tmp_path / "photos", "--output", tmp_path / "w8", "--method", "minmax", "--force")
    command(monkeypatch, *given, *options, "CHECKPOINT.ALLOW_PICKLE", "True")
    out = capsys.readouterr().out
    assert "MODEL.META_ARCHITECTURE QuantRetinaNet" in out and "MODEL.BACKBONE.NAME build_quant_retinanet" in out
    assert "BN estimated again" not in out and "8 bits, exported" in out
    assert len(Detector(tmp_path / "w8").detect([np.zeros((64, 64, 3), np.uint8)])) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-loss", "0.5"), "--max-loss: name the --dataset"),
        (("--bits", "9"), "--bits: must be a whole number from 2 to 8"),
        (("--images", "none"), "--images: 'none' does not exist"),
        (("--dataset", "no_such"), "no_such"),
        (("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), "MODEL.META_ARCHITECTURE must be one of RetinaNet"),
        (("MODEL.RETINANET.NORM", "GN"), "does not fold into integers"),
    ],
)
def test_what_cannot_be_quantized_is_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *ours(run), "--output", tmp_path / "out", *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def report(full, exported):
    return {"evaluation": {"metrics": {"AP": {"float": full, "exported": exported}}}}


def found(trained, matched):
    return {"trained": trained, "matched": matched}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--bits", 8), False),
        (("--bits", 4), True),
        (("--bits", 4, "--no-reconstruct"), False),
        (("--bits", 5, "--reconstruct"), True),
    ],
)
def test_weights_are_reconstructed_at_few_bits_unless_asked_otherwise(run, tmp_path, monkeypatch, options, expected):
    class Asked(Exception):
        pass

    def quantize_detector(*_, reconstruct, **__):
        raise Asked(reconstruct)

    monkeypatch.setattr("aqdet.engine.post_training.quantize_detector", quantize_detector)
    with pytest.raises(Asked, match=str(expected)):
        command(monkeypatch, *ours(run), "--output", tmp_path / "out", *options)


@pytest.mark.parametrize(
    ("given", "matches", "bits", "worth", "words"),
    [
        (report(51.6, 51.5), found(9, 1), 8, False, ("AP falls by 0.1: 8 bits without training are enough", "fewer")),
        (report(51.6, 52.5), found(9, 9), 4, False, ("AP falls by 0.0: 4 bits without training are enough",)),
        (report(51.6, 30.0), found(9, 9), 4, True, ("AP falls by 21.6: training at 4 bits is worth it", "train")),
        (report(51.6, float("nan")), found(9, 9), 4, True, ("worth it",)),
        ({}, found(100, 99), 8, False, ("99.0% of the detections are found again: 8 bits without",)),
        ({}, found(100, 80), 8, True, ("80.0% of the detections are found again: training at 8 bits is worth it",)),
        ({}, found(0, 0), 8, False, ("Nothing is known of the loss",)),
    ],
)
def test_advice(given, matches, bits, worth, words):
    verdict, text = advice(given, matches, bits, "train", "fewer")
    assert verdict is worth and all(word in text for word in words)


def test_the_command_that_trains():
    pairs = ["MODEL.QUANT.ENABLED", "True"]
    line = training_command("aqdet train", "my config.yaml", "w.pth", pairs, 0.01, ["SEED", "1"])
    assert line == (
        "aqdet train --config-file 'my config.yaml' MODEL.QUANT.ENABLED True SEED 1 MODEL.AUX.ENABLED True "
        "MODEL.WEIGHTS w.pth SOLVER.BASE_LR 0.002"
    )


def test_all_methods_can_be_named():
    assert load_tool("quantize").METHODS == CALIBRATION_METHODS
