"""A run that is stopped, however, ends as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from helpers import process_environment

from aqdet.engine.hooks.interrupt import InterruptHook

# By hand, for more: AQDET_TEST_KILLS=100 AQDET_TEST_KILL_SEED=7 pytest tests/engine/hooks/test_interrupt.py
KILLS = int(os.environ.get("AQDET_TEST_KILLS", "10"))
pytestmark = pytest.mark.timeout(600 + 20 * KILLS)
SEED = os.environ.get("AQDET_TEST_KILL_SEED", "0")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent.parent / "kill_runs.py")]
    command += [str(tmp_path_factory.mktemp("kills")), str(KILLS), SEED]
    done = subprocess.run(command, capture_output=True, text=True, env=process_environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_runs_end_with_the_same_weights_and_metrics(report):
    assert sum(run["kills"] for run in report["runs"]) >= KILLS
    assert {run["workers"] for run in report["runs"]} == {0, 2}
    for run in report["runs"]:
        assert run["weights"] and run["metrics"], run


def test_the_uninterrupted_run_has_a_line_for_every_third_iteration_and_evaluation(report):
    lines = [json.loads(line) for line in report["lines"]]
    losses = [line["iteration"] for line in lines if "total_loss" in line]
    evaluations = [line["iteration"] for line in lines if "bbox/AP" in line]
    assert losses == [2, 5, 8, 9] and evaluations == [3, 7, 10]
    assert len({line["total_loss"] for line in lines if "total_loss" in line}) == 4


def test_the_newest_checkpoints_are_kept_and_none_is_left_half_written(report):
    for run in report["runs"]:
        assert run["numbered"] == [f"model_{i:07d}.pth" for i in (5, 7, 9)] and not run["aside"]


def test_signals_to_the_whole_process_group_save_and_stop(report):
    assert [run["status"] for run in report["interrupted"]] == [128 + 15, 128 + 2]
    for run in report["interrupted"]:
        assert run["last"] == "model_0000001.pth"
        assert run["weights"] and run["metrics"], run


@pytest.mark.parametrize(("max_iter", "takes"), [(0, False), (1, True)])
def test_without_an_iteration_to_wait_for_signals_act_at_once(max_iter, takes):
    """Post-training quantization evaluates without one, for as long as an evaluation takes."""
    hook = InterruptHook(None)
    hook.trainer = types.SimpleNamespace(start_iter=0, max_iter=max_iter)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    hook.before_train()
    during = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    hook.after_train()
    assert (during != before) == takes
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
