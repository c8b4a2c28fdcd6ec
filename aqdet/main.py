"""The ``aqdet`` command: one subcommand for each main program."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from .utils.console import run_console

# Subcommand -> program of tools/, its function, and a text for the help.
PROGRAMS = {
    "check": ("check_dataset", "main", "check datasets before training"),
    "plan": ("plan", "main", "print bits, parameters and operations of each layer of a config"),
    "train": ("train_net", "invoke_main", "train or evaluate a detector or classifier"),
    "report": ("report", "main", "write an HTML page about trainings"),
    "demo": ("demo", "main", "draw what a trained detector finds in images and videos"),
    "export": ("export_model", "main", "export a trained detector to a folder that runs without PyTorch"),
    "quantize": ("quantize", "main", "quantize a full-precision detector without training, and export it"),
    "convert-torchvision": ("convert_torchvision", "main", "make a checkpoint to start from of torchvision's trunks"),
}
DETECT = ("detect", "run an exported detector on images, videos, cameras and streams")
CONFIGS = ("configs", "list the config files that aqdet ships")
USER_ERROR = 2


def main() -> None:
    """Runs the subcommand that the first argument names, with the arguments after it."""
    run_console(_run_subcommand, goes_on=sys.argv[1:2] == ["train"])


def _run_subcommand() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        from . import __version__

        print(__version__)
    elif name == DETECT[0]:
        from .runtime.cli import main as detect

        detect(rest, prog="aqdet detect")
    elif name == CONFIGS[0]:
        _list_configs()
    elif name in PROGRAMS:
        program, function, _ = PROGRAMS[name]
        try:
            module = _load(program)
            # The first word is the file, since programs print the command that continues them.
            sys.argv = [str(module.__file__), *rest]
            getattr(module, function)()
        except ModuleNotFoundError as error:
            missing = (error.name or "aqdet").split(".")[0]
            if missing == "aqdet":
                raise
            print(
                f"error: aqdet {name} needs {missing}, which is not installed here: pip install 'aqdet[train]', and "
                'Detectron2 (README, "Install")',
                file=sys.stderr,
            )
            sys.exit(USER_ERROR)
    else:
        print(f"error: no subcommand {name!r}\n\n{_usage()}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _usage() -> str:
    rows = [*((name, text) for name, (_, _, text) in PROGRAMS.items()), DETECT, CONFIGS]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:{width}}  {text}" for name, text in rows]
    return "\n".join(
        ["usage: aqdet SUBCOMMAND ...", "", *lines, "", "aqdet SUBCOMMAND --help has the arguments of each."]
    )


def _load(program: str) -> ModuleType:
    """Imports a program of tools/, which is in ``aqdet.programs`` if aqdet is installed, else beside it."""
    tools = Path(__file__).resolve().parent.parent / "tools"
    if (tools / f"{program}.py").is_file():
        sys.path.insert(0, str(tools))
        return importlib.import_module(program)
    return importlib.import_module(f"aqdet.programs.{program}")


def _list_configs() -> None:
    from .utils.configs import shipped_configs

    for name in shipped_configs():
        print(name)
