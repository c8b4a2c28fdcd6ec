"""``README.md`` of an exported folder, its model card: what the detector is, how good it is, and how to run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOT_STATED = "not stated: write it here before you pass the folder on"


def model_card(content: Mapping[str, Any], report: Mapping[str, Any], files: Sequence[str], licence: str = "") -> str:
    """Returns the text of the model card.

    Args:
        content: The content of ``detector.json``.
        report: The content of ``report.json``.
        files: The names of the files of the folder.
        licence: The licence of the weights.
    """
    source, size = content["source"], report["sizes"]
    lines = [
        f"# {content['architecture']} detector, {_bits(report['operations'])}",
        "",
        f"Detects {len(content['classes'])} classes: {', '.join(content['classes'])}.",
        "",
        f"- Licence: {licence or NOT_STATED}",
        f"- Trained on: {', '.join(source['datasets']) or 'not stated'}",
        f"- Config: {source['config'] or 'not stated'}; checkpoint {source['weights']}, SHA-256 "
        f"`{source['weights_sha256']}`",
        f"- Exported by aqdet {source['aqdet_version']}, checked in ONNX Runtime {report['onnxruntime']}",
        f"- Input: shorter edge {content['input']['min_size']} pixels, longer at most {content['input']['max_size']}",
        f"- Size: {size['float32_state_dict'] / size['ratio'] / 1e6:.1f} MB, 1/{size['ratio']:.1f} of float32 weights",
        "",
        "## How good it is",
        "",
    ]
    evaluation = report.get("evaluation")
    if not evaluation:
        lines.append("Not measured: export with `--dataset NAME` for average precision and agreement of detections.")
    else:
        lines += [f"On {evaluation['dataset']}, {evaluation['images']} images:", ""]
        untrained = "float_detections" in evaluation
        lines += [f"| | {'float' if untrained else 'trained'} | as it ships |", "|---|---|---|"]
        for name, values in evaluation["metrics"].items():
            start = values["float" if untrained else "trained"]
            lines.append(f"| {name} | {_number(start)} | {_number(values['exported'])} |")
    lines += [
        "",
        "## Run it",
        "",
        "```",
        "pip install .                   # in a checkout of aqdet; brings NumPy, ONNX Runtime and Pillow, no PyTorch",
        "python -m aqdet.runtime DIR image.jpg --output found.jpg",
        "python -m aqdet.runtime --self-test DIR     # the same values on this machine?",
        "```",
        "",
        "In Python: `aqdet.runtime.Detector(DIR)(image)`. In other languages: ONNX Runtime 1.23 or newer reads",
        "`model.onnx`, whose metadata say how images are prepared and predictions decoded; `model.end_to_end.onnx`,",
        "where it is in the folder, needs no decoding.",
        "",
        "## Files",
        "",
        "Sizes and SHA-256 of the files are in `detector.json`, which the runtime compares with them.",
        "",
    ]
    about = {
        "model.onnx": "the network on integers, weights packed into their bits",
        "box.onnx": "classes and boxes of regions: RoiAlign in float, the head on integers",
        "mask.onnx": "masks of regions: RoiAlign in float, the head on integers",
        "model.end_to_end.onnx": "uint8 images in, boxes, scores and classes out",
        "model.qonnx.onnx": "QONNX, for hardware with the bits that were trained; not run by aqdet.runtime",
        "detector.c": "the network in C99 without libraries, for images of one size: gcc -std=c99 -O3",
        "detector.h": "its interface",
        "model.tensorrt.onnx": "experimental: for TensorRT, never run in it",
        "golden.npz": "an image, codes of a few layers, predictions and detections, for the self-test",
    }
    lines += [f"- `{name}`: {about[name]}" for name in files if name in about]
    lines += [
        "- `detector.json`: what the runtime has to know, with checksums",
        "- `report.md`, `report.json`: types, bounds, agreement and ranges of every layer",
    ]
    return "\n".join(lines) + "\n"


def _bits(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a text on the bits, for example ``weights of 4 bits (8 in 11 of 58 convolutions), inputs of 4 bits``."""
    convs = [row for row in rows if row["kind"] == "conv"]
    texts = []
    for what, key in (("weights", "weight_bits"), ("inputs", "input_bits")):
        bits = [row[key] for row in convs]
        usual = max(set(bits), key=bits.count)
        rest = ", ".join(f"{value} in {bits.count(value)}" for value in sorted(set(bits) - {usual}))
        texts.append(f"{what} of {usual} bits" + f" ({rest} of {len(bits)} convolutions)" * bool(rest))
    return ", ".join(texts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
