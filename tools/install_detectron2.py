"""Install the Python part of Detectron2 0.6 where ``import detectron2`` does not work yet.

Detectron2 is not on PyPI under its own name; ``pb1-detectron2`` holds the Python files of its
v0.6 tag without the sources of the compiled ops. This script downloads that archive with pip,
checks its sha256, applies the changes listed in CHANGES (which let 0.6 run with today's numpy,
Pillow and setuptools), and installs the result as the distribution ``detectron2 0.6``. Each
change must find its text exactly as often as expected, or nothing is installed.

A Detectron2 that already imports, of whichever version and origin, is left alone, except one that
an earlier version of this script has installed with other changes: that one is replaced.

Usage: ``python tools/install_detectron2.py`` (in the environment that is to have it; needs
torch and setuptools there).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REQUIREMENT = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"


class InstallError(RuntimeError):
    """A reason, in one line, why Detectron2 was not installed."""


@dataclass(frozen=True)
class Change:
    """One compatibility change: ``old``, found as whole words ``count`` times, becomes ``new``."""

    path: str
    old: str
    new: str
    count: int
    reason: str

    def apply(self, root: Path) -> None:
        """Rewrite the file under ``root``; raise InstallError if ``old`` is not as expected."""
        file = root / self.path
        if not file.is_file():
            raise InstallError(f"{self.path}: no such file; cannot apply the change: {self.reason}")
        pattern = rf"(?<!\w){re.escape(self.old)}(?!\w)"
        text, found = re.subn(pattern, lambda _: self.new, file.read_text(encoding="utf-8"))
        if found != self.count:
            raise InstallError(
                f"{self.path}: {self.old!r} found {found} times, expected {self.count}; "
                f"cannot apply the change: {self.reason}"
            )
        file.write_text(text, encoding="utf-8")


NO_COMPILED_OPS = "without compiled ops the package must import; a call names the missing op"
NUMPY_ALIAS = "numpy 1.24 removed its aliases of Python's types"
COMPILED_OPS_PATH = "detectron2/_compiled_ops.py"
COMPILED_OPS_TEXT = '''\
"""Stands in for the compiled ops, which this installation of Detectron2 does not have."""

CHANGES = "FINGERPRINT"


class _MissingOps:
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"Detectron2's compiled op {name!r} is not in this Python-only installation: "
            "uninstall detectron2 and build Detectron2 from source to use it"
        )


_C = _MissingOps()
'''

CHANGES = (
    *(
        Change(
            path,
            "from detectron2 import _C",
            "from detectron2._compiled_ops import _C",
            1,
            NO_COMPILED_OPS,
        )
        for path in (
            "detectron2/evaluation/fast_eval_api.py",
            "detectron2/layers/deform_conv.py",
            "detectron2/layers/roi_align_rotated.py",
            "detectron2/layers/rotated_boxes.py",
        )
    ),
    Change(
        "detectron2/layers/nms.py",
        "from torchvision.ops import nms",
        "from detectron2._compiled_ops import _C\nfrom torchvision.ops import nms",
        1,
        NO_COMPILED_OPS,
    ),
    Change(
        "detectron2/layers/nms.py",
        "torch.ops.detectron2.nms_rotated",
        "_C.nms_rotated",
        1,
        NO_COMPILED_OPS,
    ),
    Change("detectron2/data/build.py", "np.int", "int", 2, NUMPY_ALIAS),
    Change("detectron2/data/datasets/pascal_voc.py", "np.str", "str", 1, NUMPY_ALIAS),
    Change("detectron2/evaluation/pascal_voc_evaluation.py", "np.bool", "bool", 2, NUMPY_ALIAS),
    Change("detectron2/evaluation/sem_seg_evaluation.py", "np.int", "int", 2, NUMPY_ALIAS),
    Change("detectron2/evaluation/sem_seg_evaluation.py", "np.float", "float", 5, NUMPY_ALIAS),
    Change("detectron2/structures/masks.py", "np.bool", "bool", 3, NUMPY_ALIAS),
    Change("detectron2/utils/video_visualizer.py", "np.bool", "bool", 1, NUMPY_ALIAS),
    Change("detectron2/utils/visualizer.py", "np.bool", "bool", 3, NUMPY_ALIAS),
    Change(
        "detectron2/data/transforms/transform.py",
        "Image.LINEAR",
        "Image.BILINEAR",
        1,
        "Pillow 10 removed this second name of BILINEAR",
    ),
    Change(
        "detectron2/model_zoo/model_zoo.py",
        "import pkg_resources\nimport torch",
        "import torch",
        1,
        "setuptools 82 removed pkg_resources",
    ),
    Change(
        "detectron2/model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'os.path.join(os.path.dirname(__file__), "configs", config_path)',
        1,
        "setuptools 82 removed pkg_resources",
    ),
    Change(
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        1,
        "torch.meshgrid without indexing is deprecated and warns",
    ),
    Change(
        "detectron2/export/__init__.py",
        "from .api import *",
        "try:\n"
        "    from .api import *\n"
        "except ModuleNotFoundError as error:\n"
        '    if error.name.partition(".")[0] != "caffe2":\n'
        "        raise",
        1,
        "tracing and FLOP counts need no Caffe2, which PyTorch no longer has",
    ),
    Change(
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt",
        "from pycocotools.cocoeval import COCOeval as COCOeval_opt",
        1,
        "COCOEvaluator's fast implementation is a compiled op; pycocotools computes the same AP",
    ),
)
# Recorded where it is installed, so that an installation with other changes is found.
FINGERPRINT = hashlib.sha256(repr(CHANGES).encode()).hexdigest()[:16]
COMPILED_OPS_TEXT = COMPILED_OPS_TEXT.replace("FINGERPRINT", FINGERPRINT)

SETUP_TEXT = """\
from setuptools import find_packages, setup

