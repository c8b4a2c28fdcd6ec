"""tools/install_detectron2.py on small made-up trees and archives, without a network."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

import detectron2_changes as changes
import install_detectron2 as script
import pytest

OTHER_LINE = "untouched = 'np.int64, np.bool_, np.floating'\n"


def write_tree(root: Path) -> None:
    """Write every file that CHANGES names, with exactly the texts it expects to find."""
    texts: dict[str, str] = defaultdict(lambda: OTHER_LINE)
    for change in changes.CHANGES:
        texts[change.path] += f"{change.old}\n" * change.count
    for path, text in texts.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    (root / "setup.py").write_text("raise SystemExit('the original build file')\n")
    (root / "setup.cfg").write_text("[isort]\n")


def make_archive(folder: Path) -> tuple[Path, str]:
    """Pack ``folder``/tree, by default one that CHANGES fits; return archive and sha256."""
    tree = folder / "tree"
    if not tree.exists():
        write_tree(tree)
    archive = folder / "pb1-detectron2-0.6.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, arcname="pb1-detectron2-0.6")
    return archive, hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Record the calls of pip instead of making them; one that builds leaves an empty wheel."""
    calls: list[tuple[str, ...]] = []

    def run_pip(*arguments: str) -> None:
        calls.append(arguments)
        if arguments[0] == "wheel":
            wheels = Path(arguments[arguments.index("--wheel-dir") + 1])
            wheels.mkdir()
            (wheels / "detectron2.whl").touch()

    monkeypatch.delenv("AQDET_DETECTRON2", raising=False)
    monkeypatch.setattr(script, "run_pip", run_pip)
    return calls


