"""The command line: wrong input gets one line, evaluation of a file gives a metrics file."""

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from helpers import QUANT, ROOT, make_cfg, make_model
from tiny_data import train_overrides, write_dataset
from train_net import argument_parser, invoke_main, main

from aqdet.config import load_config
from aqdet.data import make_shapes
from aqdet.engine import command as job

CONFIG = ROOT / "configs" / "quickstart" / "retinanet_r18_fp_bn.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("net")
    json_file = make_shapes(root / "shapes", num_images=2, seed=5, size=96)
    declared = [{"name": "mine", "json": str(json_file), "image_root": str(root / "shapes/images")}]
    names = ["DATASETS.DECLARED", str(declared), "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)"]
    return root, names


def train_net(root, *arguments, processes):
    """Runs the tool under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *torchrun, str(ROOT / "tools/train_net.py"), "--config-file", str(CONFIG), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["MODEL.WEIGHTS", "none.pth"], "checkpoint 'none.pth' does not exist"),
        (["DATASETS.TEST", "('coco',)"], "no dataset 'coco'"),
        (["MODEL.RETINANET.NUM_CLASSES", "4"], "NUM_CLASSES is 4, but mine has 6 classes"),
        (["MODEL.QUANT.BITS", "4"], "Non-existent key: MODEL.QUANT.BITS"),
        (["MODEL.META_ARCHITECTURE", "Retina"], "MODEL.META_ARCHITECTURE must be one of "),
        (["OUTPUT_DIR", "/dev/null/out"], "OUTPUT_DIR '/dev/null/out' cannot be made: Not a directory"),
    ],
)
def test_wrong_input_is_one_line(data, arguments, words, monkeypatch, capsys):
    root, names = data
    monkeypatch.chdir(root)
    command = ["--config-file", str(CONFIG), *names, "OUTPUT_DIR", "out_bad", *arguments]
    with pytest.raises(SystemExit) as stop:
        main(argument_parser().parse_args(command))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: ") and words in last


@pytest.mark.parametrize("name", ["quickstart/retinanet_r18_fp_bn.yaml", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"])
def test_a_config_by_its_name(data, name, monkeypatch, capsys):
    root, names = data
    monkeypatch.chdir(root)
    command = ["--config-file", name, "--eval-only", *names, "MODEL.RETINANET.NUM_CLASSES", "6", "MODEL.DEVICE", "cpu"]
    with pytest.raises(SystemExit):
        main(argument_parser().parse_args([*command, "OUTPUT_DIR", "out_named", "MODEL.WEIGHTS", "none.pth"]))
    # The config has been read and logged: it ends at the weights.
    assert "checkpoint 'none.pth' does not exist" in capsys.readouterr().err
    # Where a CPU is asked for, PyTorch does not warn that it has no GPU, nor is another warning kept back.
    logger = logging.getLogger("torch.utils.cpp_extension")
    texts = ("No CUDA runtime is found, using CUDA_HOME='%s'", "CUDA_HOME is no folder")
    records = [logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None) for text in texts]
    assert [bool(logger.filter(record)) for record in records] == [False, True]


def test_more_gpus_than_there_are(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--num-gpus", "7"])
    with pytest.raises(SystemExit) as stop:
        invoke_main()
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: --num-gpus 7, but there are 1 CUDA devices (on CPUs: torchrun --nproc_per_node 7")


def test_eval_only_of_a_detector_that_finds_nothing(data):
    root, names = data
    model = build_model(load_config(CONFIG))
    torch.nn.init.constant_(model.head.cls_score.bias, -50.0)
    torch.save({"model": model.state_dict()}, root / "blind.pth")
    arguments = ("--eval-only", *names, "OUTPUT_DIR", "out", "MODEL.WEIGHTS", "blind.pth")
    code, _, stderr = train_net(root, *arguments, processes=2)
    assert code == 0, stderr
    assert json.loads((root / "out/inference/metrics.json").read_text())["AP"] == 0


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), "tiny_train_net")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(make_cfg("MODEL.FPN.RELU", "True").dump())
    return str(path)


@pytest.fixture(scope="module")
def trained(entry, config_file, tmp_path_factory):
    """Output folder of a quantized training by the command itself, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    torch.save({"model": make_model("MODEL.FPN.RELU", "True").state_dict()}, folder / "float.pth")
    overrides = [*train_overrides(entry, folder / "out", max_iter=2), *QUANT]
    overrides += [
        "MODEL.WEIGHTS",
        str(folder / "float.pth"),
        "MODEL.DEVICE",
        "cuda",
        "MODEL.FPN.NORM",
        "SyncBN",
    ]
    command = [sys.executable, "tools/train_net.py", "--config-file", config_file, *overrides]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "out", done.stdout + done.stderr


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; gives its exit status and what it printed on stderr."""
    # They would stop messages of aqdet from reaching the tests after this one.
    monkeypatch.setattr(job, "setup_logger", lambda *args, **kwargs: None)
    # Detectron2's handlers write to the captured, by now closed, stdout of the test that made them.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.delenv("AQDET_DEBUG", raising=False)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, arguments)])
        status = 0
        try:
            invoke_main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err

    return command


def test_training_writes_everything_and_says_what_it_replaced(trained):
    output, printed = trained
    for name in ("model_final.pth", "model_final_stripped.pth", "metrics.json", "inference/metrics.json"):
        assert (output / name).is_file(), name
    assert list(output.glob("events.out.tfevents.*"))
    assert "there is no CUDA device: using cpu" in printed
    assert "MODEL.FPN.NORM: SyncBN does not run on a CPU: using BN" in printed
    assert "Calibrated" in printed and "missing of quantizers" in printed
    assert (output / "log.txt").is_file() and "Calibrated" in (output / "log.txt").read_text()


def test_eval_only_gives_the_ap_of_the_training(trained, entry, config_file, run, tmp_path):
    output, _ = trained
    overrides = [*train_overrides(entry, tmp_path / "again"), *QUANT]
    overrides += ["MODEL.WEIGHTS", str(output / "model_final_stripped.pth")]
    assert run("--config-file", config_file, "--eval-only", *overrides)[0] == 0
    metrics = [json.loads((x / "inference" / "metrics.json").read_text()) for x in (output, tmp_path / "again")]
    assert metrics[0] == metrics[1]


def test_eval_only_resume_takes_the_last_checkpoint(trained, entry, config_file, run):
    output, _ = trained
    (output / "inference" / "metrics.json").unlink()
    overrides = [*train_overrides(entry, output), *QUANT, "MODEL.WEIGHTS", "nowhere.pth"]
    assert run("--config-file", config_file, "--eval-only", "--resume", *overrides)[0] == 0
    assert (output / "inference" / "metrics.json").is_file()


def test_eval_only_of_float_weights_in_a_quantized_config(trained, entry, config_file, run, tmp_path):
    weights = ["MODEL.WEIGHTS", str(trained[0].parent / "float.pth")]
    overrides = [*train_overrides(entry, tmp_path), *QUANT, *weights]
    status, printed = run("--config-file", config_file, "--eval-only", *overrides)
    assert status == 2 and "quantizers are not calibrated" in printed.splitlines()[-1]


def test_debug_shows_where(run, monkeypatch):
    monkeypatch.setenv("AQDET_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        run("--config-file", "nowhere.yaml")


def test_a_missing_image_is_one_line(entry, config_file, run, tmp_path):
    content = json.loads(Path(entry["json"]).read_text())
    content["images"][0]["file_name"] = "gone.png"
    json_file = tmp_path / "gone.json"
    json_file.write_text(json.dumps(content))
    gone = {**entry, "name": "tiny_gone", "json": str(json_file)}
    status, printed = run("--config-file", config_file, "--eval-only", *train_overrides(gone, tmp_path / "out"))
    last = printed.splitlines()[-1]
    assert status == 2 and "tiny_gone: 1 problem; 1 image-missing: " in last and "gone.png" in last


def test_an_image_that_goes_during_the_run_is_one_line_from_a_worker_too(
    entry, config_file, run, tmp_path, monkeypatch
):
    shutil.copytree(entry["image_root"], tmp_path / "images")
    going = {**entry, "name": "tiny_going", "image_root": str(tmp_path / "images")}
    check = job.check_datasets

    def check_then_lose(*args, **kwargs):
        found = check(*args, **kwargs)
        for path in (tmp_path / "images").glob("*.png"):
            path.unlink()
        return found

    monkeypatch.setattr(job, "check_datasets", check_then_lose)
    arguments = ("--eval-only", *train_overrides(going, tmp_path / "out"), "DATALOADER.NUM_WORKERS", "1")
    status, printed = run("--config-file", config_file, *arguments)
    last = printed.splitlines()[-1]
    assert status == 2 and last.startswith("error: FileNotFoundError: ") and ".png" in last


def test_a_missing_config_has_no_traceback(run):
    status, printed = run("--config-file", "none.yaml")
    assert status == 2 and printed.strip().splitlines()[-1].startswith("error: config file 'none.yaml' does not")
    assert "Traceback" not in printed


def test_unsafe_config(run, tmp_path):
    unsafe = tmp_path / "unsafe.yaml"
    unsafe.write_text("OUTPUT_DIR: !!python/object/apply:os.getcwd []\n")
    status, printed = run("--config-file", unsafe)
    assert status == 2 and printed.startswith("error: ") and "object tag" in printed and printed.count("\n") == 1


class SignalsItself(HookBase):
    """As another process would, in the second iteration."""

    def before_step(self):
        if self.trainer.iter == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_saves_and_prints_the_command_that_continues(entry, config_file, run, tmp_path, monkeypatch):
    class Signalled(job.Trainer):
        def build_hooks(self):
            return [SignalsItself(), *super().build_hooks()]

    monkeypatch.setattr(job, "Trainer", Signalled)
    handler = signal.getsignal(signal.SIGTERM)
    overrides = train_overrides(entry, tmp_path, max_iter=3)
    status, printed = run("--config-file", config_file, *overrides)
    assert status == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler
    last = printed.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM after iteration 1; continue with: python train_net.py --resume ")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "model_final.pth").exists() and not (tmp_path / "inference").exists()
    (tmp_path / "metrics.json").unlink()  # is said, and no reason not to go on
    monkeypatch.undo()
    words = shlex.split(last.partition("continue with: python ")[2])
    monkeypatch.setattr(job, "setup_logger", lambda *args, **kwargs: None)
    monkeypatch.setattr(sys, "argv", words)
    invoke_main()
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 2
    assert (tmp_path / "inference" / "metrics.json").exists()


def test_determinism_needs_a_seed(entry, config_file, run, tmp_path):
    overrides = [*train_overrides(entry, tmp_path), "SEED", "-1", "SOLVER.DETERMINISTIC", "True"]
    status, printed = run("--config-file", config_file, *overrides)
    assert status == 2 and "SOLVER.DETERMINISTIC needs a SEED of 0 or more, got -1" in printed
