"""Checkpoints: loaded without running code, loaded strictly, saved atomically."""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

from ..modeling.scaffold.auxiliary import PREFIX, TRAINING_ONLY, detached_auxiliary, strip
from ..quantization import quantizers
from .torchvision import SCOPE

logger = logging.getLogger(__name__)

CLASSIFIER_KEY = "head.linear.weight"
_MAX_LISTED = 6
_NUMBERED = re.compile(r"model_\d{7}\.pth")
_ALLOWED_GLOBALS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


def _distinct(lines: list[str]) -> list[str]:
    """The first of the lines that differ in no more than the layer, each with the number of the others."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(re.sub(r"^\S*\.(?=\w+\.\w+ )", "", line), []).append(line)
    return [found[0] + f" (and {len(found) - 1} more)" * (len(found) > 1) for found in groups.values()][:_MAX_LISTED]


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers of numpy arrays and nothing else, which is all a model zoo file needs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def load_pickled_arrays(file: IO[bytes]) -> dict[str, Any]:
    """Reads a ``.pkl`` of Detectron2's or Caffe2's model zoo.

    Raises:
        pickle.UnpicklingError: if it is not a dict of containers, numbers, strings and numpy arrays.
    """
    data = _ArrayUnpickler(file, encoding="latin1").load()
    if not isinstance(data, dict):
        raise pickle.UnpicklingError(f"it is a {type(data).__name__}, not a dict")
    return data


def load_weights_file(path: str) -> dict[str, Any]:
    """``torch.load`` of a file that may hold tensors and plain containers only.

    Raises:
        OSError: if it cannot be read.
        ValueError: in one line, if it holds anything else or is damaged.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # Damaged input makes the unpickler raise almost anything.
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = "it is damaged or was not written by torch.save"
        if code:
            reason = f"it holds more than tensors and containers: {code.group(1)}"
        raise ValueError(f"checkpoint {path!r} is refused, {reason}") from error
    if not isinstance(data, dict):
        raise ValueError(f"checkpoint {path!r} holds no state dict but a {type(data).__name__}")
    return data


def save_atomically(data: Any, path: str) -> None:
    """``torch.save`` beside the target, flushed to disk, then renamed."""
    _write_atomically(path, lambda file: torch.save(data, file))


