"""Every option of every program is checked when it is parsed, and ``--help`` opens without slow libraries."""

import argparse
import importlib
import os
import subprocess
import sys

import pytest
from helpers import ROOT
from train_net import argument_parser

from aqdet.utils import arguments

TOOLS = sorted(
    str(path.relative_to(ROOT / "tools").with_suffix(""))
    for path in (ROOT / "tools").rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text("utf-8")
)
SLOW = ("torch", "detectron2", "fvcore", "matplotlib")


@pytest.mark.parametrize(
    "type_, good, bad",
    [
        (arguments.integer(1), {"1": 1, "12": 12}, ["0", "-3", "1.5", "two", "", "nan"]),
        (arguments.integer(0, 5), {"0": 0, "5": 5}, ["6", "-1"]),
        (arguments.integer(32, multiple_of=32), {"32": 32, "640": 640}, ["0", "-32", "33", "48.0"]),
        (
            arguments.number(0, 1),
            {"0": 0, "1": 1, "0.25": 0.25, "1e-3": 0.001},
            ["7", "-0.1", "nan", "inf", "a", ""],
        ),
        (arguments.regex, {"head\\..*": "head\\..*"}, ["(", "", "*", "[a"]),
    ],
)
def test_values_in_range_pass_and_others_are_named(type_, good, bad):
    assert {text: type_(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            type_(text)
        assert repr(text) in str(error.value) and "\n" not in str(error.value)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    missing = os.path.join("new", "deep", "out")
    assert [arguments.file_to_write(text) for text in ("file", "a.html", missing)] == ["file", "a.html", missing]
    assert [arguments.folder_to_write(text) for text in ("folder", "new", missing)] == ["folder", "new", missing]
    assert arguments.file_to_read("file") == arguments.existing("file") == "file"
    assert arguments.existing("folder") == "folder"
    for type_, text, words in [
        (arguments.file_to_write, "folder", "is a folder: name a file in it"),
        (arguments.file_to_write, "new/", "is a folder: name a file in it"),
        (arguments.file_to_write, "", "is a folder"),
        (arguments.file_to_write, "file/a.html", "is a file"),
        (arguments.folder_to_write, "file", "is a file: name a folder"),
        (arguments.folder_to_write, "file/deep/out", "is a file"),
        (arguments.folder_to_write, "", "name a folder"),
        (arguments.file_to_read, "none", "'none' does not exist"),
        (arguments.file_to_read, "folder", "'folder' is a folder, not a file"),
        (arguments.existing, "none", "'none' does not exist"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            type_(text)
    assert sorted(os.listdir()) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(argparse.ArgumentTypeError, match="no permission for "):
        arguments.file_to_write(str(tmp_path / "closed" / "a.html"))


def test_a_value_given_twice():
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--seeds", type=int, nargs="+", action=arguments.Distinct, default=[0])
    assert parser.parse_args(["--seeds", "3", "1"]).seeds == [3, 1]
    with pytest.raises(argparse.ArgumentError, match="argument --seeds: 3 is given twice"):
        parser.parse_args(["--seeds", "3", "1", "3"])


@pytest.mark.parametrize(
    "tool, given, option",
    [
        ("ablation", "--seeds -1", "--seeds"),
        ("ablation", "--seeds 1 1", "--seeds"),
        ("ablation", "--iterations 1", "--iterations"),
        ("ablation", "--start-iterations 0", "--start-iterations"),
        ("ablation", "--output {file}", "--output"),
        ("benchmark", "train --rounds 0", "--rounds"),
        ("benchmark", "train --size 128 0", "--size"),
        ("benchmark", "train --batch -4", "--batch"),
        ("benchmark", "train --fpn-channels 0", "--fpn-channels"),
        ("benchmark", "train --threads 0", "--threads"),
        ("benchmark", "export --rounds 0", "--rounds"),
        ("benchmark", "export --threads 0", "--threads"),
        ("benchmark", "export --size -1", "--size"),
        ("benchmark", "export --model none", "--model"),
        ("benchmark", "export --weights none.pth", "--weights"),
        ("benchmark", "export --image none.png", "--image"),
        ("benchmark", "export --calibration none", "--calibration"),
        ("check_dataset", "--yolo x --examples -1", "--examples"),
        ("check_dataset", "--yolo x --json .", "--json"),
        ("convert_torchvision", "--depth 99", "--depth"),
        ("convert_torchvision", "--input none.pth", "--input"),
        ("convert_torchvision", "--output .", "--output"),
        ("crop_shapes", "--output x --size 0", "--size"),
        ("crop_shapes", "--output x --margin nan", "--margin"),
        ("crop_shapes", "--output x --margin -0.6", "--margin"),
        ("crop_shapes", "--output {file}", "--output"),
        ("demo", "--config-file {file} --input x --confidence-threshold 7", "--confidence-threshold"),
        ("demo", "--config-file {file} --input x --confidence-threshold nan", "--confidence-threshold"),
        ("demo", "--config-file {file} --video-input none.avi", "--video-input"),
        ("export_model", "--config-file x --output y --max-images 0", "--max-images"),
        ("export_model", "--config-file x --output y --allow-float (", "--allow-float"),
        ("export_model", "--config-file x --output {file}", "--output"),
        ("gradient_evidence", "--batches 0", "--batches"),
        ("gradient_evidence", "--weights none.pth", "--weights"),
        ("gradient_evidence", "--output {file}", "--output"),
        ("install_detectron2", "--constraint none.txt", "--constraint"),
        ("plan", "--config-file x --json .", "--json"),
        ("plan", "--config-file x --size 0 64", "--size"),
        ("plan", "--config-file x --size 100 64", "--size"),
        ("quantize", "--config-file x --output y --bits 1", "--bits"),
        ("quantize", "--config-file x --output y --images none", "--images"),
        ("quantize", "--config-file x --output y --max-images 0", "--max-images"),
        ("quantize", "--config-file x --output y --max-loss 1", "--max-loss"),
        ("quantize", "--config-file x --output {file}", "--output"),
        ("quickstart", "--output {file}", "--output"),
        ("report", "x --output .", "--output"),
        ("report", "x --min-score 2", "--min-score"),
        ("report", "x --pictures -1", "--pictures"),
        ("report", "x --images -1", "--images"),
        ("report", "x --config-file none.yaml", "--config-file"),
    ],
)
def test_out_of_range_is_refused_before_anything_runs(tool, given, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    module = importlib.import_module(tool)
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *given.format(file="file").split()])
    with pytest.raises(SystemExit) as stop:
        module.main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and f"error: argument {option}: " in last
    assert os.listdir() == ["file"]


def test_the_options_of_detectron2s_trainings_are_detectron2s():
    from detectron2.engine import default_argument_parser

    def options(parser):
        fields = ("option_strings", "dest", "nargs", "const", "default", "choices", "required")
        return [(type(action), *(getattr(action, field) for field in fields)) for action in parser._actions]

    # But for the types of --num-gpus and the like, which refuse numbers that Detectron2 fails with later.
    assert options(arguments.detectron2_parser()) == options(default_argument_parser())
    assert argument_parser().parse_args(["--resume", "A.B", "1"]).opts == ["A.B", "1"]


@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_nothing_slow(tool):
    code = (
        "import runpy, sys\n"
        f"sys.path[:0] = [{str((ROOT / 'tools' / tool).parent)!r}, {str(ROOT / 'tools')!r}]\n"
        "sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'tools' / tool)!r} + '.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        f"    print(stop.code, [name for name in {SLOW!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("usage: ") and done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("flag, value", [("--num-gpus", "-1"), ("--num-machines", "0"), ("--machine-rank", "x")])
def test_numbers_of_processes_are_refused_when_they_are_parsed(flag, value, capsys):
    with pytest.raises(SystemExit):
        arguments.detectron2_parser().parse_args([flag, value])
    assert f"argument {flag}: must be a whole number of at least" in capsys.readouterr().err
