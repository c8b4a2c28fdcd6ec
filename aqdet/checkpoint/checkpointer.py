"""The checkpointer, which loads strictly and without running code, and saves complete files or none."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

from ..modeling.config_requests import CHECKPOINTER_KEYS, acknowledge
from ..modeling.scaffold import AUXILIARY_PREFIX, strip, without_scaffold
from ..utils.files import open_replacing
from .earlier import earlier_checkpoints, note_earlier
from .files import CAFFE2, checksums, damage_of, local_path_of, read_checkpoint, save_atomically
from .keys import (
    MAX_LISTED,
    MISSING,
    OTHER_SHAPE,
    UNEXPECTED,
    Difference,
    KeyComparison,
    not_finite,
    shapes_of,
    without_wrapper,
)
from .norms import add_folded_statistics, folded_norms
from .torchvision import SCOPE

logger = logging.getLogger(__name__)

CLASSIFIER_KEY = "head.linear.weight"
_NUMBERED = re.compile(r"model_\d{7}\.pth")
CLASSES_KEY = "classes"
"""Key of the names of the classes in a checkpoint."""


def _distinct(lines: list[str]) -> list[str]:
    """Returns the lines that differ in more than the layer's name, each with the number of those left out."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(re.sub(r"^\S*\.(?=\w+\.\w+ )", "", line), []).append(line)
    return [found[0] + f" (and {len(found) - 1} more)" * (len(found) > 1) for found in groups.values()][:MAX_LISTED]


class AqdetCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, safe and strict.

    A file may lack these keys of the model: quantizers if it has none (a float checkpoint), the auxiliary path, the
    extra head, BN's ``num_batches_tracked``, keys that ``allow_keys`` matches, and keys outside the scope that the file
    declares (a converted backbone has ``{"aqdet": {"scope": ["backbone.bottom_up."]}}``). It may have an auxiliary path
    and an extra head that the model lacks. Any other difference is an error with a list. A detector takes the backbone
    with its quantizers from a classifier's file.

    Args:
        allow_keys: Regexes, ``CHECKPOINT.ALLOW_KEYS``.
        aux_init: ``"head"`` starts an auxiliary path that the file lacks from the detector's own head.
        allow_pickle: Whether to read a model zoo's ``.pkl``, by :func:`load_pickled_arrays`;
            ``CHECKPOINT.ALLOW_PICKLE``.
        keep: The number of files ``model_<iteration>.pth`` that stay in ``save_dir``, ``CHECKPOINT.KEEP``; 0 for all.
        classes: The names of the classes, in their order, which files then hold as ``"classes"``; None if not known.

    Raises:
        ValueError: If a regex or a number is not valid.
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
        classes: Sequence[str] | None = None,
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
        self._facts = {} if classes is None else {CLASSES_KEY: [str(name) for name in classes]}
        self._exact = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``name.pth`` into ``save_dir``, completely or not at all, and marks it as the last checkpoint."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **self._facts}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()}, **kwargs)
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        logger.info("Saving checkpoint to %s", path)
        save_atomically(data, path)
        if basename in (earlier := earlier_checkpoints(self.save_dir)):
            note_earlier(self.save_dir, [name for name in earlier if name != basename])
        self.tag_last_checkpoint(basename)
        if self._keep and _NUMBERED.fullmatch(basename):
            older = self._numbered_before(basename)
            for outdated in older[: max(len(older) + 1 - self._keep, 0)]:
                os.remove(os.path.join(self.save_dir, outdated))

    def _numbered_before(self, basename: str) -> list[str]:
        """Returns checkpoints of earlier iterations, oldest first; of all iterations if ``basename`` has no number.

        Those that an earlier run has left in the folder are no part of them.
        """
        others = set(earlier_checkpoints(self.save_dir))
        numbered = sorted(
            name for name in os.listdir(self.save_dir) if _NUMBERED.fullmatch(name) and name not in others
        )
        return [name for name in numbered if name < basename or not _NUMBERED.fullmatch(basename)]

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """See Detectron2's method; a resume continues from :meth:`file_to_resume`.

        Raises:
            ValueError: As :meth:`file_to_resume` and :meth:`load` do.
        """
        chosen = self.file_to_resume() if resume else ""
        return self.resume(chosen) if chosen else self.load(path, checkpointables=[])

    def resume(self, path: str) -> dict[str, Any]:
        """Loads a checkpoint to go on from, which has to be of the same model.

        Unlike at a start, no key may differ, whatever ``allow_keys`` says, because the file's optimizer state belongs
        to the parameters that the model had.

        Args:
            path: The result of :meth:`file_to_resume`.

        Returns:
            What :meth:`load` does.

        Raises:
            ValueError: As :meth:`load` does.
        """
        self._exact = True
        try:
            return self.load(path)
        finally:
            self._exact = False

    def file_to_resume(self) -> str:
        """Returns the checkpoint to continue from, "" if there is none; warns of damaged or missing ones.

        All processes have to call this, and the main process decides for all: if ``save_dir`` is on a disk of its node,
        another process may have no file, or one of an earlier run.

        Raises:
            ValueError: In all processes, if there are checkpoints and all are damaged, or if the chosen one is not the
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
        contents = comm.all_gather(checksums(chosen))
        other = [rank for rank, content in enumerate(contents) if content != contents[0]]
        if other:
            raise ValueError(
                f"process {other[0]} does not find checkpoint {chosen!r}, which the main process is to continue from: "
                "OUTPUT_DIR must be on storage that all nodes share"
            )
        return chosen

    def _newest_whole(self) -> str:
        """Returns the name of the newest undamaged file, "" if there is none."""
        last = os.path.basename(self.get_checkpoint_file())
        for name in [last, *reversed(self._numbered_before(last))]:
            path = os.path.join(self.save_dir, name)
            damage = damage_of(path)
            if not damage:
                return name
            logger.warning("Checkpoint %s is damaged (%s): trying the one before", path, damage)
        return ""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Records the file that a resume starts from."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        with open_replacing(path, durable=True) as file:
            file.write(last_filename_basename)

    def forget_last_checkpoint(self) -> None:
        """Renames an earlier run's record in the same folder and notes its files, so that no resume mixes the runs."""
        if self.save_to_disk and self.has_checkpoint():
            path = os.path.join(self.save_dir, "last_checkpoint")
            logger.warning(
                "%s holds an earlier run, last %s, which this one does not continue (--resume would): its note is "
                "kept as last_checkpoint.old",
                self.save_dir,
                os.path.basename(self.get_checkpoint_file()),
            )
            note_earlier(self.save_dir, sorted(n for n in os.listdir(self.save_dir) if _NUMBERED.fullmatch(n)))
            os.replace(path, f"{path}.old")

    def save_stripped(self, name: str) -> None:
        """Writes the detector, without auxiliary path and training state, as ``name.pth``."""
        if self.save_dir and self.save_to_disk:
            path = os.path.join(self.save_dir, f"{name}.pth")
            save_atomically({"model": strip(self.model.state_dict()), **self._facts}, path)
            logger.info("Saved the stripped detector to %s", path)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See Detectron2's method.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: In one line, if the file cannot be fetched, holds code, is damaged, or does not fit the model.
        """
        self._path = path
        if path.endswith(".pkl") and not self._allow_pickle:
            raise ValueError(
                f"checkpoint {path!r} is refused, it is a pickle: CHECKPOINT.ALLOW_PICKLE True reads one that "
                "holds only arrays, as a model zoo's do"
            )
        path = local_path_of(path)
        if os.path.isdir(path):
            raise ValueError(f"checkpoint {self._path!r} is a folder: name a file in it (MODEL.WEIGHTS)")
        if path and not os.path.isfile(path):
            raise FileNotFoundError(
                f"checkpoint {self._path!r} does not exist (MODEL.WEIGHTS, or what --resume continues from)"
            )
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_checkpoint(filename, self._path)

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        checkpoint["model"], wrapper = without_wrapper(checkpoint["model"], self.model)
        if wrapper:
            logger.info("%s: its keys are read without %r at their beginning", self._path, wrapper)
        broken = not_finite(checkpoint["model"])
        if broken:
            raise ValueError(
                f"checkpoint {self._path!r} has values that are not finite, {'; '.join(broken[:3])}"
                f"{f' and {len(broken) - 3} more keys' if len(broken) > 3 else ''}: the training that wrote it has "
                "diverged, start from an earlier checkpoint"
            )
        scope = self._scope(checkpoint)
        if checkpoint.pop("matching_heuristics", False):
            scope = self._rename(checkpoint) or scope
        if CLASSIFIER_KEY in checkpoint["model"] and CLASSIFIER_KEY not in self.model.state_dict():
            scope = self._keep_backbone(checkpoint)
        self._convert_ndarray_to_tensor(checkpoint["model"])
        folded = folded_norms(self.model, checkpoint["model"])
        if folded:
            logger.warning(
                "%s has the running statistics of %d batch norms (%s, ...) folded into their weights: they are 0 and "
                "1. In training BN normalizes by its batches, which these weights were not trained for; FrozenBN, "
                "and BN in evaluation, compute what they were trained to",
                self._path,
                len(folded),
                folded[0],
            )
        stored = shapes_of(checkpoint["model"])
        try:
            incompatible = super()._load_model(checkpoint)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
            raise ValueError(f"checkpoint {self._path!r}: {'; '.join(_distinct(lines)) or error}") from error
        self._check(incompatible, stored, scope)
        self._start_auxiliary(set(stored) - {key for key, *_ in incompatible.incorrect_shapes})
        return _IncompatibleKeys([], [], [])

    def _rename(self, checkpoint: dict[str, Any]) -> tuple[str, ...]:
        """Renames the keys of a file to the model's keys that end in them; returns the scope of a backbone's file.

        The path's keys are left out of the match, since its copy of trunk stages would make suffixes ambiguous.
        """
        self._convert_ndarray_to_tensor(checkpoint["model"])
        with without_scaffold(self.model):
            ours = self.model.state_dict()
            is_caffe2 = checkpoint.get("__author__") == CAFFE2
            renamed = align_and_update_state_dicts(ours, checkpoint["model"], c2_conversion=is_caffe2)
        add_folded_statistics(self.model, renamed)
        checkpoint["model"] = renamed
        return (SCOPE,) if all(key.startswith(SCOPE) for key in renamed if key in ours) else ()

    def _keep_backbone(self, checkpoint: dict[str, Any]) -> tuple[str, ...]:
        """Removes all but the backbone's keys from a classifier's file, and returns its scope."""
        model = checkpoint["model"]
        checkpoint["model"] = {key: value for key, value in model.items() if key.startswith(SCOPE)}
        count = len(model) - len(checkpoint["model"])
        logger.info("%s is of a classifier: %d keys of its head and auxiliary path are left out", self._path, count)
        return (SCOPE,)

    def _scope(self, checkpoint: dict[str, Any]) -> tuple[str, ...]:
        """Returns the prefixes of the keys that a file covers, if it declares them."""
        entry = checkpoint.get("aqdet", {})
        scope = entry.get("scope", []) if isinstance(entry, dict) else None
        if not isinstance(scope, list | tuple) or not all(isinstance(prefix, str) for prefix in scope):
            raise ValueError(
                f'checkpoint {self._path!r}: its entry "aqdet" must be {{"scope": [key prefixes]}}, got {entry!r:.100}'
            )
        return tuple(scope)

    def _check(self, incompatible: _IncompatibleKeys, stored: dict[str, tuple[int, ...]], scope: Sequence[str]) -> None:
        comparison = KeyComparison(self.model, stored, allow=self._allow, scope=scope, exact=self._exact)
        for key, theirs, ours in incompatible.incorrect_shapes:
            comparison.add(Difference(OTHER_SHAPE, key, (tuple(theirs), tuple(ours))))
        for key in incompatible.unexpected_keys:
            comparison.add(Difference(UNEXPECTED, key))
        # A key of another shape is not loaded, and is listed as missing, too.
        reshaped = {key for key, *_ in incompatible.incorrect_shapes}
        for key in incompatible.missing_keys:
            if key not in reshaped:
                comparison.add(Difference(MISSING, key))
        if comparison.problems:
            purpose = " that --resume is to go on with" if self._exact else ""
            raise ValueError(f"checkpoint {self._path!r} does not fit the model{purpose}: {comparison.describe()}")
        skipped = len(incompatible.unexpected_keys) + len(incompatible.incorrect_shapes)
        logger.info("Loaded %d keys from %s", len(stored) - skipped, self._path)
        for name, count in comparison.allowed.items():
            logger.info("  %d keys %s", count, name)

    def _start_auxiliary(self, stored: set[str]) -> None:
        model = self.model
        path = getattr(model, "auxiliary", None)
        has_head = any(key.startswith(("head.", "roi_heads.")) for key in stored)
        if path is None:
            return
        keys = {key for key in path.state_dict() if not key.endswith("num_batches_tracked")}
        trained = {key for key in keys if f"{AUXILIARY_PREFIX}{key}" in stored}
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


def build_checkpointer(cfg: CfgNode, model: nn.Module, **checkpointables: Any) -> AqdetCheckpointer:
    """Builds the checkpointer of a config, which saves in ``OUTPUT_DIR``.

    Args:
        cfg: The config.
        model: The model; it may be wrapped for distribution.
        checkpointables: Objects that are saved and resumed with it.
    """
    acknowledge(model, *CHECKPOINTER_KEYS)
    trained = [MetadataCatalog.get(name).get("thing_classes") for name in cfg.DATASETS.TRAIN if name in DatasetCatalog]
    return AqdetCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        allow_keys=cfg.CHECKPOINT.ALLOW_KEYS,
        aux_init=cfg.MODEL.AUX.INIT,
        allow_pickle=cfg.CHECKPOINT.ALLOW_PICKLE,
        keep=cfg.CHECKPOINT.KEEP,
        classes=trained[0] if trained else None,
        **checkpointables,
    )