def fake_package(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make ``import detectron2`` of new processes find a package with this ``__init__``."""
    package = folder / "detectron2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return package


def test_every_change_is_applied_exactly(tmp_path: Path) -> None:
    write_tree(tmp_path)
    script.patch(tmp_path)
    expected: dict[str, str] = defaultdict(lambda: OTHER_LINE)
    for change in changes.CHANGES:
        expected[change.path] += f"{change.new}\n" * change.count
    for path, text in expected.items():
        assert (tmp_path / path).read_text() == text
    assert (tmp_path / "setup.py").read_text() == changes.setup_text("0.6")
    assert not (tmp_path / "setup.cfg").exists()


def test_changes_leave_longer_names_alone(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("np.int np.int64 np.integer xnp.int np.int\n")
    changes.Change("a.py", "np.int", "int", 2, "a reason").apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "int np.int64 np.integer xnp.int int\n"


@pytest.mark.parametrize("index", range(len(changes.CHANGES)))
@pytest.mark.parametrize("repeats", [0, 1])
def test_change_that_no_longer_applies_stops(tmp_path: Path, index: int, repeats: int) -> None:
    change = changes.CHANGES[index]
    write_tree(tmp_path)
    file = tmp_path / change.path
    text = file.read_text()
    damaged = f"{text}{change.old}\n" if repeats else text.replace(f"{change.old}\n", "gone\n", 1)
    file.write_text(damaged)
    with pytest.raises(changes.InstallError) as error:
        script.patch(tmp_path)
    message = str(error.value)
    assert change.path in message and "expected" in message and "\n" not in message


def test_missing_file_stops(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / "detectron2/structures/masks.py").unlink()
    with pytest.raises(changes.InstallError, match="structures/masks.py: no such file"):
        script.patch(tmp_path)


def test_changed_archive_installs_nothing(
    tmp_path: Path, pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path / "tree")
    (tmp_path / "tree/detectron2/modeling/anchor_generator.py").write_text("rewritten = True\n")
    archive, sha256 = make_archive(tmp_path)
    monkeypatch.setattr(script, "download", lambda _: archive)
    monkeypatch.setattr(script, "SHA256", sha256)
    (tmp_path / "work").mkdir()
    with pytest.raises(changes.InstallError, match="anchor_generator.py: .* found 0 times"):
        script.make_wheel("", tmp_path / "work")
    assert pip_calls == []


def test_wrong_sha256_is_refused(
    tmp_path: Path, pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, sha256 = make_archive(tmp_path)
    monkeypatch.setattr(script, "download", lambda _: archive)
    (tmp_path / "work").mkdir()
    with pytest.raises(changes.InstallError, match=f"sha256 is {sha256}, expected {script.SHA256}"):
        script.make_wheel("", tmp_path / "work")
    assert pip_calls == []
    assert list((tmp_path / "work/source").iterdir()) == []


def test_good_archive_is_built_then_installed(
    tmp_path: Path, pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, sha256 = make_archive(tmp_path)
    monkeypatch.setattr(script, "download", lambda _: archive)
    monkeypatch.setattr(script, "SHA256", sha256)
    (tmp_path / "work").mkdir()
    script.install(script.make_wheel("", tmp_path / "work"), constraint="pins.txt")
    assert [call[0] for call in pip_calls] == ["wheel", "install", "install"]
    assert pip_calls[2][2:4] == ("--no-deps", "--force-reinstall")
    source = Path(pip_calls[0][-1])
    assert (source / changes.COMPILED_OPS_PATH).read_text() == changes.compiled_ops_text()
    assert pip_calls[1][2:4] == ("--constraint", "pins.txt")


def test_existing_detectron2_is_left_alone(
    tmp_path: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = fake_package(tmp_path, "__version__ = '0.7.dev'\n", monkeypatch)
    assert script.main([]) == 0
    assert pip_calls == []
    assert capsys.readouterr().out == f"Detectron2: 0.7.dev in {package} already works, left alone\n"


def test_broken_detectron2_is_reported_and_not_replaced(
    tmp_path: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_package(tmp_path, "raise ImportError('libcudart is missing')\n", monkeypatch)
    assert script.main([]) == 1
    assert pip_calls == []
    message = capsys.readouterr().err
    assert "does not import (ImportError: libcudart is missing)" in message
    assert message.count("\n") == 1


def run_isolated(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a Python without site-packages, with ``path`` in front of sys.path."""
    prefix = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    command = [sys.executable, "-I", "-S", "-c", prefix + code]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("interrupted", [False, True])
def test_probe_without_detectron2_and_after_an_interruption(
    tmp_path: Path, interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if interrupted:
        package = tmp_path / "detectron2"
        package.mkdir()
        (package / "__init__.py").write_text("__version__ = '0.6'\n")
        (package / "_compiled_ops.py").write_text(changes.compiled_ops_text())
    result = run_isolated(script.PROBE, tmp_path)
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: result)
    assert script.existing_detectron2() is None


@pytest.mark.parametrize("installed", ["the same", "other changes", "from main"])
def test_our_own_installation_with_other_changes_or_source_is_replaced(
    tmp_path: Path, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.6'\n")
    text = changes.compiled_ops_text("main" if installed == "from main" else "")
    if installed == "other changes":
        text = re.sub('CHANGES = "[0-9a-f]{16}"', 'CHANGES = "0123456789abcdef"', text)
    (package / "_compiled_ops.py").write_text(text)
    answer = subprocess.CompletedProcess([], 0, f"{package / '__init__.py'}\ndetectron2\n0.6\n", "")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: answer)
    found = f"0.6 in {package}"
    assert script.existing_detectron2() == (found if installed == "the same" else None)
    assert script.existing_detectron2("main") == (found if installed == "from main" else None)


@pytest.mark.parametrize("missing, works", [("caffe2", True), ("caffe2.proto", True), ("other", False)])
def test_export_without_caffe2(tmp_path: Path, missing: str, works: bool) -> None:
    change = next(change for change in changes.CHANGES if change.path == "detectron2/export/__init__.py")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text(f"{change.new}\nREST = 1\n")
    (package / "api.py").write_text(f"raise ModuleNotFoundError('no', name='{missing}')\n")
    result = run_isolated("import package\nassert package.REST == 1", tmp_path)
    assert (result.returncode == 0) is works, result.stderr


def test_missing_compiled_op_says_so_when_called(tmp_path: Path) -> None:
    (tmp_path / "ops.py").write_text(changes.compiled_ops_text())
    result = run_isolated("from ops import _C\nhasattr(_C, '__wrapped__')", tmp_path)
    assert result.returncode == 0
    result = run_isolated("from ops import _C\n_C.deform_conv_forward(1)", tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: Detectron2's compiled op 'deform_conv_forward' is not in")


MAIN_TEXTS = {
    "detectron2/__init__.py": '__version__ = "0.6"\n',
    "detectron2/modeling/anchor_generator.py": "shifts = torch.meshgrid(shifts_y, shifts_x)\n",
    "detectron2/layers/csrc/ops.cpp": "int main() {}\n",
    "configs/Base.yaml": "VERSION: 2\n",
    "projects/DeepLab/deeplab/__init__.py": "",
    "projects/Panoptic-DeepLab/panoptic_deeplab/__init__.py": "",
    "projects/PointRend/point_rend/__init__.py": "",
    "setup.py": "raise SystemExit('the original build file')\n",
}


def write_main(root: Path) -> Path:
    """Write a source tree laid out as Detectron2's repository is, with one of the lines that are changed."""
    for name, text in MAIN_TEXTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "detectron2/model_zoo").mkdir()
    # A developer's checkout has a link there.
    (root / "detectron2/model_zoo/configs").symlink_to(root / "configs")
    return root


def commit_main(root: Path) -> str:
    """Make the tree a repository; the commit."""
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "A commit"]):
        subprocess.run([*git, *arguments], check=True)
    return subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()


