"""What the command leaves in OUTPUT_DIR: a training its own, an evaluation its results, a refused command nothing."""

import contextlib
import errno
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import train_net as tool
import yaml
from helpers import QUANT, make_cfg, make_model
from tiny_data import train_overrides, write_dataset

from aqdet.checkpoint import files as checkpoint_files
from aqdet.engine import command as job
from aqdet.engine.hooks import calibration
from aqdet.engine.output_folder import LOCK
from aqdet.utils.console import Terminated


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), "tiny_folder")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    torch.save({"model": make_model("MODEL.FPN.RELU", "True").state_dict()}, folder / "float.pth")
    weights = ("MODEL.WEIGHTS", str(folder / "float.pth"))
    (folder / "tiny.yaml").write_text(make_cfg("MODEL.FPN.RELU", "True", *QUANT, *weights).dump())
    return str(folder / "tiny.yaml")


def call(config_file, *arguments):
    """Runs the command in this process; its exit status and the last line that it printed on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        # They would stop messages of aqdet from reaching other tests.
        patch.setattr(job, "setup_logger", lambda *args, **kwargs: None)
        patch.delenv("AQDET_DEBUG", raising=False)
        patch.setattr(sys, "argv", ["train_net.py", "--config-file", config_file, *map(str, arguments)])
        lines = []
        patch.setattr(
            sys, "stderr", type("Lines", (), {"write": lines.append, "flush": lambda: None, "isatty": lambda: False})
        )
        status = 0
        try:
            tool.invoke_main()
        except SystemExit as end:
            status = end.code
    return status, "".join(lines).strip()


def contents(folder):
    """Names, times and checksums of all files."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def trained(entry, config_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "new" / "out"
    status, printed = call(config_file, *train_overrides(entry, output, max_iter=2))
    assert status == 0, printed
    return output


def test_a_training_leaves_its_files_and_no_lock(trained):
    names = set(os.listdir(trained))
    expected = {"config.yaml", "dataset_check.json", "dataset_check.txt", "inference", "last_checkpoint", "log.txt"}
    expected |= {"metrics.json", "model_final.pth", "model_final_stripped.pth"}
    assert expected == {name for name in names if not name.startswith("events.")} and LOCK not in names
    log = (trained / "log.txt").read_text()
    assert "Command line arguments: " in log
    noted = json.loads((trained / "inference" / "evaluation.json").read_text())
    assert noted["iterations"] == 2 and noted["weights"] == str(trained / "model_final.pth")
    assert len(noted["sha256"]) == 64
    for line in (trained / "metrics.json").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # AP of a class without objects is no number


def test_refused_commands_leave_nothing(entry, config_file, tmp_path):
    broken = json.loads(Path(entry["json"]).read_text())
    broken["images"][0]["file_name"] = "gone.png"
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    gone = {**entry, "name": "tiny_folder_gone", "json": str(tmp_path / "broken.json")}
    before = contents(tmp_path)
    for data, arguments, words in (
        (entry, ["MODEL.WEIGHTS", "none.pth"], "checkpoint 'none.pth' does not exist"),
        (entry, ["MODEL.RETINANET.NUM_CLASSES", "4"], "NUM_CLASSES is 4"),
        (entry, ["MODEL.QUANT.CALIBRATION.METHOD", "best"], "CALIBRATION.METHOD must be one of"),
        (entry, ["SOLVER.MAX_ITER", "-1"], "SOLVER.MAX_ITER must not be negative, got -1"),
        (gone, [], "image-missing"),
        (gone, ["--eval-only"], "image-missing"),
    ):
        flags = [argument for argument in arguments if argument.startswith("--")]
        overrides = [argument for argument in arguments if not argument.startswith("--")]
        status, printed = call(config_file, *flags, *train_overrides(data, tmp_path / "out"), *overrides)
        assert status == 2 and words in printed.splitlines()[-1], printed
        assert contents(tmp_path) == before and not (tmp_path / "out").exists(), words


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("MODEL.FPN.OUT_CHANNELS", "32"), "that --resume is to go on with: "),
        (("MODEL.AUX.ENABLED", "True"), "missing auxiliary."),
        (("MODEL.QUANT.ENABLED", "False"), "MODEL.QUANT.ENABLED is False"),
        (("CHECKPOINT.ALLOW_KEYS", "['.*']", "MODEL.FPN.OUT_CHANNELS", "32"), "MODEL.FPN.OUT_CHANNELS: 16 in the file"),
    ],
)
def test_a_refused_resume_changes_nothing(trained, entry, config_file, overrides, words):
    before = contents(trained)
    status, printed = call(config_file, "--resume", *train_overrides(entry, trained, max_iter=4), *overrides)
    assert status == 2 and words in printed.splitlines()[-1], printed
    assert contents(trained) == before


