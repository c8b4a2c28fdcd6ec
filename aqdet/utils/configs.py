"""The config files that aqdet ships, by their names."""

from __future__ import annotations

from pathlib import Path


def shipped_configs() -> dict[str, Path]:
    """Returns the config files that aqdet ships: name, as ``quickstart/retinanet_r18_lsq_w4a4.yaml`` -> path.

    They are part of an installed package, and lie beside it in a checkout.
    """
    package = Path(__file__).resolve().parent.parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    if folder is None:
        return {}
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*.yaml"))}
