"""Programs and packages that an experiment needs and a checkout does not have, Debian's unpacked into folders."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

Command = Sequence[str | PathLike[str]]
SECONDS_LIMIT = 1800
ARCHIVE = "http://deb.debian.org/debian"


class NotHere(Exception):
    """Raised if a program or package of a machine is missing; the message names it, and how to get it."""


def program(*names: str, package: str) -> str:
    """Returns the path of the first of these programs that is installed; ``package`` has it."""
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise NotHere(f"{names[0]} is not installed (package {package})")


def run_program(
    command: Command, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, and accepts any status."""
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=SECONDS_LIMIT, check=False
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the exit status of a failed command, and the last line that it printed."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return f"exit status {done.returncode}: {lines[-1] if lines else 'no message'}"


def fetch(command: Command, purpose: str, cwd: Path | None = None) -> None:
    """Runs a command that fetches or unpacks something.

    Raises:
        NotHere: If it fails.
    """
    done = run_program(command, cwd)
    if done.returncode:
        raise NotHere(f"{purpose}: {last_line(done)}")


def unpack(packages: Sequence[str], system: Path, architecture: str, *, suite: str = "", alone: bool = False) -> None:
    """Unpacks Debian packages into a folder, which is written whole or not at all; nothing is installed.

    Args:
        packages: The names of the packages.
        system: The folder to make, which becomes the root of a file system.
        architecture: Debian's name of the processor, such as ``arm64``.
        suite: The release of Debian; "" for the one of this machine's packages.
        alone: Whether to leave out the packages that they depend on.

    Raises:
        NotHere: If apt or dpkg is missing or fails, or there is no network.
    """
    apt, dpkg = program("apt-get", package="apt"), program("dpkg", package="dpkg")
    system.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=system.parent) as temporary:
        work = Path(temporary)
        for folder in ("lists/partial", "archives/partial", "system"):
            (work / folder).mkdir(parents=True)
        (work / "status").touch()  # an empty status: packages of this machine do not count as installed
        options = [f"Dir::State::lists={work}/lists", f"Dir::State::status={work}/status", f"Dir::Cache={work}"]
        options += [f"APT::Architecture={architecture}", f"APT::Architectures={architecture}"]
        options += ["APT::Sandbox::User=", "Debug::NoLocking=1"]
        if suite:
            (work / "sources.list").write_text(f"deb {ARCHIVE} {suite} main\n")
            options += [f"Dir::Etc::SourceList={work}/sources.list", "Dir::Etc::SourceParts=/dev/null"]
        settings = [part for option in options for part in ("-o", option)]
        fetch([apt, *settings, "update"], f"apt-get update for {architecture}")
        if alone:
            fetch([apt, *settings, "download", *packages], "apt-get download", work / "archives")
        else:
            quiet = ["--yes", "--no-install-recommends", "--download-only"]
            fetch([apt, *settings, "install", *quiet, *packages], "apt-get install --download-only")
        for package in sorted((work / "archives").glob("*.deb")):
            fetch([dpkg, "-x", package, work / "system"], f"dpkg -x {package.name}")
        (work / "system").rename(system)
