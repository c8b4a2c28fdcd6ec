"""tools/setup_env.sh where it refuses, and what it asks pip for, without a network."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

# Stands in for the interpreter of an environment: notes how it is called, and lets pip look for what is asked from an
# index, without installing it.
PYTHON = """\
#!/usr/bin/env bash
echo "$*" >>'{calls}'
case "$*" in
    "- "*) echo fingerprint of "${{@:2:3}}" ;;
    *--no-deps*) exec '{python}' -m pip install --dry-run --ignore-installed --report '{report}' "${{@:4}}" ;;
    *importlib.metadata*) printf 'torch==of the environment\n' ;;
esac
"""


def set_up(**variables):
    """Runs the script; what came of it."""
    command = ["bash", str(ROOT / "tools" / "setup_env.sh")]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AQDET_")}
    return subprocess.run(command, capture_output=True, text=True, env={**inherited, **variables})


def write_wheel(folder, name, version):
    """A wheel of metadata alone."""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def pinned(name):
    """The release of constraints.txt."""
    (line,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith(f"{name}==")]
    return line.removeprefix(f"{name}==")


@pytest.fixture
def environment(tmp_path):
    """A stand-in for a virtual environment; its folder."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    names = {"calls": tmp_path / "calls", "python": sys.executable, "report": tmp_path / "report.json"}
    python.write_text(PYTHON.format(**names))
    python.chmod(0o755)
    return folder


@pytest.fixture(params=["index", "folder"])
def index(request, tmp_path):
    """A package index, or a folder, with the CPU builds of the pinned PyTorch; how it is named."""
    folder = tmp_path / "wheels"
    for name in ("torch", "torchvision"):
        place = folder / name if request.param == "index" else folder
        place.mkdir(parents=True, exist_ok=True)
        write_wheel(place, name, f"{pinned(name)}+cpu")
        file = f"{name}-{pinned(name)}+cpu-py3-none-any.whl"
        if request.param == "index":
            (place / "index.html").write_text(f'<!DOCTYPE html><html><body><a href="{file}">{file}</a></body></html>')
    return folder.as_uri() if request.param == "index" else str(folder)


def test_the_current_environment_says_why_detectron2_fails(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise ImportError('libcudart is missing')\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = set_up(PATH=path, PYTHONPATH=str(tmp_path), AQDET_USE_CURRENT_ENV="1")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.endswith("cannot import detectron2: ImportError: libcudart is missing")


def test_pytorch_comes_from_the_index_that_is_named(tmp_path, environment, index):
    # Elsewhere there is a newer one, which pip's configuration names: it must not win.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_wheel(elsewhere, "torch", f"{pinned('torch')}+zzz")
    done = set_up(AQDET_VENV=str(environment), AQDET_TORCH_INDEX=index, PIP_FIND_LINKS=str(elsewhere))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())["install"]
    versions = {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in found}
    assert versions == {name: f"{pinned(name)}+cpu" for name in ("torch", "torchvision")}
    calls = (tmp_path / "calls").read_text().splitlines()
    asked = [call for call in calls if call.startswith("-m pip install")]
    # What PyTorch itself needs comes from PyPI, in the step after.
    assert index in asked[0] and not any(index in call for call in asked[1:])
    assert asked[1].endswith("setuptools wheel torch torchvision")
    # Of a folder its wheels are part of what is asked for: another one in their place is another environment.
    wheels = "" if index.startswith("file:") else f" torch-{pinned('torch')}+cpu-py3-none-any.whl torchvision-"
    assert (environment / ".aqdet-setup").read_text().startswith(f"fingerprint of {ROOT} {index}{wheels}")


def test_a_folder_decides_which_release_and_its_pytorch_stays(tmp_path, environment):
    folder = tmp_path / "wheels"
    folder.mkdir()
    releases = {"torch": "1.2.3+cpu", "torchvision": "0.4.5+cpu"}
    for name, version in releases.items():
        write_wheel(folder, name, version)
    done = set_up(AQDET_VENV=str(environment), AQDET_TORCH_INDEX=str(folder))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())["install"]
    assert {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in found} == releases
    constraints = environment / "constraints.txt"
    lines = constraints.read_text().splitlines()
    others = [line for line in lines if not line.startswith("torch==")]
    cuda = ("torch==", "torchvision==", "triton==", "cuda-", "nvidia-")
    all_lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert others == [line for line in all_lines if not line.startswith(cuda)] and len(all_lines) - len(others) > 15
    # What the folder gave is pinned, for every later step.
    assert lines[-1] == "torch==of the environment"
    calls = (tmp_path / "calls").read_text().splitlines()
    constrained = [call.partition("--constraint ")[2].split()[0] for call in calls if "--constraint" in call]
    assert constrained == [str(constraints)] * 4


def test_a_folder_without_torchvision_stops_before_anything_is_installed(tmp_path, environment):
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", "torch", "1.2.3+cpu")
    done = set_up(AQDET_VENV=str(environment), AQDET_TORCH_INDEX=str(tmp_path / "wheels"))
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"AQDET_TORCH_INDEX={tmp_path / 'wheels'} is a folder without a wheel of torchvision: add the one" in line
    assert not (tmp_path / "calls").exists()


def test_a_folder_without_pytorch_stops(tmp_path, environment):
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", "torchvision", "0.4.5+cpu")
    done = set_up(AQDET_VENV=str(environment), AQDET_TORCH_INDEX=str(tmp_path / "wheels"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].endswith("failed (the message is above); fix it and run this again")
    assert not (environment / ".aqdet-setup").exists()


def test_another_detectron2_or_index_is_another_environment(environment, tmp_path):
    for variables in ({}, {"AQDET_DETECTRON2": "main"}):
        assert set_up(AQDET_VENV=str(environment), **variables).returncode == 0
    assert "is up to date" in set_up(AQDET_VENV=str(environment), AQDET_DETECTRON2="main").stderr
    installs = [call for call in (tmp_path / "calls").read_text().splitlines() if "install_detectron2.py --c" in call]
    assert len(installs) == 2
