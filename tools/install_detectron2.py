"""Installs the Python part of Detectron2, 0.6 or another version, where ``import detectron2`` does not work yet.

Detectron2 is not on PyPI under its own name; ``pb1-detectron2`` holds the Python files of its
v0.6 tag without the sources of the compiled ops. This script downloads that archive with pip,
checks its sha256, applies the changes of ``detectron2_changes.py`` (which let 0.6 run with today's
numpy, Pillow and setuptools), and installs the result as the distribution ``detectron2 0.6``. Each
change must find its text exactly as often as expected, or nothing is installed.

``--source``, or the variable AQDET_DETECTRON2, asks for another version: ``main``, a commit of
Detectron2's repository (40 digits), or what git can fetch or this machine already has: a source
folder, an archive of one (.tar.gz), a repository's folder or URL. Without a network the last three
work, and ``main`` ends with one line that names them. The source's own build files are not used,
its few outdated lines are changed where they are found, and the version says which commit it is.
What is there stays while ``--source`` stays the same: ``main`` is not fetched again.

``--target DIR`` puts the package alone into a folder for PYTHONPATH, beside a Detectron2 that is
installed already; without it, a Detectron2 that imports and that this script has not installed is
left alone, or, where a ``--source`` was asked for, an error.

Usage: ``python tools/install_detectron2.py`` (in the environment that is to have it; needs
torch and setuptools there).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from detectron2_changes import (
    CHANGES,
    COMPILED_OPS_PATH,
    MAIN_CHANGES,
    InstallError,
    compiled_ops_text,
    setup_text,
)

REQUIREMENT = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
RELEASE = "0.6"
REPOSITORY = "https://github.com/facebookresearch/detectron2"
# What a package of Detectron2 is made of.
PARTS = ("detectron2", "configs", "projects/DeepLab", "projects/Panoptic-DeepLab", "projects/PointRend")

# Prints three lines as far as it gets: where detectron2 is, what pip calls it, its version.
PROBE = """\
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("detectron2")
print(spec.origin or "" if spec else "")
print(*importlib.metadata.packages_distributions().get("detectron2", ()), flush=True)
import detectron2
print(detectron2.__version__)
"""


def existing_detectron2(source: str = "") -> str | None:
    """Returns version and place of the Detectron2 that this interpreter imports, or None.

    None is also the answer to what an interrupted run of this script leaves behind, our own files
    that are not known to pip yet, and to an installation of ours from another source or with other
    changes.

    Raises:
        InstallError: one is found but fails to import, or is not ours although a source was asked
            for; replacing it is left to its owner.
    """
    command = [sys.executable, "-P", "-c", PROBE]
    result = subprocess.run(command, capture_output=True, text=True)
    origin, known_to_pip, version, *_ = [*result.stdout.split("\n"), "", "", ""]
    if not origin:
        return None
    package = Path(origin).parent
    ours = package / Path(COMPILED_OPS_PATH).name
    if ours.exists() and (not known_to_pip or ours.read_text(encoding="utf-8") != compiled_ops_text(source)):
        return None
    if result.returncode != 0:
        error = (result.stderr.strip() or "no message").splitlines()[-1]
        raise InstallError(f"{package} exists but does not import ({error}): repair or remove it")
    if source and not ours.exists():
        raise InstallError(f"{version} in {package} is not of this script: remove it, or ask for no --source")
    return f"{version} in {package}"


def run_pip(*arguments: str) -> None:
    """Runs this interpreter's pip with the user's own configuration."""
    command = [sys.executable, "-m", "pip", *arguments]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        raise InstallError(f"pip {arguments[0]} failed (its message is above)")


def check_sha256(archive: Path, expected: str) -> None:
    """Raises InstallError unless the file has the expected sha256."""
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != expected:
        raise InstallError(f"{archive.name}: sha256 is {actual}, expected {expected}")


def download(folder: Path) -> Path:
    """Downloads the archive into ``folder`` (pip checks its sha256) and returns its path."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n", encoding="utf-8")
    # The archive's setup.py imports torch, so it cannot be read in an isolated environment.
    run_pip(
        *("download", "--quiet", "--no-deps", "--no-binary=:all:", "--no-build-isolation"),
        *("--require-hashes", "--requirement", str(requirements), "--dest", str(folder)),
    )
    archives = sorted(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise InstallError(f"pip download {REQUIREMENT} left {len(archives)} archives, expected 1")
    return archives[0]


def extract(archive: Path, folder: Path) -> Path:
    """Extracts the archive below ``folder`` and returns its single top folder.

    Raises:
        InstallError: it has several, or, before Python 3.11.4, a file whose place is outside ``folder``.
    """
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:
            # Python before 3.11.4, as Debian 12 has it, knows no filter: files and folders alone, without links.
            members = [member for member in tar.getmembers() if member.isfile() or member.isdir()]
            for member in members:
                if not (folder / member.name).resolve().is_relative_to(folder.resolve()):
                    raise InstallError(f"{archive.name}: {member.name!r} would be written outside the folder")
            tar.extractall(folder, members)
    tops = list(folder.iterdir())
    if len(tops) != 1 or not tops[0].is_dir():
        raise InstallError(f"{archive.name}: expected one top folder, found {len(tops)} entries")
    return tops[0]


def fetch(source: str, folder: Path) -> tuple[Path, str]:
    """Fetches ``main``, a commit or another repository's HEAD into ``folder``; returns the tree and its commit.

    Raises:
        InstallError: git is missing or could not, with git's reason and what works without a network.
    """
    is_commit = re.fullmatch(r"[0-9a-f]{40}", source) is not None
    repository = REPOSITORY if is_commit or source == "main" else source
    revision = source if is_commit or source == "main" else "HEAD"

    def git(*arguments: str) -> str:
        environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, env=environment
            )
        except FileNotFoundError:
            raise InstallError(f"{source}: git is needed to fetch it; a source folder or archive needs none") from None
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no message").splitlines()[0]
            raise InstallError(
                f"{source}: git could not fetch {revision} of {repository} ({reason}); without a network, name a "
                "source folder, its .tar.gz or a repository on this machine (AQDET_DETECTRON2 or --source)"
            )
        return done.stdout.strip()

    git("init", "--quiet")
    git("fetch", "--quiet", "--depth", "1", repository, revision)
    git("checkout", "--quiet", "FETCH_HEAD")
    return folder, git("rev-parse", "FETCH_HEAD")


