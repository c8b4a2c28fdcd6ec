"""The names and paths of the config files that aqdet ships."""

from __future__ import annotations

from pathlib import Path


def shipped_configs() -> dict[str, Path]:
    """Returns the config files that aqdet ships: name, such as ``quickstart/retinanet_r18_lsq_w4a4.yaml`` -> path.

    They are in an installed package, and beside it in a checkout.
    """
    package = Path(__file__).resolve().parent.parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    if folder is None:
        return {}
    return yaml_files(folder)


def yaml_files(folder: Path) -> dict[str, Path]:
    """Returns the YAML files below a folder: name, relative to the folder -> path."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*.yaml"))}