def _write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    aside = f"{path}.part"
    with open(aside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def damage_of(path: str) -> str:
    """What is wrong with a file of :func:`save_atomically`, by its checksums; "" if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return f"{wrong} has a wrong checksum" if wrong else ""


def _checksums(path: str) -> list[tuple[str, int]]:
    """Names and checksums of what a file of :func:`save_atomically` holds, as it notes them; empty without one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [(entry.filename, entry.CRC) for entry in archive.infolist()]
    except (OSError, zipfile.BadZipFile):
        return []


class AqdetCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, safe and strict.

    After loading, these may be missing: quantizer keys if the file has none (a float checkpoint), the
    auxiliary path, the extra head, BN's ``num_batches_tracked``, what ``allow_keys`` matches, and whatever lies
    outside the scope that the file declares (a converted backbone has ``{"aqdet": {"scope":
    ["backbone.bottom_up."]}}``). The auxiliary path and the extra head may also be unexpected. Anything else stops
    with a list. Of a classifier's file a detector takes the backbone with its quantizers.

    Args:
        allow_keys: regexes, ``CHECKPOINT.ALLOW_KEYS``.
        aux_init: ``"head"`` starts an auxiliary path that the file lacks from the detector's own head.
        allow_pickle: reads a model zoo's ``.pkl``, by :func:`load_pickled_arrays`; ``CHECKPOINT.ALLOW_PICKLE``.
        keep: how many files ``model_<iteration>.pth`` stay in ``save_dir``, ``CHECKPOINT.KEEP``; 0 for all.

    Raises:
        ValueError: for a regex or a number that is not valid.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        allow_keys: Sequence[str] = (),
        aux_init: str = "random",
        allow_pickle: bool = False,
        keep: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, save_dir, **kwargs)
        try:
            self._allow = [re.compile(pattern) for pattern in allow_keys]
        except re.error as error:
            raise ValueError(f"CHECKPOINT.ALLOW_KEYS: {error.pattern!r} is no regex: {error}") from error
        if keep < 0:
            raise ValueError(f"CHECKPOINT.KEEP must be 0, for all, or more, got {keep}")
        self._aux_init = aux_init
        self._allow_pickle = allow_pickle
        self._keep = keep

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``name.pth`` in ``save_dir``, whole or not at all, and marks it as the last one."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()}, **kwargs)
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        logger.info("Saving checkpoint to %s", path)
        save_atomically(data, path)
        self.tag_last_checkpoint(basename)
        if self._keep and _NUMBERED.fullmatch(basename):
            older = self._numbered_before(basename)
            for outdated in older[: max(len(older) + 1 - self._keep, 0)]:
                os.remove(os.path.join(self.save_dir, outdated))

    def _numbered_before(self, basename: str) -> list[str]:
        """Checkpoints of earlier iterations, oldest first; of all iterations if ``basename`` has none in its name."""
        numbered = sorted(name for name in os.listdir(self.save_dir) if _NUMBERED.fullmatch(name))
        return [name for name in numbered if name < basename or not _NUMBERED.fullmatch(basename)]

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """See Detectron2's; what a resume continues from is :meth:`file_to_resume`.

        Raises:
            ValueError: as :meth:`file_to_resume` and :meth:`load`.
        """
        chosen = self.file_to_resume() if resume else ""
        return self.load(chosen) if chosen else self.load(path, checkpointables=[])

    def file_to_resume(self) -> str:
        """The checkpoint to continue from, "" if there is none; damaged or missing ones are passed over and named.

        The main process decides for all, which all have to call this: another one may have no file, or that of an
        earlier run, where ``save_dir`` is on a disk of its node.

        Raises:
            ValueError: in all processes, if there are checkpoints and none is whole, or if the chosen one is not the
                same file in each process.
        """
        found = self.has_checkpoint()
        chosen = self._newest_whole() if found and comm.is_main_process() else ""
        found, chosen = comm.all_gather((found, chosen))[0]
        if not found:
            return ""
        if not chosen:
            raise ValueError(
                f"no checkpoint in {self.save_dir!r} is whole: start without --resume, or put a whole one there and "
                "its name into the file last_checkpoint"
            )
        chosen = os.path.join(self.save_dir, chosen)
        contents = comm.all_gather(_checksums(chosen))
        other = [rank for rank, content in enumerate(contents) if content != contents[0]]
        if other:
            raise ValueError(
                f"process {other[0]} does not find checkpoint {chosen!r}, which the main process is to continue from: "
                "OUTPUT_DIR must be on storage that all nodes share"
            )
        return chosen

    def _newest_whole(self) -> str:
        """Name of the newest file without damage, "" if there is none."""
        last = os.path.basename(self.get_checkpoint_file())
        for name in [last, *reversed(self._numbered_before(last))]:
            path = os.path.join(self.save_dir, name)
            damage = damage_of(path)
            if not damage:
                return name
            logger.warning("Checkpoint %s is damaged (%s): trying the one before", path, damage)
        return ""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Notes which file a resume starts from."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        _write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def forget_last_checkpoint(self) -> None:
        """Puts aside the note of an earlier run in the same folder, so that no resume mixes the two."""
        if self.save_to_disk and self.has_checkpoint():
            path = os.path.join(self.save_dir, "last_checkpoint")
            logger.warning(
                "%s holds an earlier run, last %s, which this one does not continue (--resume would): its note is "
                "kept as last_checkpoint.old",
                self.save_dir,
                os.path.basename(self.get_checkpoint_file()),
            )
            os.replace(path, f"{path}.old")

    def save_stripped(self, name: str) -> None:
        """Writes the detector alone, without auxiliary path and training state, as ``name.pth``."""
        if self.save_dir and self.save_to_disk:
            path = os.path.join(self.save_dir, f"{name}.pth")
            save_atomically({"model": strip(self.model.state_dict())}, path)
            logger.info("Saved the stripped detector to %s", path)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See Detectron2's.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: in one line, if the file holds code, is damaged, or does not fit the model.
        """
        self._path = path
        if path and "://" in path:
            try:
                path = self.path_manager.get_local_path(path)
            except (OSError, RuntimeError) as error:
                raise ValueError(f"checkpoint {self._path!r} cannot be fetched: {error}") from error
        if path and not os.path.isfile(path):
            raise FileNotFoundError(
                f"checkpoint {self._path!r} does not exist (MODEL.WEIGHTS, or what --resume continues from)"
            )
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        data = self._load_zoo(filename) if filename.endswith(".pkl") else load_weights_file(filename)
        data = data if "model" in data else {"model": data}
        model = data["model"]
        if not isinstance(model, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor | np.ndarray) for key, value in model.items()
        ):
            raise ValueError(f"checkpoint {self._path!r} holds no state dict of tensors")
        return data

    def _load_zoo(self, filename: str) -> dict[str, Any]:
        if not self._allow_pickle:
            raise ValueError(
                f"checkpoint {self._path!r} is refused, it is a pickle: CHECKPOINT.ALLOW_PICKLE True reads one that "
                "holds only arrays, as a model zoo's do"
            )
        try:
            with open(filename, "rb") as file:
                data = load_pickled_arrays(file)
        except OSError:
            raise
        except Exception as error:  # Damaged input makes the unpickler raise almost anything.
            reason = " ".join(str(error).split())
            raise ValueError(f"checkpoint {self._path!r} is refused, it must hold only arrays: {reason}") from error
        if "model" in data and "__author__" in data:
            return data
        data = data.get("blobs", data)
        model = {key: v for key, v in data.items() if not key.endswith("_momentum")}
        return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        scope = self._scope(checkpoint)
        if checkpoint.get("matching_heuristics"):
            scope = (SCOPE,)
        if CLASSIFIER_KEY in checkpoint["model"] and CLASSIFIER_KEY not in self.model.state_dict():
            scope = self._keep_backbone(checkpoint)
        stored = set(checkpoint["model"])
        try:
            if checkpoint.get("matching_heuristics"):
                # By suffix: a copy of trunk stages in the auxiliary path would make a match ambiguous.
                with detached_auxiliary(self.model):
                    incompatible = super()._load_model(checkpoint)
            else:
                incompatible = super()._load_model(checkpoint)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
            raise ValueError(f"checkpoint {self._path!r}: {'; '.join(_distinct(lines)) or error}") from error
        self._check(incompatible, stored, scope)
        self._start_auxiliary(stored - {key for key, *_ in incompatible.incorrect_shapes})
        return _IncompatibleKeys([], [], [])

    def _keep_backbone(self, checkpoint: dict[str, Any]) -> tuple[str, ...]:
        """Leaves of a classifier's file what a detector has, and returns its scope."""
        model = checkpoint["model"]
        checkpoint["model"] = {key: value for key, value in model.items() if key.startswith(SCOPE)}
        count = len(model) - len(checkpoint["model"])
        logger.info("%s is of a classifier: %d keys of its head and auxiliary path are left out", self._path, count)
        return (SCOPE,)

    def _scope(self, checkpoint: dict[str, Any]) -> tuple[str, ...]:
        """Prefixes of the keys that a file is about, if it says so."""
        entry = checkpoint.get("aqdet", {})
        scope = entry.get("scope", []) if isinstance(entry, dict) else None
        if not isinstance(scope, list | tuple) or not all(isinstance(prefix, str) for prefix in scope):
            raise ValueError(
                f'checkpoint {self._path!r}: its entry "aqdet" must be {{"scope": [key prefixes]}}, got {entry!r:.100}'
            )
        return tuple(scope)

    def _check(self, incompatible: _IncompatibleKeys, stored: set[str], scope: tuple[str, ...]) -> None:
        names = {name for name, _ in quantizers(self.model)}
        quantizer_keys = {key for key in self.model.state_dict() if key.rpartition(".")[0] in names}
        stored_quantizers = {k for k in stored if re.search(r"quantizer\.(calibrated|num_bits)$", k)}
        counts: dict[str, int] = {}
        problems = []

        def sort(kind: str, key: str, detail: str = "") -> None:
            group = ""
            if key.startswith(TRAINING_ONLY) and kind != "of another shape":
                group = "of the auxiliary path" if key.startswith(PREFIX) else "of the extra head"
            elif kind == "missing" and key in quantizer_keys and not stored_quantizers:
                group = "of quantizers, to be calibrated"
            elif kind == "missing" and key.endswith("num_batches_tracked"):
                group = "num_batches_tracked"
            elif any(pattern.search(key) for pattern in self._allow):
                group = "allowed by CHECKPOINT.ALLOW_KEYS"
            elif scope and kind == "missing" and not key.startswith(scope):
                group = f"outside the file's scope ({', '.join(scope)})"
            elif scope and kind == "unexpected" and key.startswith(("stem.fc", "fc", "pred", "linear")):
                group = "of the classifier"
            if group:
                name = f"{kind} {group}"
                counts[name] = counts.get(name, 0) + 1
            else:
                problems.append(f"{kind} {key}{detail}")

        for key, theirs, ours in incompatible.incorrect_shapes:
            sort("of another shape", key, f" {tuple(theirs)} in the file, {tuple(ours)} in the model")
        for key in incompatible.unexpected_keys:
            sort("unexpected", key)
        # A key of another shape is not loaded, and listed as missing too.
        reshaped = {key for key, *_ in incompatible.incorrect_shapes}
        for key in incompatible.missing_keys:
            if key not in reshaped:
                sort("missing", key)
        if problems:
            hint = "CHECKPOINT.ALLOW_KEYS takes regexes of keys that may differ"
            if any(re.match(r"layer1\.0\.(conv1|bn1)\.", key) for key in stored):
                hint = "a torchvision ResNet goes through tools/convert_torchvision.py first"
            elif len(problems) > _MAX_LISTED and any("backbone." in problem for problem in problems):
                hint = "it is of another structure, as of another MODEL.RESNETS.DEPTH"
            if stored_quantizers and not quantizer_keys:
                hint = "the file is of a quantized detector, and MODEL.QUANT.ENABLED is False"
            more = f"; and {len(problems) - _MAX_LISTED} more" * (len(problems) > _MAX_LISTED)
            raise ValueError(
                f"checkpoint {self._path!r} does not fit the model: {'; '.join(problems[:_MAX_LISTED])}{more} ({hint})"
            )
        skipped = len(incompatible.unexpected_keys) + len(incompatible.incorrect_shapes)
        logger.info("Loaded %d keys from %s", len(stored) - skipped, self._path)
        for name, count in counts.items():
            logger.info("  %d keys %s", count, name)

    def _start_auxiliary(self, stored: set[str]) -> None:
        model = self.model
        path = getattr(model, "auxiliary", None)
        has_head = any(key.startswith("head.") for key in stored)
        if path is None:
            return
        keys = {key for key in path.state_dict() if not key.endswith("num_batches_tracked")}
        trained = {key for key in keys if f"{PREFIX}{key}" in stored}
        if keys == trained:
            return
        if self._aux_init != "head" or not has_head:
            logger.info("The auxiliary path, or what the file lacks of it, starts at random")
            return
        missing = path.initialize_from(model, trained)
        if missing:
            logger.warning(
                "The auxiliary path, or what the file lacks of it, starts at random: the detector has nothing like its "
                "%s (%d keys differ; is MODEL.AUX.NORM the norm of the detector?)",
                missing[0],
                len(missing),
            )
        elif trained:
            logger.warning(
                "The auxiliary path of the file is of another MODEL.AUX.TAPS or structure: %d of its keys go on as "
                "they are, the rest (%s, ...) starts from the detector's own layers",
                len(trained),
                min(keys - trained),
            )
        else:
            logger.info("The auxiliary path starts from the detector's own layers")