@pytest.mark.parametrize("form", ["folder", "archive", "repository", "URL"])
def test_other_sources(
    tmp_path: Path, pip_calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], form: str
) -> None:
    tree, version = write_main(tmp_path / "main"), "0.6+local"
    source = str(tree)
    if form == "archive":
        source = str(tmp_path / "main.tar.gz")
        with tarfile.open(source, "w:gz") as tar:
            (tree / "detectron2/model_zoo/configs").unlink()
            tar.add(tree, arcname="detectron2-main")
    elif form != "folder":
        if shutil.which("git") is None:
            pytest.skip("needs git")
        version = f"0.6+{commit_main(tree)[:12]}"
        bare = tmp_path / "bare.git"
        subprocess.run(["git", "clone", "--quiet", "--bare", str(tree), str(bare)], check=True)
        source = str(bare) if form == "repository" else bare.as_uri()
    assert script.main(["--source", source, "--target", str(tmp_path / "target")]) == 0
    assert [call[0] for call in pip_calls] == ["wheel", "install"]
    assert pip_calls[1][2:5] == ("--no-deps", "--target", str(tmp_path / "target"))
    assert f"changes to {version}, installing" in capsys.readouterr().out


def test_what_is_built_of_another_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, root = write_main(tmp_path / "main"), tmp_path / "root"
    root.mkdir()
    script.prepare(tree, root, "main", "0.6+abc")
    assert capsys.readouterr().out == "Detectron2: applied 1 of 5 changes to 0.6+abc, installing\n"
    text = (root / "detectron2/modeling/anchor_generator.py").read_text()
    assert text == 'shifts = torch.meshgrid(shifts_y, shifts_x, indexing="ij")\n'
    assert (root / "detectron2/__init__.py").read_text() == '__version__ = "0.6+abc"\n'
    zoo = root / "detectron2/model_zoo/configs"
    assert not zoo.is_symlink() and (zoo / "Base.yaml").read_text() == "VERSION: 2\n"
    assert (root / "projects/PointRend/point_rend/__init__.py").is_file()
    assert not (root / "detectron2/layers/csrc").exists()
    assert (root / "setup.py").read_text() == changes.setup_text("0.6+abc")
    assert (root / changes.COMPILED_OPS_PATH).read_text() == changes.compiled_ops_text("main")
    assert changes.compiled_ops_text("main") != changes.compiled_ops_text()
    assert (tree / "detectron2/modeling/anchor_generator.py").read_text() == MAIN_TEXTS[
        "detectron2/modeling/anchor_generator.py"
    ]


