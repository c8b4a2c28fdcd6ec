"""Golden vectors of an exported detector: values computed at the export, to be compared on another machine.

``golden.npz`` in the folder holds, for one small image:

- ``image``: ``(H, W, 3)`` uint8 in BGR order, the input of a detector that does not resize it.
- ``input``: ``(1, 3, h, w)`` uint8, the network's input that is made from it.
- ``codes/NAME``: integer values of the tensor NAME inside the network, for a few layers.
- ``outputs/NAME``: float32 values of each output of the network.
- ``boxes``, ``scores``, ``classes`` and, where there are masks, ``masks``: the detections, see
  :class:`~aqdet.runtime.Detections`.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..utils.files import replacing
from .decode import Detections
from .detector import Detector
from .preprocess import make_batch

GOLDEN = "golden.npz"
_CODES, _OUTPUTS = "codes/", "outputs/"
# Detections are decoded with NumPy's exponential of float64. It may differ in the last bit between machines, which
# changes the float32 value that it is rounded to in one of many millions of cases.
_SCORE_TOLERANCE = 1e-5
_BOX_TOLERANCE = 1e-2
_MASK_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison of a self-test.

    Attributes:
        what: The name of the compared values.
        passed: Whether they are as they were at the export.
        text: The finding in words.
    """

    what: str
    passed: bool
    text: str


def write_golden(folder: str | os.PathLike[str], image: np.ndarray, layers: Sequence[str] = ()) -> None:
    """Runs an exported detector on an image and writes the computed values to ``golden.npz`` in its folder.

    Args:
        folder: A finished export. Call :func:`~aqdet.runtime.write_description` afterwards to record the checksum of
            the new file.
        image: ``(H, W, 3)`` uint8 in BGR order; it should be small, since the file holds all outputs.
        layers: Names of tensors of ``model.onnx`` whose codes are written, too.
    """
    detector = Detector(folder, size=0)
    batch, _ = make_batch([image], detector.description)
    found = detector(image)
    arrays = {"image": image, "input": batch, **{k: v for k, v in vars(found).items() if v is not None}}
    arrays |= {_OUTPUTS + name: value for name, value in _outputs(detector, batch).items()}
    if layers:
        arrays |= {_CODES + name: value for name, value in zip(layers, detector.tensors(layers, batch), strict=True)}
    with replacing(Path(folder) / GOLDEN, keep_ending=True) as aside:
        np.savez_compressed(aside, allow_pickle=False, **arrays)


def self_test(
    folder: str | os.PathLike[str], *, threads: int | None = None, provider: str = "CPUExecutionProvider"
) -> list[Check]:
    """Compares the values that an exported detector computes on this machine with its golden vectors.

    Integer codes and the network's outputs have to be equal to the bit. Number, classes and order of the detections
    have to be equal, and their scores and boxes up to the rounding of float32.

    Args:
        folder: The exported detector.
        threads, provider: See :class:`~aqdet.runtime.Detector`.

    Raises:
        FileNotFoundError, ValueError: In one line, if the folder has no golden vectors, they cannot be read, or the
            detector cannot be loaded.
    """
    path = Path(folder) / GOLDEN
    detector = Detector(folder, threads=threads, provider=provider, size=0)
    golden = _read(path)
    checks = [Check("files", True, f"{folder}: as exported")]
    batch, _ = make_batch([golden["image"]], detector.description)
    checks.append(compare_arrays("network input", batch, golden["input"]))
    layers = [name.removeprefix(_CODES) for name in golden if name.startswith(_CODES)]
    if layers:
        for name, value in zip(layers, detector.tensors(layers, golden["input"]), strict=True):
            checks.append(compare_arrays(f"codes of {name}", value, golden[_CODES + name]))
    for name, value in _outputs(detector, golden["input"]).items():
        if _OUTPUTS + name not in golden:
            raise ValueError(f"{path}: lacks {_OUTPUTS + name}, of another model: export the model again")
        checks.append(compare_arrays(f"output {name}", value, golden[_OUTPUTS + name]))
    expected = Detections(golden["boxes"], golden["scores"], golden["classes"], golden.get("masks"))
    checks.append(_detections(detector(golden["image"]), expected))
    return checks


def _outputs(detector: Detector, batch: np.ndarray) -> dict[str, np.ndarray]:
    names = [name for level in detector.description.levels for name in level.outputs]
    values = [value for level in detector.run(batch) for value in level]
    return dict(zip(names, values, strict=True))


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the folder has no golden vectors, export the model again")
    try:
        with np.load(path, allow_pickle=False) as file:
            golden = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged: copy the whole folder again, or export the model again") from error
    missing = {"image", "input", "boxes", "scores", "classes"} - set(golden)
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}: export the model again")
    return golden


def compare_arrays(what: str, found: np.ndarray, expected: np.ndarray) -> Check:
    """Compares arrays to the bit and counts the values that differ; ``what`` names them."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        shapes = f"{found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}"
        return Check(what, False, shapes)
    different = found != expected
    count = int(np.count_nonzero(different))
    if not count:
        return Check(what, True, f"{found.size:,} values equal")
    largest = np.abs(found[different].astype(np.float64) - expected[different].astype(np.float64)).max()
    return Check(what, False, f"{count:,} of {found.size:,} values differ, by at most {largest:g}")


def _detections(found: Detections, expected: Detections) -> Check:
    what = "detections"
    if len(found) != len(expected):
        return Check(what, False, f"{len(found)}, expected {len(expected)}")
    other = int(np.count_nonzero(found.classes != expected.classes))
    scores = float(np.abs(found.scores - expected.scores).max(initial=0))
    boxes = float(np.abs(found.boxes - expected.boxes).max(initial=0))
    passed = not other and scores <= _SCORE_TOLERANCE and boxes <= _BOX_TOLERANCE
    text = f"{len(found)} found, {other} of another class; scores differ by at most {scores:.1g}, boxes by {boxes:.1g}"
    text += " pixels"
    if expected.masks is not None:
        masks = np.zeros_like(expected.masks) if found.masks is None else found.masks
        if masks.shape != expected.masks.shape:
            return Check(what, False, f"masks {masks.shape}, expected {expected.masks.shape}")
        pixels = int(np.count_nonzero(masks != expected.masks))
        passed = bool(passed and pixels <= _MASK_TOLERANCE * np.count_nonzero(expected.masks))
        text += f", masks in {pixels} of {np.count_nonzero(expected.masks)}"
    return Check(what, passed, text)