def obtain(source: str, folder: Path) -> tuple[Path, str]:
    """Returns the source tree that is asked for, and the version that its package gets.

    Raises:
        InstallError: there is none.
    """
    origin, version = Path(source), f"{RELEASE}+local"
    if origin.is_file():
        (folder / "archive").mkdir()
        tree = extract(origin, folder / "archive")
    elif (origin / "detectron2" / "__init__.py").is_file():
        tree = origin
    else:
        (folder / "repository").mkdir()
        # A path is relative to where this script was called, not to the folder that git works in.
        tree, commit = fetch(str(origin.resolve()) if origin.is_dir() else source, folder / "repository")
        version = f"{RELEASE}+{commit[:12]}"
    if not (tree / "detectron2" / "__init__.py").is_file():
        raise InstallError(f"{source}: it has no detectron2/__init__.py")
    return tree, version


def prepare(tree: Path, root: Path, source: str, version: str) -> None:
    """Copies what the package needs of a source tree to ``root``, with MAIN_CHANGES and build files of our own.

    Raises:
        InstallError: a part is missing.
    """
    for part in PARTS:
        if not (tree / part).is_dir():
            raise InstallError(f"{source}: it has no folder {part}")
        # Compiled ops of a developer's checkout, and its link from the model zoo to configs.
        ignored = shutil.ignore_patterns("*.so", "csrc", "__pycache__", "configs" if part == "detectron2" else "")
        shutil.copytree(tree / part, root / part, ignore=ignored)
    shutil.move(root / "configs", root / "detectron2" / "model_zoo" / "configs")
    package = root / "detectron2" / "__init__.py"
    text = re.sub(r"(?m)^__version__ = .*$", f'__version__ = "{version}"', package.read_text(encoding="utf-8"))
    package.write_text(text, encoding="utf-8")
    applied = sum(change.apply_where_found(root) for change in MAIN_CHANGES)
    (root / COMPILED_OPS_PATH).write_text(compiled_ops_text(source), encoding="utf-8")
    (root / "setup.py").write_text(setup_text(version), encoding="utf-8")
    print(f"Detectron2: applied {applied} of {len(MAIN_CHANGES)} changes to {version}, installing", flush=True)


