"""What an installed aqdet consists of, and what its command does without a checkout."""

import email
import os
import re
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT
from tiny_export import make_photo, make_twin, write_folder

from aqdet import main as command
from aqdet.config_files import find_config_file
from aqdet.utils.configs import shipped_configs


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built package, unpacked; its build leaves nothing in the checkout."""
    source, output = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("aqdet", "configs", "tools", "setup.py", "pyproject.toml", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "--wheel-dir", output, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = output.glob("aqdet-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(output / "site")
    return output / "site"


@pytest.fixture
def run(wheel, tmp_path):
    """Runs the command of the unpacked package in an empty folder; its status and what it printed."""

    def run(*arguments, blocked=()):
        code = (
            f"import sys\nfor name in {tuple(blocked)}: sys.modules[name] = None\n"
            f"import aqdet.main\nassert aqdet.__file__.startswith({str(wheel)!r}), aqdet.__file__\naqdet.main.main()"
        )
        environment = {**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-P", "-c", code, *map(str, arguments)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    return run


def metadata(wheel):
    (file,) = wheel.glob("*.dist-info/METADATA")
    return email.message_from_string(file.read_text())


def test_base_requirements_are_the_runtimes(wheel):
    needed = [line for line in metadata(wheel).get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.match(r"[\w-]+", line)[0] for line in needed) == ["Pillow", "numpy", "onnxruntime", "tqdm"]
    assert {"train", "export", "video", "dev"} <= set(metadata(wheel).get_all("Provides-Extra"))
    versions = [line for line in metadata(wheel).get_all("Classifier") if re.search(r":: 3\.\d+$", line)]
    assert [line.rpartition(" ")[2] for line in versions] == ["3.11", "3.12", "3.13"]


def test_what_is_installed(wheel):
    installed = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    files = [path for path in (ROOT / "configs").rglob("*.*") if path.suffix != ".pyc"]
    assert {path.suffix for path in files} == {".yaml", ".py", ".md"}
    configs = {f"aqdet/configs/{path.relative_to(ROOT / 'configs')}" for path in files}
    assert configs == {name for name in installed if name.startswith("aqdet/configs/")}
    programs = {f"aqdet/programs/{program}.py" for program, _, _ in command.PROGRAMS.values()}
    examples = {f"aqdet/programs/examples/{path.name}" for path in (ROOT / "tools/examples").iterdir()}
    assert len(examples) == 2
    assert programs | examples == {name for name in installed if name.startswith("aqdet/programs/")}
    others = {path for path in (ROOT / "aqdet").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {path.relative_to(ROOT).as_posix() for path in others} <= installed  # each kind is in package_data
    assert {name.split("/")[0] for name in installed if ".dist-info/" not in name} == {"aqdet"}
    (file,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "aqdet = aqdet.main:main" in file.read_text()


def test_detection_with_the_base_requirements_alone(run, tmp_path):
    import cv2

    folder = write_folder(tmp_path / "twin", make_twin(test_score_thresh=0.05))
    cv2.imwrite(str(tmp_path / "photo.png"), make_photo())
    blocked = ("torch", "torchvision", "detectron2", "cv2", "onnx", "yaml", "matplotlib", "pycocotools", "fvcore")
    status, out, err = run("detect", folder, "photo.png", "--output", "found.png", blocked=blocked)
    assert status == 0 and "1 of 1 inputs" in out, err
    assert (tmp_path / "found.png").is_file()
    status, out, err = run("train", "--config-file", "quickstart/retinanet_r18_lsq_w4a4.yaml", blocked=blocked)
    assert (status, out) == (2, "") and err.startswith("error: aqdet train needs detectron2, which is not")


def test_a_shipped_config_is_found_by_its_name(run):
    status, out, err = run("plan", "--config-file", "quickstart/retinanet_r18_lsq_w4a4.yaml", "--size", "64", "64")
    assert status == 0 and "the detector as shipped" in out, err
    assert run("configs")[1].splitlines() == list(shipped_configs())


@pytest.mark.parametrize("name", list(command.PROGRAMS))
def test_each_program_has_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aqdet", name, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


def test_usage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aqdet"])
    command.main()
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in (*command.PROGRAMS, "detect", "configs"))
    monkeypatch.setattr(sys, "argv", ["aqdet", "tarin"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: no subcommand 'tarin'")


def test_names_of_shipped_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "quickstart/retinanet_r18_lsq_w4a4.yaml"
    expected = str(ROOT / "configs" / name)
    assert find_config_file(name) == find_config_file(f"configs/{name}") == expected
    (tmp_path / "quickstart").mkdir()
    (tmp_path / name).touch()
    assert find_config_file(name) == name  # a file of that name comes first
    with pytest.raises(FileNotFoundError, match=f"did you mean .*{name}"):
        find_config_file("quickstart/retinanet_r18_lsq_w4a5.yaml")
