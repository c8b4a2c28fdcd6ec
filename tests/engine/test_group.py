"""Two processes agree in one step: that something is not finite, and on a norm's batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("group_runs.py"))]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command.append(str(tmp_path_factory.mktemp("group")))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_both_stop_with_the_reason_of_the_one_that_has_it(report):
    assert report["statuses"] == [0] * 6
    reasons = {"fine": "", "loss": "loss_box nan", "gradient": "gradients of 1 parameters, weight among them"}
    assert report["finite"] == [reasons, reasons]


@pytest.mark.parametrize("index", range(3), ids=("alone", "quantized", "one process without images"))
def test_a_synchronized_norm_is_that_of_the_whole_batch(report, index):
    errors = report["synchronized"][index]
    assert errors["own"] < 1e-5 and errors["shared"] < 1e-4 and errors["buffers"] < 1e-6


@pytest.mark.parametrize("index", range(2), ids=("one affine", "an affine of each level"))
def test_levels_exchange_together(report, index):
    found = report["towers"][index]
    assert found["own"] < 1e-4 and found["shared"] < 1e-4 and found["buffers"] < 1e-5
    assert found["calls"] == ["all_gather"] * 2 + ["all_reduce"] * 2  # of two norms, not of six
