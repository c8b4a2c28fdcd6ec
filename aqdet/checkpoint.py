"""Checkpoints: loaded without running code, loaded strictly, saved atomically."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Sequence
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

from .modeling.auxiliary import PREFIX, detached_auxiliary, strip
from .quantization import quantizers

logger = logging.getLogger(__name__)

_MAX_LISTED = 20
_ALLOWED_GLOBALS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"))
    ),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers of numpy arrays and nothing else, which is all a model zoo file needs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def load_pickled_arrays(file: IO[bytes]) -> dict[str, Any]:
    """Reads a ``.pkl`` of Detectron2's or Caffe2's model zoo.

    Raises:
        pickle.UnpicklingError: if it holds anything but containers, numbers, strings and numpy arrays.
    """
    return _ArrayUnpickler(file, encoding="latin1").load()


def load_weights_file(path: str) -> dict[str, Any]:
    """``torch.load`` of a file that may hold tensors and plain containers only.

    Raises:
        ValueError: in one line, if it holds anything else or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        found = re.search(r"(Unsupported|GLOBAL)[^\n]*", str(error))
        lines = str(error).splitlines() or [type(error).__name__]
        reason = f"it holds more than tensors: {found.group()}" if found else f"it is damaged: {lines[0]}"
        raise ValueError(f"checkpoint {path!r} is refused, {reason}") from error


def save_atomically(data: Any, path: str) -> None:
    """``torch.save`` beside the target, flushed to disk, then renamed."""
    aside = f"{path}.part"
    with open(aside, "wb") as file:
        torch.save(data, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


class AqdetCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, safe and strict.

    After loading, these may be missing: quantizer keys if the file has none (a float checkpoint), the
    auxiliary path, BN's ``num_batches_tracked``, what ``allow_keys`` matches, and whatever lies outside the
    scope that the file declares (a converted backbone has ``{"aqdet": {"scope": ["backbone.bottom_up."]}}``).
    The auxiliary path may also be unexpected. Anything else stops with a list.

    Args:
        allow_keys: regexes, ``CHECKPOINT.ALLOW_KEYS``.
        aux_init: ``"head"`` starts an auxiliary path that the file lacks from the detector's own head.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        allow_keys: Sequence[str] = (),
        aux_init: str = "random",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, save_dir, **kwargs)
        self._allow = [re.compile(pattern) for pattern in allow_keys]
        self._aux_init = aux_init

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
        if path and "://" not in path and not os.path.isfile(path):
            raise FileNotFoundError(f"checkpoint {path!r} does not exist (MODEL.WEIGHTS, or --resume)")
        self._path = path
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith(".pkl"):
            data = load_weights_file(filename)
            return data if "model" in data else {"model": data}
        try:
            with open(filename, "rb") as file:
                data = load_pickled_arrays(file)
        except (pickle.UnpicklingError, EOFError, ValueError) as error:
            raise ValueError(f"checkpoint {filename!r} is refused, it must hold only arrays: {error}") from error
        if "model" in data and "__author__" in data:
            return data
        data = data.get("blobs", data)
        model = {key: v for key, v in data.items() if not key.endswith("_momentum")}
        return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        scope = tuple(checkpoint.get("aqdet", {}).get("scope", ()))
        if checkpoint.get("matching_heuristics"):
            scope = ("backbone.bottom_up.",)
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
            raise ValueError(f"checkpoint {self._path!r}: {'; '.join(lines) or error}") from error
        self._check(incompatible, stored, scope)
        self._start_auxiliary(stored)
        return _IncompatibleKeys([], [], [])

    def _check(self, incompatible: _IncompatibleKeys, stored: set[str], scope: tuple[str, ...]) -> None:
        names = [name for name, _ in quantizers(self.model)]
        quantizer_keys = {key for key in self.model.state_dict() if key.rpartition(".")[0] in names}
        stored_quantizers = {k for k in stored if re.search(r"quantizer\.(calibrated|num_bits)$", k)}
        counts: dict[str, int] = {}
        problems = []

        def sort(kind: str, key: str, detail: str = "") -> None:
            group = ""
            if key.startswith(PREFIX):
                group = "of the auxiliary path"
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

        for key in incompatible.missing_keys:
            sort("missing", key)
        for key in incompatible.unexpected_keys:
            sort("unexpected", key)
        for key, theirs, ours in incompatible.incorrect_shapes:
            sort("shape", key, f" {tuple(theirs)} in the file, {tuple(ours)} in the model")
        if problems:
            hint = "CHECKPOINT.ALLOW_KEYS takes regexes of keys that may differ"
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
        if path is None or any(key.startswith(PREFIX) for key in stored):
            return
        if self._aux_init == "head" and has_head:
            path.initialize_from(model.head)
            logger.info("The auxiliary head starts as a copy of the detector's own head")
        else:
            logger.info("The auxiliary path starts at random")
