"""A run's folder: one training at a time, and notes of what an evaluation was made with."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from helpers import make_cfg, process_environment

from aqdet.engine import output_folder
from aqdet.engine.output_folder import LOCK, check_output_dir, evaluation_noted, holding, write_config

HOLDER = """
import os, sys, time
from aqdet.engine.output_folder import holding
with holding(sys.argv[1]):
    if os.fork() == 0:  # as a data loader's worker, which outlives a killed training for a moment
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder ``out``."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLDER, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=process_environment(),
        start_new_session=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_held_folder_is_refused_by_the_process_that_holds_it(tmp_path, holder):
    folder = str(tmp_path / "out")
    before = sorted(os.listdir(folder))
    words = f"OUTPUT_DIR {folder!r} is in use: a training runs in it .process {holder.pid} on .*, since 20"
    with pytest.raises(ValueError, match=words):
        check_output_dir(folder, train=True)
    with pytest.raises(ValueError, match=words), holding(folder):
        raise AssertionError("entered")
    check_output_dir(folder, train=False)  # an evaluation may
    assert sorted(os.listdir(folder)) == before == [LOCK]
    with holding(str(tmp_path / "other")):
        pass


def test_a_killed_training_blocks_nothing(tmp_path, holder):
    folder = str(tmp_path / "out")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert os.path.exists(os.path.join(folder, LOCK))
    check_output_dir(folder, train=True)
    with holding(folder) as is_outermost:
        assert is_outermost
        assert json.loads((tmp_path / "out" / LOCK).read_text())["pid"] == os.getpid()


def test_the_lock_goes_when_the_block_ends_however(tmp_path):
    folder = str(tmp_path / "a" / "b")
    with holding(folder) as outer, holding(folder) as inner:
        assert (outer, inner) == (True, False) and os.listdir(folder) == [LOCK]
        check_output_dir(folder, train=True)  # its own
    assert os.listdir(folder) == []
    with pytest.raises(KeyboardInterrupt), holding(folder):
        raise KeyboardInterrupt
    assert os.listdir(folder) == [] and not output_folder._held


def test_a_lock_file_that_was_removed_meanwhile_is_not_taken(tmp_path, monkeypatch):
    folder = str(tmp_path)
    lock, calls = output_folder._lock, []

    def lock_then_lose(file):
        calls.append(file)
        if len(calls) == 1:
            os.unlink(os.path.join(folder, LOCK))  # the training before ends between opening and locking
        return lock(file)

    monkeypatch.setattr(output_folder, "_lock", lock_then_lose)
    with holding(folder):
        assert len(calls) == 2 and os.path.exists(os.path.join(folder, LOCK))


def test_a_storage_without_locks_is_said_and_trains(tmp_path, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(output_folder.fcntl, "lockf", no_locks)
    with holding(str(tmp_path)):
        assert "cannot be locked (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_is_said_and_nothing_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="OUTPUT_DIR .*file/out' cannot be made: Not a directory: .*file'"):
        check_output_dir(str(tmp_path / "file" / "out"), train=True)
    check_output_dir(str(tmp_path / "new" / "out"), train=True)
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(ValueError, match="^OUTPUT_DIR is empty: name a folder$"):
        check_output_dir("", train=True)


def test_the_config_of_an_earlier_training_is_kept(tmp_path):
    for seed in ("1", "1", "2"):
        write_config(make_cfg("OUTPUT_DIR", str(tmp_path), "SEED", seed))
    seeds = {name: yaml.safe_load((tmp_path / name).read_text())["SEED"] for name in os.listdir(tmp_path)}
    assert seeds == {"config.yaml": 2, "config.yaml.old": 1}


def test_an_evaluation_is_noted_when_it_is_done(tmp_path):
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path / "out"), "SEED", "3")
    (tmp_path / "w.pth").write_bytes(b"abc")
    with evaluation_noted(cfg, weights=str(tmp_path / "w.pth")):
        assert not (tmp_path / "out").exists()
    noted = json.loads((tmp_path / "out" / "inference" / "evaluation.json").read_text())
    assert noted["weights"] == str(tmp_path / "w.pth") and noted["sha256"].startswith("ba7816bf8f01cfea")
    assert yaml.safe_load((tmp_path / "out" / "inference" / "config.yaml").read_text())["SEED"] == 3
    with pytest.raises(ValueError), evaluation_noted(cfg, weights="x"):
        raise ValueError  # half done: what stands there is not what the older note says
    assert not os.listdir(tmp_path / "out" / "inference")
