"""The command line: wrong input gets one line, evaluation of a file gives a metrics file."""

import json
import os
import subprocess
import sys

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from helpers import ROOT
from train_net import invoke_main, main

from aqdet.config import load_config
from aqdet.data import make_shapes

CONFIG = ROOT / "configs" / "quickstart" / "retinanet_r18_fp_bn.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("net")
    json_file = make_shapes(root / "shapes", num_images=2, seed=5, size=96)
    declared = [{"name": "mine", "json": str(json_file), "image_root": str(root / "shapes/images")}]
    names = ["DATASETS.DECLARED", str(declared), "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)"]
    return root, names


def train_net(root, *arguments, config=CONFIG):
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(config), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["MODEL.WEIGHTS", "none.pth"], "checkpoint 'none.pth' does not exist"),
        (["DATASETS.TEST", "('coco',)"], "no dataset 'coco'"),
        (["MODEL.RETINANET.NUM_CLASSES", "4"], "NUM_CLASSES is 4, but mine has 6 classes"),
        (["MODEL.QUANT.BITS", "4"], "Non-existent key: MODEL.QUANT.BITS"),
    ],
)
def test_wrong_input_is_one_line(data, arguments, words, monkeypatch, capsys):
    root, names = data
    monkeypatch.chdir(root)
    command = ["--config-file", str(CONFIG), *names, "OUTPUT_DIR", "out_bad", *arguments]
    with pytest.raises(SystemExit) as stop:
        main(default_argument_parser().parse_args(command))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: ") and words in last


def test_a_missing_config_has_no_traceback(data):
    root, _ = data
    code, _, stderr = train_net(root, config="none.yaml")
    assert code == 2 and stderr.strip().splitlines()[-1].startswith("error: config file 'none.yaml' does not")
    assert "Traceback" not in stderr


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--num-gpus", "7"])
    with pytest.raises(SystemExit, match="error: --num-gpus 7, but there are 1 CUDA devices"):
        invoke_main()


def test_eval_only_of_a_detector_that_finds_nothing(data):
    root, names = data
    model = build_model(load_config(CONFIG))
    torch.nn.init.constant_(model.head.cls_score.bias, -50.0)
    torch.save({"model": model.state_dict()}, root / "blind.pth")
    code, stdout, stderr = train_net(root, "--eval-only", *names, "OUTPUT_DIR", "out", "MODEL.WEIGHTS", "blind.pth")
    assert code == 0, stderr
    assert json.loads((root / "out/inference/metrics.json").read_text())["AP"] == 0
