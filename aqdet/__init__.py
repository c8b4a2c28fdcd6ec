"""aqdet: object detectors at 4 bits and below, on Detectron2.

An import of the package registers its backbones, meta-architectures and embedded dataset with Detectron2 when
Detectron2 is imported, whether before or after. The package imports neither PyTorch nor Detectron2 itself: a machine
that only runs exported detectors needs neither for ``aqdet.runtime``, and any other name raises an error that names
the missing package.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import ImportAfter, ImportWithout

if TYPE_CHECKING:
    from . import data, modeling
    from .config import add_aqdet_config, load_config
    from .data.embedded import register as _register  # noqa: F401  (registers)
    from .engine import prepare, prepare_trainer

__version__ = "0.1.0"
__all__ = ["add_aqdet_config", "data", "load_config", "modeling", "prepare", "prepare_trainer"]

# The module that defines each public name, imported on first use.
_HOMES = {
    "add_aqdet_config": "aqdet.config",
    "data": "aqdet.data",
    "load_config": "aqdet.config",
    "modeling": "aqdet.modeling",
    "prepare": "aqdet.engine",
    "prepare_trainer": "aqdet.engine",
}

ImportAfter({"detectron2.data": "aqdet.data.embedded.register", "detectron2.modeling": "aqdet.modeling"}).install()
# These modules script functions while they are imported, which newer releases of PyTorch deprecate.
ImportWithout(
    "`torch.jit.script` is deprecated", ("detectron2.modeling.box_regression", "fvcore.nn.focal_loss")
).install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'aqdet' has no attribute {name!r}")
    try:
        module = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if error.name not in ("detectron2", "torch"):
            raise
        raise ImportError(
            f"aqdet.{name} needs Detectron2 and PyTorch, and {error.name} is not installed here (tools/setup_env.sh "
            "installs both); without them only aqdet.runtime works"
        ) from error
    return module if name in ("data", "modeling") else getattr(module, name)
