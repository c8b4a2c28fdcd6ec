"""A Debian for aarch64 with the packages of aqdet.runtime, in folders, for QEMU's emulation of that processor."""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from debian import fetch, unpack

REQUIREMENTS = ("numpy", "onnxruntime", "Pillow", "tqdm")  # packages of aqdet.runtime
# Newest first; pip takes none of them for granted that is not named.
WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
# ONNX Runtime reads these on aarch64, where this machine's own would not do.
CPUINFO = "processor\t: 0\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {part}\n\n"


def debian_system(cache: Path) -> Path:
    """Returns the folder with Debian's Python for aarch64 and its libraries, and unpacks them if necessary."""
    system = cache / "aarch64"
    if not system.is_dir():
        unpack(["python3-minimal", "libpython3-stdlib", "libstdc++6"], system, "arm64")
    processors = system / "sys/devices/system/cpu"
    processors.mkdir(parents=True, exist_ok=True)
    for name in ("possible", "present", "kernel_max"):
        (processors / name).write_text("0\n")
    return system


def runtime_packages(cache: Path, python: str) -> Path:
    """Returns the folder with the runtime's packages for aarch64, in the versions that are installed here."""
    wanted = [f"{name}=={version(name)}" for name in REQUIREMENTS]
    packages = cache / "-".join(["aarch64", python, *(text.replace("==", "") for text in wanted)])
    if packages.is_dir():
        return packages
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", f"{temporary}/site", "--no-compile"]
        command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        command += [part for wheel in WHEELS for part in ("--platform", wheel)]
        fetch([*command, *wanted], "pip install for aarch64")
        Path(temporary, "site").rename(packages)
    return packages


def write_cpuinfo(system: Path, features: str, part: str) -> None:
    """Writes ``/proc/cpuinfo`` of a system; the processor's features and part number as Linux has them there."""
    (system / "proc").mkdir(exist_ok=True)
    (system / "proc/cpuinfo").write_text(CPUINFO.format(features=features, part=part))