PROJECTS = {
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
}

setup(
    name="detectron2",
    version="0.6",
    description="Detectron2 0.6, Python part only (no compiled ops)",
    url="https://github.com/facebookresearch/detectron2",
    license="Apache-2.0",
    packages=find_packages(include=["detectron2", "detectron2.*"]) + list(PROJECTS),
    package_dir=PROJECTS,
    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]},
    python_requires=">=3.11",
    install_requires=[
        "Pillow>=7.1",
        "cloudpickle",
        "fvcore>=0.1.5,<0.1.6",
        "hydra-core>=1.1",
        "iopath>=0.1.7,<0.1.10",
        "matplotlib",
        "omegaconf>=2.1",
        "pycocotools>=2.0.2",
        "tabulate",
        "tensorboard",
        "termcolor>=1.1",
        "tqdm>4.29.0",
        "yacs>=0.1.8",
    ],
)
"""


# Prints three lines as far as it gets: where detectron2 is, what pip calls it, its version.
PROBE = """\
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("detectron2")
print(spec.origin or "" if spec else "")
print(*importlib.metadata.packages_distributions().get("detectron2", ()), flush=True)
import detectron2
print(detectron2.__version__)
"""


def existing_detectron2() -> str | None:
    """Return version and place of the Detectron2 that this interpreter imports, or None.

    None is also the answer to what an interrupted run of this script leaves behind, our own files
    that are not known to pip yet, and to an installation of ours with other changes.

    Raises:
        InstallError: one is found but fails to import; replacing it is left to its owner.
    """
    command = [sys.executable, "-P", "-c", PROBE]
    result = subprocess.run(command, capture_output=True, text=True)
    origin, known_to_pip, version, *_ = [*result.stdout.split("\n"), "", "", ""]
    if not origin:
        return None
    package = Path(origin).parent
    ours = package / Path(COMPILED_OPS_PATH).name
    if ours.exists() and (not known_to_pip or ours.read_text(encoding="utf-8") != COMPILED_OPS_TEXT):
        return None
    if result.returncode != 0:
        error = (result.stderr.strip() or "no message").splitlines()[-1]
        raise InstallError(f"{package} exists but does not import ({error}): repair or remove it")
    return f"{version} in {package}"


def run_pip(*arguments: str) -> None:
    """Run this interpreter's pip with the user's own configuration."""
    command = [sys.executable, "-m", "pip", *arguments]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        raise InstallError(f"pip {arguments[0]} failed (its message is above)")


def check_sha256(archive: Path, expected: str) -> None:
    """Raise InstallError unless the file has the expected sha256."""
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != expected:
        raise InstallError(f"{archive.name}: sha256 is {actual}, expected {expected}")


def download(folder: Path) -> Path:
    """Download the archive into ``folder`` (sha256 checked by pip) and return its path."""
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
    """Extract the archive below ``folder`` and return its single top folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    tops = list(folder.iterdir())
    if len(tops) != 1 or not tops[0].is_dir():
        raise InstallError(f"{archive.name}: expected one top folder, found {len(tops)} entries")
    return tops[0]


