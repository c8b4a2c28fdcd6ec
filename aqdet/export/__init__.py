"""Export of a trained detector: integer program, integer reference, ONNX, proofs and reports."""

import importlib.util

from .. import runtime  # noqa: F401  (turns ONNX Runtime's telemetry off, which has to be before its import)

_missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"exported detectors need {' and '.join(_missing)}: pip install '.[export]' in aqdet's folder, or by name",
        name=_missing[0],
    )
