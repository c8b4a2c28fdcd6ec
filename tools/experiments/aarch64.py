"""A Debian for aarch64 with the packages of aqdet.runtime, in folders, for QEMU's emulation of that processor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

Command = Sequence[str | os.PathLike[str]]
SECONDS_LIMIT = 1800
REQUIREMENTS = ("numpy", "onnxruntime", "Pillow", "tqdm")  # of aqdet.runtime
# Newest first; pip takes none of them for granted that is not named.
WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
# ONNX Runtime reads these on aarch64, where this machine's own would not do.
CPUINFO = "processor\t: 0\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {part}\n\n"


class NotHere(Exception):
    """What a machine needs is missing; the message says what, and how to get it."""


def program(*names: str, package: str) -> str:
    """Path of the first of these programs that is installed."""
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise NotHere(f"{names[0]} is not installed (package {package})")


def run_program(
    command: Command, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, whatever its status is."""
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=SECONDS_LIMIT, check=False
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """How a command that failed ended."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return f"exit status {done.returncode}: {lines[-1] if lines else 'no message'}"


def fetch(command: Command, purpose: str, cwd: Path | None = None) -> None:
    """Runs a command that fetches or unpacks something.

    Raises:
        NotHere: if it fails.
    """
    done = run_program(command, cwd)
    if done.returncode:
        raise NotHere(f"{purpose}: {last_line(done)}")


def debian_system(cache: Path) -> Path:
    """Folder with Debian's Python for aarch64 and its libraries; unpacked there if it is not yet."""
    system = cache / "aarch64"
    if system.is_dir():
        return system
    apt, dpkg = program("apt-get", package="apt"), program("dpkg", package="dpkg")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        work = Path(temporary)
        for folder in ("lists/partial", "archives/partial", "system/sys/devices/system/cpu"):
            (work / folder).mkdir(parents=True)
        (work / "status").touch()  # as if nothing was installed: the packages of this machine are not asked for
        options = [f"Dir::State::lists={work}/lists", f"Dir::State::status={work}/status", f"Dir::Cache={work}"]
        options += ["APT::Architecture=arm64", "APT::Architectures=arm64", "APT::Sandbox::User=", "Debug::NoLocking=1"]
        settings = [part for option in options for part in ("-o", option)]
        fetch([apt, *settings, "update"], "apt-get update for arm64")
        packages = ["python3-minimal", "libpython3-stdlib", "libstdc++6"]
        quiet = ["--yes", "--no-install-recommends", "--download-only"]
        fetch([apt, *settings, "install", *quiet, *packages], "apt-get install --download-only for arm64")
        for package in sorted((work / "archives").glob("*.deb")):
            fetch([dpkg, "-x", package, work / "system"], f"dpkg -x {package.name}")
        for name in ("possible", "present", "kernel_max"):
            (work / "system/sys/devices/system/cpu" / name).write_text("0\n")
        (work / "system").rename(system)
    return system


def runtime_packages(cache: Path, python: str) -> Path:
    """Folder with the packages that the runtime needs, for aarch64, in the versions that are installed here."""
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
