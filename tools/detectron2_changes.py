"""
Changes that an installation of Detectron2's Python part makes in its files, and the build files that it gets.

Detectron2 0.6 is of 2021: :data:`CHANGES` lets it run with today's NumPy, Pillow and setuptools. Its main branch needs
less, :data:`MAIN_CHANGES`. Compiled ops are in neither; a call of one names it. Used by ``install_detectron2.py``.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path


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
        """Rewrites the file under ``root``; raises InstallError if ``old`` is not as expected."""
        file = root / self.path
        if not file.is_file():
            raise InstallError(f"{self.path}: no such file; cannot apply the change: {self.reason}")
        text, found = self._replace(file)
        if found != self.count:
            raise InstallError(
                f"{self.path}: {self.old!r} found {found} times, expected {self.count}; "
                f"cannot apply the change: {self.reason}"
            )
        file.write_text(text, encoding="utf-8")

    def apply_where_found(self, root: Path) -> bool:
        """Rewrites the file under ``root`` wherever ``old`` is found; returns whether it was."""
        file = root / self.path
        text, found = self._replace(file) if file.is_file() else ("", 0)
        if found:
            file.write_text(text, encoding="utf-8")
        return found > 0

    def _replace(self, file: Path) -> tuple[str, int]:
        pattern = rf"(?<!\w){re.escape(self.old)}(?!\w)"
        return re.subn(pattern, lambda _: self.new, file.read_text(encoding="utf-8"))


NO_COMPILED_OPS = "without compiled ops the package must import; a call names the missing op"
NUMPY_ALIAS = "numpy 1.24 removed its aliases of Python's types"
COMPILED_OPS_PATH = "detectron2/_compiled_ops.py"
COMPILED_OPS_TEMPLATE = '''\
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
# Of the main branch, which moves: a change whose text is not there is not needed any more. Looked up in CHANGES.
MAIN_PATHS = ("layers/nms.py", "model_zoo/model_zoo.py", "modeling/anchor_generator.py")
MAIN_CHANGES = tuple(change for change in CHANGES if change.path.removeprefix("detectron2/") in MAIN_PATHS)


def compiled_ops_text(source: str = "") -> str:
    """Returns the content of COMPILED_OPS_PATH, which also records the source and the changes of the installation."""
    recorded = repr((source, MAIN_CHANGES) if source else CHANGES)
    return COMPILED_OPS_TEMPLATE.replace("FINGERPRINT", hashlib.sha256(recorded.encode()).hexdigest()[:16])


SETUP_TEMPLATE = """\
from setuptools import find_packages, setup

PROJECTS = {
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
}

setup(
    name="detectron2",
    version="VERSION",
    description="Detectron2 VERSION, Python part only (no compiled ops)",
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
        "packaging",
        "pycocotools>=2.0.2",
        "tabulate",
        "tensorboard",
        "termcolor>=1.1",
        "tqdm>4.29.0",
        "yacs>=0.1.8",
    ],
)
"""


def setup_text(version: str) -> str:
    """Returns a setup.py for the patched tree."""
    return SETUP_TEMPLATE.replace("VERSION", version)
