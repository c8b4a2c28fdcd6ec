"""Two CPU processes train a Mask R-CNN together, one of them on images without objects."""

import json
import math
import subprocess
import sys
from pathlib import Path

from helpers import process_environment


def test_every_gradient_is_the_mean_over_the_processes_also_without_objects_in_one(tmp_path):
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("two_stage_runs.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=process_environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["statuses"] == report["shared"] == [0, 0]
    assert report["shapes"] == [[0, 3, 28, 28], [3, 3, 28, 28]] and report["shared_mean"]
    with_objects, without = report["losses"]
    assert with_objects["loss_mask"] > 0 and with_objects["aux_loss_mask"] > 0 and with_objects["aux_loss_rpn_loc"] > 0
    assert without["loss_mask"] == without["aux_loss_mask"] == 0 and without["loss_rpn_cls"] > 0
    assert all(math.isfinite(value) for losses in report["losses"] for value in losses.values())
    parts = ("backbone.", "proposal_generator.", "roi_heads.box_head.", "roi_heads.mask_head.deconv", "auxiliary.")
    assert all(any(name.startswith(part) for name in report["names"]) for part in parts)
    assert report["error"] < 1e-4
    # Both have the same ranges, gradients and, after two steps, parameters.
    assert report["agree"] == {"reduced": True, "parameters": True, "scales": True}
    assert all(any(name.startswith(part) for name in report["moved"]) for part in parts)
