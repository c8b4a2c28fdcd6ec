"""tools/install_detectron2.py on small made-up trees and archives, without a network."""

import hashlib
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

import install_detectron2 as script
import pytest

OTHER_LINE = "untouched = 'np.int64, np.bool_, np.floating'\n"


def write_tree(root: Path) -> None:
    """Write every file that CHANGES names, with exactly the texts it expects to find."""
    texts: dict[str, str] = defaultdict(lambda: OTHER_LINE)
    for change in script.CHANGES:
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
    """Record the calls of pip instead of making them."""
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(script, "run_pip", lambda *arguments: calls.append(arguments))
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
    for change in script.CHANGES:
        expected[change.path] += f"{change.new}\n" * change.count
    for path, text in expected.items():
        assert (tmp_path / path).read_text() == text
    assert (tmp_path / "setup.py").read_text() == script.SETUP_TEXT
    assert not (tmp_path / "setup.cfg").exists()


def test_changes_leave_longer_names_alone(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("np.int np.int64 np.integer xnp.int np.int\n")
    script.Change("a.py", "np.int", "int", 2, "a reason").apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "int np.int64 np.integer xnp.int int\n"


@pytest.mark.parametrize("index", range(len(script.CHANGES)))
@pytest.mark.parametrize("repeats", [0, 1])
def test_change_that_no_longer_applies_stops(tmp_path: Path, index: int, repeats: int) -> None:
    change = script.CHANGES[index]
    write_tree(tmp_path)
    file = tmp_path / change.path
    text = file.read_text()
    damaged = f"{text}{change.old}\n" if repeats else text.replace(f"{change.old}\n", "gone\n", 1)
    file.write_text(damaged)
    with pytest.raises(script.InstallError) as error:
        script.patch(tmp_path)
    message = str(error.value)
    assert change.path in message and "expected" in message and "\n" not in message


def test_missing_file_stops(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / "detectron2/structures/masks.py").unlink()
    with pytest.raises(script.InstallError, match="structures/masks.py: no such file"):
        script.patch(tmp_path)


def test_changed_archive_installs_nothing(tmp_path: Path, pip_calls: list[tuple[str, ...]]) -> None:
    write_tree(tmp_path / "tree")
    (tmp_path / "tree/detectron2/modeling/anchor_generator.py").write_text("rewritten = True\n")
    archive, sha256 = make_archive(tmp_path)
    (tmp_path / "work").mkdir()
    with pytest.raises(script.InstallError, match="anchor_generator.py: .* found 0 times"):
        script.install(archive, tmp_path / "work", expected_sha256=sha256)
    assert pip_calls == []


def test_wrong_sha256_is_refused(tmp_path: Path, pip_calls: list[tuple[str, ...]]) -> None:
    archive, sha256 = make_archive(tmp_path)
    (tmp_path / "work").mkdir()
    with pytest.raises(script.InstallError, match=f"sha256 is {sha256}, expected {script.SHA256}"):
        script.install(archive, tmp_path / "work")
    assert pip_calls == []
    assert list((tmp_path / "work").iterdir()) == []


def test_good_archive_is_built_then_installed(tmp_path: Path, pip_calls: list[tuple[str, ...]]) -> None:
    archive, sha256 = make_archive(tmp_path)
    (tmp_path / "work").mkdir()
    script.install(archive, tmp_path / "work", expected_sha256=sha256, constraint="pins.txt")
    assert [call[0] for call in pip_calls] == ["wheel", "install", "install"]
    assert pip_calls[2][2:4] == ("--no-deps", "--force-reinstall")
    source = Path(pip_calls[0][-1])
    assert (source / script.COMPILED_OPS_PATH).read_text() == script.COMPILED_OPS_TEXT
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
        (package / "_compiled_ops.py").write_text(script.COMPILED_OPS_TEXT)
    result = run_isolated(script.PROBE, tmp_path)
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: result)
    assert script.existing_detectron2() is None


@pytest.mark.parametrize("changes", ["same", "other"])
def test_our_own_installation_with_other_changes_is_replaced(
    tmp_path: Path, changes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.6'\n")
    text = script.COMPILED_OPS_TEXT
    assert f'CHANGES = "{script.FINGERPRINT}"' in text
    if changes == "other":
        text = text.replace(script.FINGERPRINT, "0123456789abcdef")
    (package / "_compiled_ops.py").write_text(text)
    answer = subprocess.CompletedProcess([], 0, f"{package / '__init__.py'}\ndetectron2\n0.6\n", "")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: answer)
    found = f"0.6 in {package}"
    assert script.existing_detectron2() == (found if changes == "same" else None)


@pytest.mark.parametrize("missing, works", [("caffe2", True), ("caffe2.proto", True), ("other", False)])
def test_export_without_caffe2(tmp_path: Path, missing: str, works: bool) -> None:
    change = next(change for change in script.CHANGES if change.path == "detectron2/export/__init__.py")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text(f"{change.new}\nREST = 1\n")
    (package / "api.py").write_text(f"raise ModuleNotFoundError('no', name='{missing}')\n")
    result = run_isolated("import package\nassert package.REST == 1", tmp_path)
    assert (result.returncode == 0) is works, result.stderr


def test_missing_compiled_op_says_so_when_called(tmp_path: Path) -> None:
    (tmp_path / "ops.py").write_text(script.COMPILED_OPS_TEXT)
    result = run_isolated("from ops import _C\nhasattr(_C, '__wrapped__')", tmp_path)
    assert result.returncode == 0
    result = run_isolated("from ops import _C\n_C.deform_conv_forward(1)", tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: Detectron2's compiled op 'deform_conv_forward' is not in")
