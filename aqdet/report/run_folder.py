"""What a training left behind: config, commands, and the history in ``metrics.json``."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..config import flatten, load_config

logger = logging.getLogger(__name__)

CHECKPOINTS = ("model_final_stripped.pth", "model_final.pth")
_ARGUMENTS = "Command line arguments: "


@dataclasses.dataclass
class Run:
    """One output folder.

    Attributes:
        path: the folder. name: what tells it apart from the runs it is compared with.
        cfg: its config, None where there is none to be read.
        commands: the command lines that wrote into it, oldest first.
        history: the records of ``metrics.json`` by iteration, without those that a restart made obsolete.
        notes: what is missing or odd, a sentence each.
    """

    path: Path
    name: str
    cfg: CfgNode | None = None
    commands: list[str] = dataclasses.field(default_factory=list)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, text: str) -> None:
        """Logs something that is missing and keeps it for the page."""
        logger.warning("%s: %s", self.name, text)
        self.notes.append(text)

    def weights(self) -> Path | None:
        """The detector to look into: stripped, final or last checkpoint; of an evaluation, ``MODEL.WEIGHTS``."""
        names = list(CHECKPOINTS)
        last = self.path / "last_checkpoint"
        if last.is_file():
            names.append(last.read_text().strip())
        for name in names:
            if (self.path / name).is_file():
                return self.path / name
        trained = any("total_loss" in record for record in self.history)
        if not trained and self.cfg is not None and os.path.isfile(self.cfg.MODEL.WEIGHTS):
            return Path(self.cfg.MODEL.WEIGHTS)
        return None

    def evaluation_folder(self, dataset_name: str) -> Path:
        """Where the results on a dataset are: the trainer makes a folder each for several test sets."""
        folder = self.path / "inference"
        return folder / dataset_name if (folder / dataset_name).is_dir() else folder


def load_runs(paths: Sequence[str], *, config_file: str = "", overrides: Sequence[str] = ()) -> list[Run]:
    """Reads the small files of output folders.

    Args:
        paths: the folders.
        config_file: read for every run in place of the ``config.yaml`` in its folder.
        overrides: ``KEY VALUE ...``, applied to every config, e.g. where the data has moved.

    Raises:
        ValueError: in one line, for a path that is no output folder or comes twice, or a config that is not valid.
        FileNotFoundError: if ``config_file`` does not exist.
    """
    folders = [Path(path) for path in paths]
    for folder in folders:
        _check_is_run(folder, config_file)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"the same output folder comes twice: {' '.join(paths)}")
    runs = []
    for folder, name in zip(folders, run_names(folders), strict=True):
        run = Run(folder, name)
        path = config_file or folder / "config.yaml"
        if not os.path.isfile(path) and not config_file:
            path = folder / "inference" / "config.yaml"  # of an evaluation, where nothing was trained
        if os.path.isfile(path) or config_file:
            run.cfg = load_config(path, overrides)
        else:
            run.note("config.yaml is missing: no config, curves of detection, pictures, plan or histograms")
        run.commands = read_commands(folder)
        if not run.commands:
            run.note("neither done.json nor log.txt tells the command")
        _read_history(run)
        runs.append(run)
    return runs


def _check_is_run(folder: Path, config_file: str) -> None:
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder: give the OUTPUT_DIR of a training")
    left = ("config.yaml", "metrics.json", "inference")
    if not config_file and not any((folder / name).exists() for name in left):
        raise ValueError(f"{str(folder)!r} is no output folder of a training: it has none of {', '.join(left)}")


def run_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, e.g. ``["seed0/lsq", "seed1/lsq"]``."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder.resolve()) for folder in folders]


def read_commands(folder: Path) -> list[str]:
    """Command lines noted by ``jobs`` or in logs, each once, oldest first, evaluations last."""
    commands = []
    for log in (folder / "log.txt", folder / "inference" / "log.txt"):
        if log.is_file():
            with open(log, encoding="utf-8", errors="replace") as file:
                for line in file:
                    if _ARGUMENTS in line:
                        commands.append(_command(line.partition(_ARGUMENTS)[2].strip()))
    done = folder / "done.json"
    if not commands and done.is_file():
        with contextlib.suppress(ValueError, AttributeError):
            commands.append(str(json.loads(done.read_text()).get("command", "")))
    return [command for command in dict.fromkeys(commands) if command]


def _command(namespace: str) -> str:
    """The command line behind a printed ``argparse.Namespace``; the text itself where it is something else."""
    try:
        call = ast.parse(namespace, mode="eval").body
        arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords}  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, AttributeError):
        return namespace
    words = ["python", "tools/train_net.py", "--config-file", str(arguments.get("config_file", ""))]
    words += [f"--{flag.replace('_', '-')}" for flag in ("resume", "eval_only") if arguments.get(flag)]
    for flag in ("num_gpus", "num_machines"):
        if arguments.get(flag, 1) != 1:
            words += [f"--{flag.replace('_', '-')}", str(arguments[flag])]
    return " ".join(_quoted(word) for word in [*words, *map(str, arguments.get("opts") or ())])


def _quoted(word: str) -> str:
    """For a shell, legibly: lists of strings, which have single quotes in them, in double ones."""
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)


def _read_history(run: Run) -> None:
    path = run.path / "metrics.json"
    if not path.is_file():
        run.note("metrics.json is missing: no curves of loss and AP")
        return
    broken = replaced = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
            broken += bool(line.strip())
            continue
        while run.history and run.history[-1]["iteration"] >= record["iteration"]:
            run.history.pop()
            replaced += 1
        run.history.append(record)
    if broken:
        run.note(f"lines of metrics.json that cannot be read are left out: {broken}")
    if replaced:
        run.note(f"records of metrics.json that a restart of the training replaced are left out: {replaced}")


def series(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Iterations and values of one key of the history, where it has a number."""
    points = [(r["iteration"], r[key]) for r in run.history if isinstance(r.get(key), int | float)]
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def config_differences(cfgs: Sequence[CfgNode]) -> list[tuple[str, list[str]]]:
    """Keys whose values differ between configs, with the values as text; ``"-"`` where a config lacks the key."""
    tables = [{key: repr(value) for key, value in flatten(cfg)} for cfg in cfgs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, "-") for table in tables]) for key in keys]
    return sorted((key, values) for key, values in rows if len(set(values)) > 1)
