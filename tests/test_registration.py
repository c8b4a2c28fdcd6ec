"""``import aqdet`` registers with Detectron2 in any order, and the runtime imports no PyTorch."""

import importlib
import os
import pkgutil
import subprocess
import sys
import warnings

import pytest
from helpers import process_environment

import aqdet
from aqdet.registration import ImportAfter, ImportWithout

BUILDS = """
import warnings
warnings.simplefilter("ignore")
{imports}
import aqdet.config
overrides = ["MODEL.META_ARCHITECTURE", "QuantRetinaNet", "MODEL.RESNETS.DEPTH", "18", "MODEL.DEVICE", "cpu",
             "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4', 'res5']",
             "MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']", "MODEL.FPN.OUT_CHANNELS", "8", "MODEL.WEIGHTS", "",
             "MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64], [128], [256], [512]]", "MODEL.QUANT.ENABLED", "True",
             "MODEL.BACKBONE.NAME", "build_quant_retinanet_resnet_fpn_backbone"]
from detectron2.modeling import build_model
from detectron2.data import MetadataCatalog
print(type(build_model(aqdet.config.load_config("", overrides))).__name__)
print(len(MetadataCatalog.get("aqdet_shapes_val").thing_classes) > 1)
"""
# Each package alone and first, in a copy of a process that has imported PyTorch and what Detectron2 is built on.
FIRST = """
import importlib, os, sys, warnings
warnings.simplefilter("ignore")
import detectron2.structures
for name in sys.argv[1:]:
    if not os.fork():
        importlib.import_module(name)
        from detectron2.modeling import META_ARCH_REGISTRY
        os._exit(0 if "QuantRetinaNet" in META_ARCH_REGISTRY else 2)
    if os.wait()[1]:
        print(name)
"""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=process_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    ["import aqdet", "import detectron2.engine, aqdet", "import aqdet.runtime, detectron2.engine"],
)
def test_import_aqdet_registers(imports):
    assert run(BUILDS.format(imports=imports)) == "QuantRetinaNet\nTrue\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_each_package_can_be_imported_first():
    names = [f"aqdet.{module.name}" for module in pkgutil.iter_modules(aqdet.__path__)]
    assert len(names) > 8
    assert run(FIRST, *names) == ""


@pytest.mark.parametrize(
    "imports",
    ["import aqdet", "from aqdet.runtime import Detector", "import aqdet.data.check.cache, aqdet.runtime.media"],
)
def test_imports_no_torch(imports):
    heavy = ("torch", "torchvision", "detectron2", "fvcore", "matplotlib", "tensorboard")
    assert run(f"{imports}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])") == "[]\n"


def test_public_names():
    assert all(getattr(aqdet, name) is not None for name in aqdet.__all__)
    assert aqdet.load_config is importlib.import_module("aqdet.config").load_config
    with pytest.raises(AttributeError, match="no attribute 'models'"):
        _ = aqdet.models


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Two modules; the second notes that it was imported, and the first fails while a file ``fail`` exists."""
    (tmp_path / "theirs_rt.py").write_text(
        "import os\nif os.path.exists(os.path.join(os.path.dirname(__file__), 'fail')): raise OSError('not now')\n"
        "complete = True\n"
    )
    (tmp_path / "ours_rt.py").write_text("import theirs_rt\nseen = theirs_rt.complete\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    for name in ("theirs_rt", "ours_rt"):
        sys.modules.pop(name, None)


def test_a_module_follows_one_that_is_imported_later(modules):
    ImportAfter({"theirs_rt": "ours_rt"}).install()
    assert "ours_rt" not in sys.modules
    theirs = importlib.import_module("theirs_rt")
    assert sys.modules["ours_rt"].seen and theirs.__loader__.get_source("theirs_rt").startswith("import os")
    del sys.modules["ours_rt"]
    importlib.reload(theirs)
    assert "ours_rt" not in sys.modules


def test_a_module_follows_one_that_is_imported_already(modules):
    importlib.import_module("theirs_rt")
    ImportAfter({"theirs_rt": "ours_rt"}).install()
    assert sys.modules["ours_rt"].seen


def test_a_failed_import_can_be_tried_again(modules):
    ImportAfter({"theirs_rt": "ours_rt"}).install()
    (modules / "fail").touch()
    with pytest.raises(OSError, match="not now"):
        importlib.import_module("theirs_rt")
    assert "ours_rt" not in sys.modules
    (modules / "fail").unlink()
    importlib.import_module("theirs_rt")
    assert "ours_rt" in sys.modules


def test_an_absent_module_stays_absent(modules):
    ImportAfter({"nowhere_rt": "ours_rt"}).install()
    with pytest.raises(ModuleNotFoundError, match="nowhere_rt"):
        importlib.import_module("nowhere_rt")
    assert "ours_rt" not in sys.modules


def test_importing_detectron2_is_quiet_and_no_other_warning_is_hidden():
    code = (
        "import aqdet, detectron2.engine, detectron2.evaluation, warnings\n"
        "print([f[1].pattern for f in warnings.filters if f[1] is not None and 'jit.script' in f[1].pattern])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.stdout == "[]\n"


def test_one_warning_is_hidden_while_a_module_is_imported(modules):
    (modules / "theirs_rt.py").write_text("import warnings\nwarnings.warn('old: a')\nwarnings.warn('new: old: b')\n")
    ImportWithout("old:", ("theirs_rt",)).install()
    with pytest.warns() as shown:
        importlib.import_module("theirs_rt")
        warnings.warn("old: c", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["new: old: b", "old: c"]
