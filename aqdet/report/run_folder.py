"""Output folders of runs: config, commands, and the history in ``metrics.json``."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import logging
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..config import flatten, load_config
from ..utils.files import from_json

logger = logging.getLogger(__name__)

CHECKPOINTS = ("model_final_stripped.pth", "model_final.pth")
_ARGUMENTS = "Command line arguments: "
_HAS_BEGUN = re.compile(r"Starting training from iteration|SOLVER\.MAX_ITER is 0|Start inference on")
"""Lines of a log that a command writes when it is not refused any more."""


@dataclasses.dataclass
class Run:
    """One output folder.

    Attributes:
        path: The folder.
        name: The name that tells the run apart from the others.
        cfg: The run's config; None if there is none that can be read.
        test_cfg: The config of the evaluation whose results are in the folder.
        evaluation: The facts recorded with these results: ``weights`` or ``iterations``, and ``date``.
        commands: The command lines that wrote into the folder, oldest first.
        history: The records of ``metrics.json`` by iteration, without those that a restart made obsolete.
        notes: The things that are missing or odd, a sentence each.
    """

    path: Path
    name: str
    cfg: CfgNode | None = None
    test_cfg: CfgNode | None = None
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
    commands: list[str] = dataclasses.field(default_factory=list)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, text: str) -> None:
        """Logs a note, such as on a missing file, and keeps it for the page."""
        logger.warning("%s: %s", self.name, text)
        self.notes.append(text)

    def was_trained(self) -> bool:
        """Returns whether an iteration was trained in the folder."""
        return any("total_loss" in record for record in self.history)

    def is_post_training(self) -> bool:
        """Returns whether the quantizers were calibrated and no iteration was trained."""
        cfg = self.cfg
        return cfg is not None and cfg.SOLVER.MAX_ITER == 0 and cfg.MODEL.QUANT.ENABLED and not self.was_trained()

    def weights(self) -> Path | None:
        """Returns the detector: the stripped, final or last checkpoint, or ``MODEL.WEIGHTS`` of an evaluation."""
        names = list(CHECKPOINTS)
        last = self.path / "last_checkpoint"
        if last.is_file():
            names.append(last.read_text().strip())
        for name in names:
            if (self.path / name).is_file():
                return self.path / name
        if not self.was_trained() and self.cfg is not None and os.path.isfile(self.cfg.MODEL.WEIGHTS):
            return Path(self.cfg.MODEL.WEIGHTS)
        return None

    def evaluation_folder(self, dataset_name: str) -> Path:
        """Returns the folder of the results on a dataset; several test sets have a folder each."""
        folder = self.path / "inference"
        return folder / dataset_name if (folder / dataset_name).is_dir() else folder


def load_runs(paths: Sequence[str], *, config_file: str = "", overrides: Sequence[str] = ()) -> list[Run]:
    """Reads the small files of output folders.

    Args:
        paths: The folders.
        config_file: A config that is read for every run in place of its folder's ``config.yaml``.
        overrides: ``KEY VALUE ...`` for every config, for example if the data has moved.

    Raises:
        ValueError: In one line, if a path is no output folder or is given twice, or a config is not valid.
        FileNotFoundError: If ``config_file`` does not exist.
    """
    folders = [Path(path) for path in paths]
    for folder in folders:
        _check_is_run(folder, config_file)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"the same output folder comes twice: {' '.join(paths)}")
    runs = []
    for folder, name in zip(folders, run_names(folders), strict=True):
        run = Run(folder, name)
        noted = folder / "inference" / "config.yaml"
        path = config_file or folder / "config.yaml"
        if not os.path.isfile(path) and not config_file:
            path = noted  # config of an evaluation, if nothing was trained
        if os.path.isfile(path) or config_file:
            run.cfg = run.test_cfg = load_config(path, overrides)
        else:
            run.note("config.yaml is missing: no config, curves of detection, pictures, plan or histograms")
        if noted.is_file() and not config_file:
            run.test_cfg = load_config(noted, overrides)
        run.evaluation = _read_evaluation(folder)
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
    """Returns the shortest ends of the paths that tell them apart, as ``["seed0/lsq", "seed1/lsq"]``."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder.resolve()) for folder in folders]


def _read_evaluation(folder: Path) -> dict[str, Any]:
    try:
        noted = from_json((folder / "inference" / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def read_commands(folder: Path) -> list[str]:
    """Returns the command lines from logs, each once, oldest first, evaluations last; else the one in ``done.json``.

    A command that was refused before it trained or evaluated anything is left out; older logs have such commands, too.
    """
    commands = []
    for log in (folder / "log.txt", folder / "inference" / "log.txt"):
        latest = ""
        if log.is_file():
            with open(log, encoding="utf-8", errors="replace") as file:
                for line in file:
                    if _ARGUMENTS in line:
                        latest = _command(line.partition(_ARGUMENTS)[2].strip())
                    elif _HAS_BEGUN.search(line):
                        commands.append(latest)
    done = folder / "done.json"
    if not commands and done.is_file():
        with contextlib.suppress(ValueError, AttributeError):
            commands.append(str(json.loads(done.read_text()).get("command", "")))
    return [command for command in dict.fromkeys(commands) if command]


def _command(namespace: str) -> str:
    """Returns the command line behind a printed ``argparse.Namespace``, or the text itself if it is none."""
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
    """Quotes a word for a shell; lists of strings, which contain single quotes, get double quotes to be legible."""
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)


def _read_history(run: Run) -> None:
    path = run.path / "metrics.json"
    if not path.is_file():
        if not run.is_post_training():
            run.note("metrics.json is missing: no curves of loss and AP")
        return
    broken = replaced = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = from_json(line)
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
    """Returns the iterations at which a key of the history has a number, and these values."""
    points = [(r["iteration"], r[key]) for r in run.history if isinstance(r.get(key), int | float)]
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def config_differences(cfgs: Sequence[CfgNode]) -> list[tuple[str, list[str]]]:
    """Returns the keys whose values differ, with the values as text; ``"-"`` where a config lacks the key."""
    tables = [{key: repr(value) for key, value in flatten(cfg)} for cfg in cfgs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, "-") for table in tables]) for key in keys]
    return sorted((key, values) for key, values in rows if len(set(values)) > 1)