def patch(root: Path) -> None:
    """Applies CHANGES to the source tree of 0.6 and replaces its build files by our own.

    Raises:
        InstallError: a change does not apply to these files.
    """
    for change in CHANGES:
        change.apply(root)
    compiled_ops = root / COMPILED_OPS_PATH
    if compiled_ops.exists():
        raise InstallError(f"{COMPILED_OPS_PATH}: exists already in the archive")
    compiled_ops.write_text(compiled_ops_text(), encoding="utf-8")
    (root / "setup.cfg").unlink(missing_ok=True)
    (root / "setup.py").write_text(setup_text(RELEASE), encoding="utf-8")
    print(f"Detectron2: applied {len(CHANGES)} changes, installing", flush=True)


def build(root: Path, folder: Path) -> str:
    """Builds the patched tree and returns the wheel's path."""
    wheels = folder / "wheels"
    run_pip(
        *("wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", str(wheels), str(root)),
    )
    (wheel,) = map(str, wheels.glob("*.whl"))
    return wheel


def install(wheel: str, *, constraint: str | None = None, target: Path | None = None) -> None:
    """Installs a wheel and what it depends on, or, with a target, itself alone into that folder."""
    if target is not None:
        shutil.rmtree(target, ignore_errors=True)
        run_pip("install", "--quiet", "--no-deps", "--target", str(target), wheel)
        return
    constraints = ("--constraint", constraint) if constraint else ()
    run_pip("install", "--quiet", *constraints, wheel)
    # Where an earlier installation of ours has the same version, pip takes it for this one.
    run_pip("install", "--quiet", "--no-deps", "--force-reinstall", wheel)


def make_wheel(source: str, folder: Path) -> str:
    """Fetches, checks, patches and builds what is asked for ("": 0.6) below ``folder``; returns the wheel's path.

    Raises:
        InstallError: with the reason.
    """
    root = folder / "source"
    root.mkdir()
    if source:
        print(f"Detectron2: fetching {source}", flush=True)
        tree, version = obtain(source, folder)
        prepare(tree, root, source, version)
    else:
        print(f"Detectron2: downloading {REQUIREMENT}", flush=True)
        archive = download(folder)
        check_sha256(archive, SHA256)
        root = extract(archive, root)
        patch(root)
    return build(root, folder)


def check_target(target: Path, source: str) -> bool:
    """Returns whether the folder already holds this; raises InstallError where it holds something else than ours."""
    marker = target / COMPILED_OPS_PATH
    if marker.is_file():
        return marker.read_text(encoding="utf-8") == compiled_ops_text(source)
    if target.exists() and any(target.iterdir()):
        raise InstallError(f"--target {target}: it holds files that are not of this script; name a new folder")
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Installs Detectron2 unless it is there; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--constraint", help="pip constraints file for Detectron2's dependencies")
    parser.add_argument(
        "--source",
        default=os.environ.get("AQDET_DETECTRON2") or RELEASE,
        help="0.6, main, a commit, or a source folder, archive or repository (default: AQDET_DETECTRON2, or 0.6)",
    )
    parser.add_argument("--target", type=Path, metavar="DIR", help="install the package alone into this folder")
    options = parser.parse_args(arguments)
    constraint, target = options.constraint, options.target
    source = "" if options.source == RELEASE else options.source
    if constraint and not Path(constraint).is_file():
        parser.error(f"argument --constraint: {constraint!r} is no file")
    try:
        existing = existing_detectron2(source) if target is None else None
        if existing is not None or (target is not None and check_target(target, source)):
            print(f"Detectron2: {existing or target} already works, left alone")
            return 0
        with tempfile.TemporaryDirectory(prefix="aqdet-detectron2-") as name:
            install(make_wheel(source, Path(name)), constraint=constraint, target=target)
        installed = existing_detectron2(source) if target is None else str(target)
        if installed is None:
            raise InstallError("pip reported success, but import detectron2 still fails")
    except InstallError as error:
        print(f"Detectron2 was not installed: {error}", file=sys.stderr)
        return 1
    print(f"Detectron2: installed {installed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
