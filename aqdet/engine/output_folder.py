"""The folder of a run: one training at a time writes into it, and only a training that has started."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import IO, Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..utils.files import sha256, to_json, write_json, write_text

logger = logging.getLogger(__name__)

LOCK = "training.lock"
CONFIG = "config.yaml"
EVALUATION = "evaluation.json"
_held: dict[str, IO[str]] = {}
"""Open lock files of this process by the real path of their folder."""


def check_output_dir(folder: str, *, train: bool) -> None:
    """Checks that a folder can be made and written, and that no training is running in it, and changes nothing.

    All processes of a run call it together.

    Args:
        folder: ``OUTPUT_DIR``, which need not exist.
        train: Whether a training is to start in it. An evaluation may run beside a training.

    Raises:
        ValueError: In all processes, in one line that names ``OUTPUT_DIR`` and the process that holds it, if any.
    """
    problem = _problem_of(folder, train) if comm.is_main_process() else ""
    problem = comm.all_gather(problem)[0]
    if problem:
        raise ValueError(problem)


def _problem_of(folder: str, train: bool) -> str:
    if not folder:
        return "OUTPUT_DIR is empty: name a folder"
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        return f"OUTPUT_DIR {folder!r} cannot be made: Not a directory: {existing!r}"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"OUTPUT_DIR {folder!r} cannot be written: no permission for {existing!r}"
    path = os.path.join(folder, LOCK)
    if not train or os.path.realpath(folder) in _held or not os.path.isfile(path):
        return ""
    with contextlib.suppress(OSError), open(path, "r+", encoding="utf-8") as file:
        if not _lock(file):
            return _refusal(folder, file.read())
    return ""


@contextlib.contextmanager
def holding(folder: str) -> Iterator[bool]:
    """Makes a folder and keeps other trainings out of it while the block runs.

    All processes of a run enter together, and the main one holds the lock for all of them. The operating system
    releases the lock however that process ends, so that the file of a killed training blocks nothing. Blocks for the
    same folder may be nested within one process.

    Args:
        folder: ``OUTPUT_DIR``.

    Returns:
        Whether this is the outermost block.

    Raises:
        ValueError: In all processes, in one line that names ``OUTPUT_DIR`` and the process and machine that holds it.
    """
    real = os.path.realpath(folder)
    problem, is_outermost = "", False
    if comm.is_main_process():
        is_outermost = real not in _held
        try:
            if is_outermost:
                _held[real] = _take(folder)
        except OSError as error:
            problem = f"OUTPUT_DIR {folder!r} cannot be written: {error.strerror}"
        except ValueError as error:
            problem = str(error)
    problem, is_outermost = comm.all_gather((problem, is_outermost))[0]
    if problem:
        raise ValueError(problem)
    try:
        yield is_outermost
    finally:
        if is_outermost and real in _held:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(real, LOCK))
            _held.pop(real).close()


def _take(folder: str) -> IO[str]:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, LOCK)
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (kept open: closing it gives the lock back)
        if not _lock(file):
            file.seek(0)
            holder = file.read()
            file.close()
            raise ValueError(_refusal(folder, holder))
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # the earlier training removed the file after it was opened here
    file.truncate(0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(to_json({"pid": os.getpid(), "host": socket.gethostname(), "started": started}))
    file.flush()
    return file


def _lock(file: IO[str]) -> bool:
    """Locks a file for this process; returns False if another process has locked it."""
    # A record lock belongs to one process: unlike flock's, it does not survive a kill in data loader workers.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("%s cannot be locked (%s): nothing keeps two trainings apart there", file.name, error.strerror)
    return True


def _refusal(folder: str, holder: str) -> str:
    try:
        noted = json.loads(holder)
        who = f"process {noted['pid']} on {noted['host']}, since {noted['started']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return f"OUTPUT_DIR {folder!r} is in use: a training runs in it ({who}); wait until it ends, or name another folder"


def write_config(cfg: CfgNode) -> None:
    """Writes ``OUTPUT_DIR/config.yaml``; the file of an earlier training becomes ``config.yaml.old``."""
    path, text = os.path.join(cfg.OUTPUT_DIR, CONFIG), cfg.dump()
    with contextlib.suppress(FileNotFoundError):
        with open(path, encoding="utf-8") as file:
            if file.read() == text:
                return
        os.replace(path, f"{path}.old")
    write_text(path, text)


@contextlib.contextmanager
def evaluation_noted(cfg: CfgNode, **facts: Any) -> Iterator[None]:
    """Records the config and the weights of an evaluation in ``OUTPUT_DIR/inference``, beside its results.

    ``config.yaml`` has the config, and ``evaluation.json`` names the weights. The main process removes the record of an
    earlier evaluation before the block, and writes the new one after it.

    Args:
        cfg: The config of the evaluation.
        facts: ``weights``, the checkpoint or exported folder, and other facts; the SHA-256 of a file is added.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if comm.is_main_process():
        for name in (CONFIG, EVALUATION):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
    yield
    if comm.is_main_process():
        weights = facts.get("weights")
        if weights and os.path.isfile(weights):
            facts["sha256"] = sha256(weights)
        write_text(os.path.join(folder, CONFIG), cfg.dump())
        write_json(os.path.join(folder, EVALUATION), {**facts, "date": time.strftime("%Y-%m-%d %H:%M:%S")})
