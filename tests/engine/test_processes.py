"""Two CPU processes train as one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine.test_scales import check_moves
from helpers import process_environment


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("process_runs.py"))]
    command.append(str(tmp_path_factory.mktemp("processes")))
    done = subprocess.run(command, capture_output=True, text=True, env=process_environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("run", ["gradients", "whole_gradients"])
def test_half_the_batch_each_gives_the_gradients_of_the_whole(report, run):
    # Quantized, with the auxiliary path, whose parameters DDP would miss if they were not used; as a whole with both
    # taps, the extra head, distillation, learned offsets and thresholds.
    found = report[run]
    parts = {"gradients": (), "whole_gradients": ("auxiliary.trunk.", "extra_head.", ".offset", ".intervals")}[run]
    assert found["statuses"] == [0, 0] and len(found["names"]) > 100
    assert all(any(part in name for name in found["names"]) for part in parts)
    assert found["scales"]
    assert found["normalizers"] == pytest.approx([found["normalizers"][0]] * 3)
    assert found["gradient_error"] < 1e-5
    # Only PACT's alphas that clip nothing.
    assert all(name.endswith("quantizer.alpha") for name in found["zero_gradients"])


def test_scales_learn_in_two_processes_as_in_one(report):
    learned = report["learned"]
    assert learned["statuses"] == [0, 0] and learned["moves"][0] == learned["moves"][1]
    check_moves(learned["moves"][0])


def test_adaptors_are_averaged_over_processes(report):
    aligning = report["aligning"]
    assert aligning["statuses"] == [0, 0] and len(aligning["moved"]) > 20
    assert all(".conv.norm." in name for name in aligning["moved"])
    assert aligning["agree"] and aligning["error"] < 1e-5


def test_a_failing_calibration_stops_all_processes_with_the_reason(report):
    assert report["calibration"]["texts"] == [
        "RuntimeError: calibration failed on rank 1: ValueError: no such image",
        "ValueError: no such image",
    ]


def test_a_killed_worker_is_restarted_and_the_run_goes_on(report):
    elastic = report["elastic"]
    assert elastic["start"] == 2  # killed in iteration 3, the checkpoint is of iteration 1
    assert elastic["ranks_agree"] and elastic["error"] < 1e-4
    (counts, scores), (counts_alone, scores_alone) = elastic["detections"]
    assert counts == counts_alone and min(counts) > 0  # each image once, whichever process saw it
    assert scores == pytest.approx(scores_alone, abs=1e-4)


def test_a_signal_to_one_process_stops_both_after_the_same_iteration(report):
    assert report["stopped"] == [[128 + 15, 1]] * 2


def test_the_main_process_decides_for_all_what_a_resume_continues_from(report):
    ours, theirs = report["resumed"]
    assert ours[0] is None and theirs[0] is None  # the second one's is of an earlier run
    for disk, texts in enumerate((ours, theirs)):
        for text in texts[1:3]:
            assert text == (
                f"process 1 does not find checkpoint '/disk{disk}/model_0000004.pth', which the main process is to "
                "continue from: OUTPUT_DIR must be on storage that all nodes share"
            )
    assert ours[3] == theirs[3] == 4
    assert report["started"] == ["0", "0"]
