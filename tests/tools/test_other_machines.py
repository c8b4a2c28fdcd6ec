"""Exported detectors on other machines: what is compared, what is left out, and that a difference is seen."""

import os
import subprocess
import sys

import aarch64
import debian
import numpy as np
import onnx
import other_machines
import programs
import pytest
import torch
from helpers import make_cfg
from tiny_export import make_photo, make_twin, write_folder

from aqdet.export.folder import export_detector
from aqdet.export.onnx_graph import build_onnx
from aqdet.export.program import IMAGE, PadImage
from aqdet.runtime.golden import GOLDEN, Check, write_golden


@pytest.fixture
def folder(tmp_path):
    folder = write_folder(tmp_path / "twin", make_twin(test_score_thresh=0.06))
    write_golden(folder, make_photo())
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the program; its exit status."""

    def run(*arguments):
        command = ["other_machines.py", "--cache", tmp_path / "cache", *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        try:
            other_machines.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


def finished(stdout="", stderr="", returncode=0):
    return subprocess.CompletedProcess([], returncode, stdout, stderr)


def test_the_codes_of_every_layer_are_compared(tmp_path):
    program = programs.shared()[1]
    onnx.save(build_onnx(program), tmp_path / "model.onnx")
    padded = {operation.output for operation in program.operations if isinstance(operation, PadImage)}
    assert set(other_machines.inner_codes(tmp_path / "model.onnx")) == set(program.grids()) - padded - {IMAGE}


def test_this_machine_against_itself(folder, run, capsys):
    assert run("--machine", "here", folder) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| here"))
    with np.load(folder / GOLDEN) as golden:
        outputs = sum(golden[name].size for name in golden.files if name.startswith("outputs/"))
    assert (
        f"| - | {2 * outputs:,} of {2 * outputs:,} | " in row
    )  # the golden vectors of the export, and those made anew
    assert row.count("0 of another class") == 2
    assert f"NumPy {np.__version__}" in out and "DIFFERS" not in out


def test_what_differs_is_counted_and_is_the_exit_status(folder, run, capsys):
    with np.load(folder / GOLDEN) as file:
        golden = dict(file)
    golden["outputs/logits_p8"][0, 0, 0, :2] += 1
    np.savez(folder / GOLDEN, **golden)
    assert run("--machine", "here", folder) == other_machines.DIFFERS
    out = capsys.readouterr().out
    size = golden["outputs/logits_p8"].size
    assert f"here: DIFFERS: output logits_p8: 2 of {size:,} values differ, by at most 1" in out
    outputs = 2 * sum(value.size for name, value in golden.items() if name.startswith("outputs/"))
    assert f"| {outputs - 2:,} of {outputs:,} |" in out


def test_machines_that_cannot_run_are_left_out_with_a_reason(folder, run, capsys, monkeypatch):
    monkeypatch.setattr(other_machines.os, "uname", lambda: os.uname_result(("", "", "", "", "x86_64")))
    monkeypatch.setenv("PATH", "")
    assert run(*[part for name in other_machines.MACHINES[1:] for part in ("--machine", name)], folder) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert lines == [
        *(f"{name}: skipped: gcc is not installed (package gcc)" for name in ("here-avx2", "here-sse4")),
        *(
            f"{name}: skipped: qemu-x86_64-static is not installed (package qemu-user-static)"
            for name in ("x86-avx2", "x86-sse4")
        ),
        *(
            f"{name}: skipped: qemu-aarch64-static is not installed (package qemu-user-static)"
            for name in ("arm-dot", "arm")
        ),
        *(f"{name}: skipped: node is not installed (package nodejs)" for name in ("node", "web")),
        *(
            f"{name}: skipped: the folder has no detector.c (export_model.py --c SIZE writes it)"
            for name in ("c", "c-arm")
        ),
    ]


def test_a_crash_is_a_difference_and_no_reason_to_skip():
    head = "on aarch64, ASIMD, Python 3.11.2\nok     files: DIR: as exported\n"
    crashed = other_machines.read_self_test(finished(head, "qemu: warning\nIllegal instruction\n", -4))
    assert crashed.about == "aarch64, ASIMD, Python 3.11.2" and crashed.differs
    assert crashed.checks[0] == Check("files", True, "DIR: as exported")
    assert crashed.checks[1] == Check("self-test", False, "exit status -4: Illegal instruction")
    # One that ends well, having compared nothing, has passed nothing.
    assert other_machines.read_self_test(finished("", "", 0)).differs
    assert not other_machines.read_self_test(finished(f"{head}1 of 1 checks passed\n")).differs
    failed = other_machines.read_self_test(
        finished(f"{head}FAILED output a: 1 of 9 values differ\n1 of 2 checks passed\n", "", 1)
    )
    assert [check.passed for check in failed.checks] == [True, False]


def test_values_are_counted_by_kind():
    checks = [
        Check("codes of a", True, "1,200 values equal"),
        Check("codes of b", False, "3 of 1,000 values differ, by at most 2"),
        Check("output a", True, "7 values equal"),
        Check("output b", False, "float32 (1, 2), expected float32 (1, 3)"),
    ]
    assert other_machines.counted(checks, "codes of ") == "2,197 of 2,200"
    assert other_machines.counted(checks, "output ") == "7 of 7"
    assert other_machines.counted(checks, "detections") == "-"


def test_a_download_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    programs_folder = tmp_path / "bin"
    programs_folder.mkdir()
    for name in ("apt-get", "dpkg"):
        (programs_folder / name).write_text("#!/bin/sh\necho 'E: no network' >&2\nexit 100\n")
        (programs_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs_folder))
    with pytest.raises(debian.NotHere, match="apt-get update for arm64: exit status 100: E: no network"):
        aarch64.debian_system(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "cache" / "aarch64").mkdir()
    assert aarch64.debian_system(tmp_path / "cache") == tmp_path / "cache" / "aarch64"


def test_a_folder_without_golden_vectors_needs_an_image(folder, run, capsys):
    (folder / GOLDEN).unlink()
    assert run("--machine", "here", folder) == other_machines.USER_ERROR
    assert "golden.npz does not exist: give an --image" in capsys.readouterr().err


@pytest.mark.skipif(
    not os.environ.get("AQDET_OTHER_MACHINES"), reason="emulates processors for minutes: set AQDET_OTHER_MACHINES=1"
)
@pytest.mark.timeout(3600)
def test_an_exported_detector_is_the_same_on_other_machines(tmp_path):
    model = programs.trained_like()
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    settings = (*programs.OVERRIDES, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    export_detector(make_cfg(*settings), str(tmp_path / "weights.pth"), tmp_path / "exported", force=True, c=64)
    command = [sys.executable, other_machines.__file__, tmp_path / "exported"]
    # The cache of the tests goes when they end; what is downloaded is to stay.
    environment = {key: value for key, value in os.environ.items() if key != "AQDET_CACHE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = [line for line in done.stdout.splitlines() if ": skipped: " in line]
    if skipped:
        pytest.skip("; ".join(skipped))