def test_a_resume_with_other_classes_is_one_line_whatever_the_start_allowed(trained, config_file, tmp_path):
    other = write_dataset(tmp_path / "data", "tiny_folder_two", classes=("disc", "cross"))
    allowed = ["CHECKPOINT.ALLOW_KEYS", r"['head\\.cls_score']", "MODEL.RETINANET.NUM_CLASSES", "2"]
    before = contents(trained)
    status, printed = call(config_file, "--resume", *train_overrides(other, trained, max_iter=4), *allowed)
    last = printed.splitlines()[-1]
    assert status == 2 and "MODEL.RETINANET.NUM_CLASSES: 3 in the file, 2 in the model" in last
    assert "ALLOW_KEYS" not in last and contents(trained) == before


def test_evaluation_leaves_the_run_alone_and_says_what_it_evaluated(trained, entry, config_file):
    before = contents(trained)
    weights = str(trained / "model_final_stripped.pth")
    overrides = ["MODEL.WEIGHTS", weights, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.3"]
    status, printed = call(config_file, "--eval-only", *train_overrides(entry, trained), *overrides)
    assert status == 0, printed
    after = contents(trained)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed and not set(before) - set(after) and all(name.startswith("inference/") for name in changed)
    cfg = yaml.safe_load((trained / "inference" / "config.yaml").read_text())
    assert cfg["MODEL"]["RETINANET"]["SCORE_THRESH_TEST"] == 0.3
    noted = json.loads((trained / "inference" / "evaluation.json").read_text())
    assert noted["weights"] == weights and noted["sha256"] == after["model_final_stripped.pth"][1]
    assert "Command line arguments" in (trained / "inference" / "log.txt").read_text()


def test_a_second_training_is_refused_while_one_runs(trained, entry, config_file, monkeypatch):
    monkeypatch.setattr("aqdet.engine.output_folder.fcntl.lockf", _locked)  # as another process's lock would
    (trained / LOCK).write_text(json.dumps({"pid": 7, "host": "elsewhere", "started": "2026-01-02 03:04:05"}))
    before = contents(trained)
    status, printed = call(config_file, *train_overrides(entry, trained, max_iter=2))
    (trained / LOCK).unlink()
    assert status == 2
    assert "is in use: a training runs in it (process 7 on elsewhere, since 2026-01-02 03:04:05)" in printed
    before.pop(LOCK)
    assert contents(trained) == before


def _locked(*args):
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_a_training_that_went_on_meanwhile_is_not_overwritten(trained, entry, config_file, monkeypatch):
    class Slow(job.Trainer):
        def resume_or_load(self, resume=True):
            super().resume_or_load(resume)
            (trained / "last_checkpoint").write_text("model_0000099.pth")  # by another process

    monkeypatch.setattr(job, "Trainer", Slow)
    before = contents(trained)
    status, printed = call(config_file, "--resume", *train_overrides(entry, trained, max_iter=4))
    (trained / "last_checkpoint").write_text("model_final.pth")
    assert status == 2 and "another training has gone on from" in printed
    assert {n: c[1] for n, c in contents(trained).items()} == {n: c[1] for n, c in before.items()}


def test_no_step_is_post_training_quantization(entry, config_file, tmp_path, caplog):
    caplog.set_level("INFO", "aqdet")
    status, printed = call(config_file, *train_overrides(entry, tmp_path, max_iter=0))
    assert status == 0, printed
    assert "SOLVER.MAX_ITER is 0: no step is trained. Quantizers are calibrated (post-training" in caplog.text
    assert "Calibrated" in caplog.text and "(1) nothing was trained" in caplog.text
    whole, stripped = (torch.load(tmp_path / f"model_final{end}.pth", weights_only=True) for end in ("", "_stripped"))
    assert all(torch.equal(value, whole["model"][key]) for key, value in stripped["model"].items())
    assert all(value for key, value in stripped["model"].items() if key.endswith("quantizer.calibrated"))
    start = torch.load(yaml.safe_load(Path(config_file).read_text())["MODEL"]["WEIGHTS"], weights_only=True)["model"]
    assert all(torch.equal(stripped["model"][key], value) for key, value in start.items())
    assert json.loads((tmp_path / "inference" / "metrics.json").read_text())["AP"] == 0
    assert call(config_file, "--resume", *train_overrides(entry, tmp_path, max_iter=1))[0] == 0
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 0


@pytest.mark.parametrize("max_iter", [0, 2])
@pytest.mark.parametrize(("interrupt", "name"), [(KeyboardInterrupt, "SIGINT"), (Terminated, "SIGTERM")])
def test_a_signal_while_calibrating(entry, config_file, tmp_path, monkeypatch, max_iter, interrupt, name):
    def interrupted(*args, **kwargs):
        raise interrupt

    monkeypatch.setattr(calibration, "calibrate", interrupted)
    status, printed = call(config_file, *train_overrides(entry, tmp_path, max_iter=max_iter))
    assert status == 128 + signal.Signals[name]
    assert printed.splitlines()[-1] == f"stopped by {name} before the first iteration: nothing is saved"
    assert not list(tmp_path.glob("*.pth")) and not (tmp_path / LOCK).exists()


class FullDisk:
    """A file on a disk with room for a megabyte."""

    def __init__(self, file):
        self._file = file

    def write(self, content):
        if self._file.tell() > 1_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(content)


def test_a_full_disk_is_one_line_and_a_resume_goes_on_once_there_is_room(entry, config_file, tmp_path, monkeypatch):
    whole = checkpoint_files.open_replacing

    @contextlib.contextmanager
    def full(path, *args, **kwargs):
        with whole(path, *args, **kwargs) as file:
            if str(path).endswith("model_0000001.pth"):
                file = FullDisk(file)
            yield file

    monkeypatch.setattr(checkpoint_files, "open_replacing", full)
    overrides = [*train_overrides(entry, tmp_path, max_iter=3), "SOLVER.CHECKPOINT_PERIOD", "1"]
    status, printed = call(config_file, *overrides)
    assert status == 2 and "Traceback" not in printed
    last = printed.splitlines()[-1]
    assert "No space left on device (about" in last and "MB are needed, " in last and "model_0000001.pth'" in last
    assert not list(tmp_path.rglob("*.part")) and (tmp_path / "last_checkpoint").read_text() == "model_0000000.pth"
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
    monkeypatch.undo()
    assert call(config_file, "--resume", *overrides)[0] == 0
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 2


def test_only_empty_images_name_the_key(config_file, tmp_path):
    empty = write_dataset(tmp_path / "data", "tiny_folder_empty", num_images=2, empty=(0, 1))
    status, printed = call(config_file, *train_overrides(empty, tmp_path / "out"))
    last = printed.splitlines()[-1]
    assert status == 2 and "DATALOADER.FILTER_EMPTY_ANNOTATIONS True leaves out images without boxes" in last
    assert not (tmp_path / "out").exists()