def patch(root: Path) -> None:
    """Apply CHANGES to the source tree and replace its build files by our own.

    Raises:
        InstallError: a change does not apply to these files.
    """
    for change in CHANGES:
        change.apply(root)
    compiled_ops = root / COMPILED_OPS_PATH
    if compiled_ops.exists():
        raise InstallError(f"{COMPILED_OPS_PATH}: exists already in the archive")
    compiled_ops.write_text(COMPILED_OPS_TEXT, encoding="utf-8")
    (root / "setup.cfg").unlink(missing_ok=True)
    (root / "setup.py").write_text(SETUP_TEXT, encoding="utf-8")


def install(
    archive: Path,
    folder: Path,
    *,
    expected_sha256: str = SHA256,
    constraint: str | None = None,
) -> None:
    """Check, extract and patch the archive below ``folder``; install it when all of it worked.

    Args:
        archive: the downloaded source archive.
        folder: an existing folder to work in.
        expected_sha256: the only sha256 accepted.
        constraint: a pip constraints file for Detectron2's dependencies.

    Raises:
        InstallError: with the reason, nothing installed.
    """
    check_sha256(archive, expected_sha256)
    source = folder / "source"
    source.mkdir()
    root = extract(archive, source)
    patch(root)
    print(f"Detectron2: applied {len(CHANGES)} changes, installing", flush=True)
    wheels = folder / "wheels"
    run_pip(
        *("wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", str(wheels), str(root)),
    )
    constraints = ("--constraint", constraint) if constraint else ()
    built = [str(wheel) for wheel in wheels.glob("*.whl")]
    run_pip("install", "--quiet", *constraints, *built)
    # Where an earlier installation of ours has the same version, pip takes it for this one.
    run_pip("install", "--quiet", "--no-deps", "--force-reinstall", *built)


def main(arguments: Sequence[str] | None = None) -> int:
    """Install Detectron2 unless it is there; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--constraint", help="pip constraints file for Detectron2's dependencies")
    constraint = parser.parse_args(arguments).constraint
    if constraint and not Path(constraint).is_file():
        parser.error(f"argument --constraint: {constraint!r} is no file")
    try:
        existing = existing_detectron2()
        if existing is not None:
            print(f"Detectron2: {existing} already works, left alone")
            return 0
        print(f"Detectron2: downloading {REQUIREMENT}", flush=True)
        with tempfile.TemporaryDirectory(prefix="aqdet-detectron2-") as name:
            folder = Path(name)
            install(download(folder), folder, constraint=constraint)
        existing = existing_detectron2()
        if existing is None:
            raise InstallError("pip reported success, but import detectron2 still fails")
    except InstallError as error:
        print(f"Detectron2 was not installed: {error}", file=sys.stderr)
        return 1
    print(f"Detectron2: installed {existing}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
