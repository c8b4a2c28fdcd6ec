"""aqdet: object detectors at 4 bits and below, on Detectron2.

Importing the package registers its backbones, meta-architectures and embedded dataset with Detectron2. On a
machine that only runs exported detectors there is no Detectron2 to register with: there ``aqdet.runtime`` is
all that works, and asking for anything else says so.
"""

from typing import Any

__version__ = "0.1.0"

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    __all__ = ["runtime"]

    def __getattr__(name: str) -> Any:
        if name in ("add_aqdet_config", "data", "load_config", "modeling"):
            raise ImportError(
                f"aqdet.{name} needs Detectron2, which is not installed here (tools/setup_env.sh installs it); "
                "without it only aqdet.runtime works"
            )
        raise AttributeError(f"module 'aqdet' has no attribute {name!r}")
else:
    from . import data, modeling
    from .config import add_aqdet_config, load_config

    __all__ = ["add_aqdet_config", "data", "load_config", "modeling"]
