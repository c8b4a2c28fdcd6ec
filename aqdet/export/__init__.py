"""Export of a trained detector: integer program, integer reference, ONNX, proofs and reports.

:func:`aqdet.export.folder.export_detector` writes a folder:

- ``model.onnx``: the network on integers (:mod:`~aqdet.export.onnx_graph`), weights packed into their bits
  (:mod:`~aqdet.export.packed_weights`); its ``metadata_props`` hold what ``detector.json`` says.
- ``box.onnx``, ``mask.onnx``, of a two-stage detector: its heads for regions, behind RoiAlign in float
  (:mod:`~aqdet.export.region_graph`).
- ``model.end_to_end.onnx``, if asked for: pixels to detections (:mod:`~aqdet.export.end_to_end`).
- ``model.qonnx.onnx``, if asked for: QONNX with the true bit widths (:mod:`~aqdet.export.qonnx_graph`).
- ``detector.c``, ``detector.h``, if asked for: plain C (:mod:`~aqdet.export.c_source`).
- ``golden.npz``: ``image``, ``input``, ``codes/NAME``, ``outputs/NAME``, ``boxes``, ``scores``, ``classes``: the values
  that the detector computes for one image, not resized, for the self-test of :mod:`aqdet.runtime`.
- ``detector.json``: the facts that the runtime needs, and the SHA-256 of the files above.
- ``report.json``, ``report.md``: types, bounds, agreement, ranges and evaluation; ``README.md``: the model card.
"""

import importlib.util

from .. import runtime  # noqa: F401  (turns ONNX Runtime's telemetry off, which has to be before its import)

_missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"exported detectors need {' and '.join(_missing)}: pip install '.[export]' in aqdet's folder, or by name",
        name=_missing[0],
    )