def test_a_python_without_extraction_filters_extracts_what_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, _ = make_archive(tmp_path)
    found = []
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        if name == "old":
            monkeypatch.delattr(tarfile, "data_filter")
        root = script.extract(archive, tmp_path / name)
        assert root == tmp_path / name / "pb1-detectron2-0.6"
        found.append({path.relative_to(root): path.is_file() and path.read_bytes() for path in root.rglob("*")})
    assert found[0] == found[1] and len(found[0]) > len(changes.CHANGES) // 2
    (tmp_path / "evil.txt").write_text("evil")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "evil.txt", arcname="pb1-detectron2-0.6/../../elsewhere.txt")
    with pytest.raises(script.InstallError, match=r"elsewhere.txt' would be written outside the folder"):
        script.extract(archive, tmp_path / "old")
    assert not (tmp_path / "elsewhere.txt").exists()


def test_unreachable_or_wrong_sources_are_one_line(
    tmp_path: Path, pip_calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "part/detectron2").mkdir(parents=True)
    (tmp_path / "part/detectron2/__init__.py").touch()
    expected = {
        tmp_path / "none": "git could not fetch HEAD of",
        tmp_path / "empty": "without a network, name a source folder, its .tar.gz or a repository on this machine",
        tmp_path / "part": "it has no folder configs",
    }
    for source, reason in expected.items():
        assert script.main(["--source", str(source), "--target", str(tmp_path / "target")]) == 1
        message = capsys.readouterr().err
        assert reason in message and str(source) in message and message.count("\n") == 1
    assert pip_calls == []


def test_a_target_is_kept_replaced_or_refused(
    tmp_path: Path, pip_calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = str(write_main(tmp_path / "main")), tmp_path / "target"
    marker = target / changes.COMPILED_OPS_PATH
    marker.parent.mkdir(parents=True)
    marker.write_text(changes.compiled_ops_text(source))
    assert script.main(["--source", source, "--target", str(target)]) == 0
    assert pip_calls == [] and "already works, left alone" in capsys.readouterr().out
    marker.write_text(changes.compiled_ops_text("main"))
    assert script.main(["--source", source, "--target", str(target)]) == 0
    assert [call[0] for call in pip_calls] == ["wheel", "install"] and not marker.exists()
    (target / "detectron2").mkdir(parents=True)
    (target / "detectron2/theirs.py").touch()
    assert script.main(["--source", source, "--target", str(target)]) == 1
    assert "it holds files that are not of this script" in capsys.readouterr().err
    assert (target / "detectron2/theirs.py").exists()


def test_the_variable_asks_for_a_source_and_somebodys_own_detectron2_stays(
    tmp_path: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = fake_package(tmp_path, "__version__ = '0.7.dev'\n", monkeypatch)
    monkeypatch.setenv("AQDET_DETECTRON2", "main")
    assert script.main([]) == 1
    message = capsys.readouterr().err
    assert f"0.7.dev in {package} is not of this script" in message and message.count("\n") == 1
    monkeypatch.setenv("AQDET_DETECTRON2", "0.6")
    assert script.main([]) == 0 and pip_calls == []


def test_a_commit_is_fetched_from_detectron2s_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    commit = commit_main(write_main(tmp_path / "main"))
    monkeypatch.setattr(script, "REPOSITORY", (tmp_path / "main").as_uri())
    (tmp_path / "work").mkdir()
    tree, version = script.obtain(commit, tmp_path / "work")
    assert version == f"0.6+{commit[:12]}" and (tree / "setup.py").is_file()
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    (tmp_path / "other").mkdir()
    with pytest.raises(changes.InstallError, match="git is needed to fetch it"):
        script.obtain("main", tmp_path / "other")
