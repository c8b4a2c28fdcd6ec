"""Post-training quantization to 8 bits by others, of the same float network, for ``benchmark.py export``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from aqdet.runtime import write_description
from aqdet.runtime.folder import DESCRIPTION, MODEL

INSTALL_NNCF = "NNCF is not installed, left out: pip install '.[nncf]'"


class _Images:
    """A reader of calibration images for ONNX Runtime's quantization.

    Args:
        batches: Images, uint8 ``(1, 3, H, W)`` each.
    """

    def __init__(self, batches: list[np.ndarray]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Returns the next image; None after the last one."""
        batch = next(self._left, None)
        return None if batch is None else {"image": batch}


def write_post_training(float_folder: Path, folder: Path, batches: list[np.ndarray]) -> None:
    """Quantizes a folder's float network by ONNX Runtime's post-training quantization to 8 bits, into another folder.

    Weights are per channel, activations uint8, as its documentation advises for convolutions; the first operations
    (image to float) and the decoding stay as they are.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder.mkdir(parents=True, exist_ok=True)
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(float_folder / MODEL), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(folder / MODEL),
        _Images(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    prepared.unlink()
    write_description(folder, json.loads((float_folder / DESCRIPTION).read_text()), files=(MODEL,))


def write_nncf(float_folder: Path, network: Path, batches: list[np.ndarray]) -> None:
    """Quantizes a folder's float network by NNCF for OpenVINO, as its documentation begins: no options but the images.

    Args:
        float_folder: Folder with the float network.
        network: The ``.xml`` file to write; its weights come beside it.
        batches: Images, uint8 ``(1, 3, H, W)`` each.
    """
    os.environ.setdefault("NNCF_CI", "1")  # it sends telemetry else
    import nncf
    import openvino

    model = openvino.Core().read_model(str(float_folder / MODEL))
    dataset = nncf.Dataset(batches, lambda batch: {"image": batch})
    network.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(nncf.quantize(model, dataset, subset_size=len(batches)), str(network))
