"""Reader of config files and their bases: plain YAML, Detectron2's own files, and names of its model zoo."""

from __future__ import annotations

import copy
import difflib
import functools
import io
import os
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.file_io import Detectron2Handler, PathManager
from fvcore.common.config import BASE_KEY

from .utils.arithmetic import evaluate
from .utils.configs import shipped_configs, yaml_files
from .utils.plain_yaml import PlainLoader

EVAL_TAG = "tag:yaml.org,2002:python/object/apply:eval"
_REMOTE = ("http://", "https://")


class _ConfigLoader(PlainLoader):
    """Loader of plain YAML, which also computes the arithmetic in Detectron2's own files."""


def _construct_arithmetic(loader: _ConfigLoader, node: yaml.Node) -> Any:
    try:
        arguments = loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else []
        if len(arguments) != 1 or not isinstance(arguments[0], str):
            raise ValueError("eval takes one text")
        return evaluate(arguments[0])
    except ValueError as error:
        problem = f"eval of more than arithmetic: {error}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


_ConfigLoader.add_constructor(EVAL_TAG, _construct_arithmetic)


def read_config_file(path: str) -> dict[str, Any]:
    """Reads a config file and, below it, its ``_BASE_`` files.

    Args:
        path: A file, or the name of one that aqdet ships (with or without ``configs/``) or of one in Detectron2's model
            zoo (with or without ``detectron2://``). A ``_BASE_`` may be either, too; a relative one is looked up beside
            the file that names it, then in the zoo.

    Returns:
        The merged content, plain values only.

    Raises:
        FileNotFoundError: In one line, if a file does not exist.
        ValueError: In one line, if a file is no YAML, has object tags other than for arithmetic, or names itself as a
            base.
    """
    return _read(find_config_file(path), ())


def find_config_file(name: str, beside: str = "") -> str:
    """Finds a config file by its path, or by its name among those that aqdet ships or in Detectron2's model zoo.

    Args:
        name: The path or name.
        beside: The file that names it, for relative paths; ``""`` for the current folder.

    Raises:
        FileNotFoundError: In one line, if there is none.
        ValueError: In one line, if it is a folder, a pipe or a device.
    """
    source = f" (a {BASE_KEY} of {beside})" if beside else ""
    if name.startswith(_REMOTE):
        return name
    if name.startswith(Detectron2Handler.PREFIX):
        path, name = "", name.removeprefix(Detectron2Handler.PREFIX)
    else:
        path = os.path.join(os.path.dirname(beside), os.path.expanduser(name))
    if path and os.path.isdir(path):
        raise ValueError(f"config file {path!r}{source} is a folder: name a file in it")
    if path and os.path.isfile(path):
        return path
    if path and os.path.exists(path):
        raise ValueError(f"config file {path!r}{source} is a pipe or a device: write it to a file first")
    if not os.path.isabs(name):
        shipped = shipped_configs() if path else {}
        own = os.path.normpath(name).replace(os.sep, "/").removeprefix("configs/")
        if own in shipped:
            return str(shipped[own])
        zoo = _zoo()
        if name in zoo:
            return str(zoo[name])
        close = [
            near if near in shipped else f"{near} of Detectron2's model zoo"
            for near in difflib.get_close_matches(own, [*shipped, *zoo], 2, cutoff=0.75)
        ]
        did_you_mean = f"; did you mean {' or '.join(close)}?" if close else ""
        raise FileNotFoundError(f"config file {name!r}{source} does not exist{did_you_mean}")
    raise FileNotFoundError(f"config file {name!r}{source} does not exist")


def _zoo() -> dict[str, Path]:
    """Returns the YAML files of Detectron2's model zoo by their names."""
    from detectron2 import model_zoo  # imported only to look up a name, since it imports Detectron2's models

    return yaml_files(Path(model_zoo.__file__).parent / "configs")


def _read(path: str, above: tuple[str, ...]) -> dict[str, Any]:
    if path in above:
        raise ValueError(f"{path}: it is a {BASE_KEY} of itself, by way of {' and '.join(above)}")
    content = _parse(path)
    bases = content.pop(BASE_KEY, [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: {BASE_KEY} must be a file name or a list of them, got {bases!r:.80}")
    merged: dict[str, Any] = {}
    for base in bases:
        _merge(_read(find_config_file(base, path), (*above, path)), merged, path)
    _merge(content, merged, path)
    return merged


@functools.lru_cache(maxsize=256)
def _load(path: str, text: str) -> Any:
    """Parses the text of a file; not to be changed, since grids of trainings read the same files hundreds of times."""
    stream = io.StringIO(text)
    stream.name = path  # for error messages
    return yaml.load(stream, _ConfigLoader)  # a safe loader


def _parse(path: str) -> dict[str, Any]:
    if path.endswith(".py"):
        raise ValueError(
            f"{path}: a LazyConfig is Python, which this does not run: give a YAML file, or start it by a script of "
            "your own (configs/README.md)"
        )
    try:
        with PathManager.open(path, "r", encoding="utf-8") as file:
            content = copy.deepcopy(_load(path, file.read()))
    except yaml.constructor.ConstructorError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(
            f"{path}{place}: refused, it has an object tag that could run code: {error.problem}; write the value out "
            "as plain YAML"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid YAML, it is no text in UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not valid YAML, it is nested too deeply") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: it must hold KEY: VALUE, and is a {type(content).__name__}")
    return content


def _merge(values: dict[str, Any], into: dict[str, Any], path: str, prefix: str = "") -> None:
    """Overwrites the values of a base, key by key."""
    for key, value in values.items():
        if isinstance(value, dict) and key in into:
            if not isinstance(into[key], dict):
                raise ValueError(f"{path}: {prefix}{key} has keys below it, and is a value in the {BASE_KEY}")
            _merge(value, into[key], path, f"{prefix}{key}.")
        else:
            into[key] = value
