"""QONNX in its own executor: the reference's codes, and the bits that were trained."""

from collections import Counter

import numpy as np
import pytest
from onnx import numpy_helper
from programs import LSQPLUS, image, shared

from aqdet.export.program import PadImage
from aqdet.export.qonnx_graph import DESCRIPTION, DOMAIN, build_qonnx
from aqdet.export.reference import run

DOREFA = ("MODEL.QUANT.WEIGHT.QUANTIZER", "dorefa", "MODEL.QUANT.INPUT.QUANTIZER", "dorefa")
ODD = ("MODEL.QUANT.WEIGHT.QUANTIZER", "lsqodd", "MODEL.QUANT.WEIGHT.NUM_BITS", "2")
REGNETX = ("MODEL.RESNETS.REGNETX", "200MF")
FORMS = {"lsq": (), "lsq+": LSQPLUS, "dorefa": DOREFA, "without zero": ODD, "regnetx": REGNETX}


@pytest.mark.parametrize("overrides", FORMS.values(), ids=FORMS)
def test_the_executor_has_the_references_codes(overrides):
    wrapper = pytest.importorskip("qonnx.core.modelwrapper")
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    _, program = shared(*overrides)
    batch = image(32, 32)
    model = wrapper.ModelWrapper(build_qonnx(program, 32, 32)).transform(InferShapes())
    context = execute_onnx(model, {"image": batch.astype(np.float32)}, return_full_exec_context=True)
    reference, count = run(program, batch), 0
    for operation in program.operations:
        found, expected = context[operation.output], reference[operation.output]
        np.testing.assert_array_equal(found, expected, operation.output)
        count += expected.size
    assert count > 80_000


def test_every_tensor_has_its_own_bits():
    _, program = shared()
    graph = build_qonnx(program, 32, 64).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quants = [node for node in graph.node if node.op_type == "Quant"]
    grids = program.grids()
    for node in quants:
        assert node.domain == DOMAIN and all(constants[name].shape == () for name in node.input[1:])
        assert constants[node.input[1]] == 1.0
        if node.output[0] in grids:
            assert constants[node.input[3]] == grids[node.output[0]].num_bits
    written = [operation.output for operation in program.operations if getattr(operation, "grid", None)]
    weights = [node for node in quants if node.input[0] in constants]
    bits = Counter(float(constants[node.input[3]]) for node in weights)
    assert bits == Counter(float(conv.weight_bits) for conv in program.convs())
    # The levels of the pyramid share a weight, each behind a Quant of its own.
    names = {conv.name for conv in program.convs()}
    assert len({node.input[0] for node in weights}) == len(names) < len(weights)
    read = Counter(name for node in graph.node for name in node.input)
    assert all(read[node.output[0]] == 1 for node in weights)
    assert len(quants) == len(written) + len(weights) + 2  # and the image, before its padding and after
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 64]
    assert [d.dim_value for d in graph.output[-1].type.tensor_type.shape.dim] == [1, 12, 1, 1]


def test_the_image_is_padded_by_zero_alone():
    """With the mean pixel between a subtraction and an addition; hls4ml refuses any other padding."""
    _, program = shared("MODEL.PIXEL_MEAN", "[128.0, 128.0, 128.0]")
    assert isinstance(program.operations[0], PadImage)
    nodes = build_qonnx(program, 32, 32).graph.node
    assert [node.op_type for node in nodes[:5]] == ["Quant", "Sub", "Pad", "Add", "Quant"]
    assert len(nodes[2].input) == 2


def test_the_file_says_what_reads_it_and_a_resize_has_all_inputs():
    model = build_qonnx(shared()[1], 32, 32)
    assert model.doc_string == DESCRIPTION and "hls4ml" in DESCRIPTION and "FINN" in DESCRIPTION
    empty = {tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [0]}
    resized = [node for node in model.graph.node if node.op_type == "Resize"]
    assert len(resized) == 2 and all(node.input[1] in empty for node in resized)
    assert all(all(node.input) for node in model.graph.node)


def test_cleanup_passes_and_the_bits_are_inferred():
    pytest.importorskip("qonnx")
    from qonnx.analysis.inference_cost import inference_cost
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.util.cleanup import cleanup_model

    _, program = shared()
    model = cleanup_model(ModelWrapper(build_qonnx(program, 32, 32))).transform(InferDataTypes())
    kinds = Counter(str(model.get_tensor_datatype(n.output[0])) for n in model.graph.node if n.op_type == "Quant")
    assert kinds["UINT4"] > 20 and kinds["INT4"] > 20
    cost = model.analysis(lambda model: inference_cost(model, discount_sparsity=False))["total_cost"]
    products = {kind.removeprefix("op_mac_") for kind in cost if kind.startswith("op_mac_")}
    assert products == {"UINT4_INT4", "UINT8_INT8"}
    weights = {conv.name: (conv.weight.size, conv.weight_bits) for conv in program.convs()}
    assert cost["mem_w_INT4"] >= sum(size for size, bits in weights.values() if bits == 4)


@pytest.mark.parametrize("size", [(33, 32), (0, 32), (32, -32)])
def test_a_size_off_the_stride_is_refused(size):
    with pytest.raises(ValueError, match="must be multiples of 32, got"):
        build_qonnx(shared()[1], *size)
