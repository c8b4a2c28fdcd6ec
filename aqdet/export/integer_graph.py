"""Check that ONNX Runtime executes a graph on integers alone."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence

import onnx
import onnxruntime

from .agreement import runtime_session

INTEGER_KINDS = frozenset(
    (
        "Clip Concat DepthToSpace Gather MaxPool NhwcMaxPool Pad QLinearAdd QLinearConv QLinearLeakyRelu Reshape "
        "Resize Slice SpaceToDepth Split Transpose"
    ).split()
)
"""Operators of ONNX Runtime that compute on integers in the graphs written here."""


def check_integer(graph: onnx.ModelProto, allow_float: Sequence[str] = ()) -> dict[str, int]:
    """Counts the operators of the graph that ONNX Runtime executes.

    Operations on the image's size alone, such as the indices that a Gather reads, do not count: they read no values.

    Raises:
        ValueError: Naming the operations that compute in float although they do not come after a prediction.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "optimized.onnx")
        runtime_session(graph, optimize=True, optimized_path=path)
        executed = onnx.load(path).graph
    nodes = executed.node
    predicted: set[str] = set()
    of_sizes = {tensor.name for tensor in executed.initializer} | {""}
    floats = []
    for node in nodes:
        if node.op_type == "MatMulInteger" or any(name in predicted for name in node.input):
            predicted.update(node.output)
        elif node.op_type == "Shape" or all(name in of_sizes for name in node.input):
            of_sizes.update(node.output)
        elif node.op_type not in INTEGER_KINDS:
            name = re.sub(r"_token_\d+$", "", node.output[0])  # layout changes add these
            if not any(re.search(pattern, name) for pattern in allow_float):
                floats.append(f"{name} ({node.op_type})")
    if floats:
        more = f" and {len(floats) - 8} more" * (len(floats) > 8)
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} computes {', '.join(floats[:8])}{more} in float: use another "
            "version of it, or allow them by name (--allow-float)"
        )
    return dict(sorted(Counter(node.op_type for node in nodes).items()))
