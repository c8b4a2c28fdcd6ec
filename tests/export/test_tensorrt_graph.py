"""TensorRT's graph: signed and symmetric throughout, the reference's codes, and refused by layer where it cannot be."""

import dataclasses

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper
from programs import SEVEN_BITS, image, shared

from aqdet.export.agreement import TENSORRT, compare, runtime_session, runtime_values
from aqdet.export.program import Conv, PadImage
from aqdet.export.reference import run
from aqdet.export.tensorrt_graph import build_tensorrt

SIGNED_LSQPLUS = ("MODEL.FPN.RELU", "False", "MODEL.QUANT.INPUT.QUANTIZER", "lsqplus")


@pytest.mark.parametrize("overrides", [(), SIGNED_LSQPLUS], ids=["relu", "signed, lsq+"])
def test_every_code_that_differs_lies_at_a_tie(overrides):
    model, program = shared(*SEVEN_BITS, *overrides)
    found = [d for d in compare(model, program, list(image(32, 32)), tensorrt=True) if d.execution == TENSORRT]
    assert {d.value for d in found} == {o.output for o in program.operations if not isinstance(o, PadImage)}
    codes = [d for d in found if not d.is_prediction]
    assert sum(d.count for d in codes) > 50_000 and sum(d.unexplained for d in codes) == 0
    assert sum(d.local for d in codes) <= 1e-4 * sum(d.count for d in codes)
    assert all(d.largest < 1e-4 for d in found if d.is_prediction)


def test_the_stem_is_exact_to_the_border():
    # Every code of the image, and its padding, through the shift by 128.
    _, program = shared(*SEVEN_BITS)
    pixels = np.arange(3 * 32 * 32, dtype=np.uint8).reshape(1, 3, 32, 32)
    stem = next(program.convs())
    graph = build_tensorrt(program, extra_outputs=True)
    values = runtime_values(runtime_session(graph, optimize=False), program, pixels)
    differ = values[stem.output] != run(program, pixels)[stem.output]
    assert differ.mean() < 1e-3


def test_every_integer_is_int8_with_zero_point_0():
    _, program = shared(*SEVEN_BITS)
    graph = build_tensorrt(program).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in pairs:
        zero_point = constants[node.input[2]]
        assert zero_point.dtype == np.int8 and not zero_point.any(), node.output[0]
    assert {value.dtype for value in constants.values()} == {np.dtype(t) for t in ("int8", "int64", "float32")}
    kinds = {node.op_type for node in graph.node}
    assert kinds - {"QuantizeLinear", "DequantizeLinear"} == set(
        "Add Cast Clip Conv MaxPool Mul Pad Resize Sub".split()
    )
    assert sum(node.op_type == "Conv" for node in graph.node) == len(list(program.convs()))
    # The image alone is unsigned, and becomes a float at once, as TensorRT wants it.
    (input_,) = graph.input
    assert input_.type.tensor_type.elem_type == TensorProto.UINT8
    assert [node.op_type for node in graph.node if input_.name in node.input] == ["Cast"]


def test_unsigned_8_bits_are_refused_by_name():
    _, program = shared()
    grids = program.grids()
    with pytest.raises(ValueError) as error:
        build_tensorrt(program)
    wide = {
        o.output.split("@")[0] for o in program.operations if grids.get(o.output) and grids[o.output].quant_max > 127
    }
    message = str(error.value)
    first = "backbone.bottom_up.stem.conv1.output"
    assert message.startswith(f"layer {first} (and {len(wide - {'image_padded'}) - 1} more): codes from 0 to 255, but ")
    assert "signed with zero point 0" in message and "MODEL.QUANT.RESIDUAL_NUM_BITS" in message and "\n" not in message


def test_wide_weights_are_refused_by_name():
    _, program = shared(*SEVEN_BITS)
    index, conv = next((i, o) for i, o in enumerate(program.operations) if isinstance(o, Conv) and "res4" in o.name)
    operations = list(program.operations)
    operations[index] = dataclasses.replace(conv, weight=np.full_like(conv.weight, 64), multiple=conv.multiple * 0 + 2)
    with pytest.raises(ValueError, match=f"layer {conv.name}: weight codes from -?128 to 128, but TensorRT's are -127"):
        build_tensorrt(dataclasses.replace(program, operations=tuple(operations)))
