"""Packed weights: bits by hand, unpacked and folded by ONNX Runtime to what the program has, small in the file."""

import dataclasses

import numpy as np
import onnx
import pytest
from helpers import FCOS
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from programs import image, make_conv, shared

from aqdet.export.agreement import runtime_session
from aqdet.export.integer_graph import check_integer
from aqdet.export.onnx_graph import OPSET, GraphBuilder, build_onnx
from aqdet.export.packed_weights import grid_of_codes, pack_int4, pack_pairs_of_bits, packed_bits, write_weight
from aqdet.export.reference import run

DOREFA = ("MODEL.QUANT.WEIGHT.QUANTIZER", "dorefa", "MODEL.QUANT.INPUT.QUANTIZER", "dorefa")
ODD = ("MODEL.QUANT.WEIGHT.QUANTIZER", "lsqodd")
BITS = {bits: ("MODEL.QUANT.WEIGHT.NUM_BITS", str(bits)) for bits in (2, 3, 5)}


def test_packing_by_hand():
    assert pack_int4(np.array([1, -1, 7, -8, 3])) == bytes([0xF1, 0x87, 0x03])
    assert pack_pairs_of_bits(np.array([3, 0, 1, 2, 1])).tolist() == [0b10010011, 1]
    odd = np.array([-3, 1, 3, -1], np.int16)
    assert grid_of_codes(odd, 2) == (-3, 2) and grid_of_codes(np.array([-2, 1], np.int16), 2) == (-2, 1)
    assert grid_of_codes(np.array([-8, 7], np.int16), 4) == (-8, 1)


def weight_of(codes, bits, factor=None):
    """A weight as written into a graph, evaluated by ONNX's own reference; and the tensors of the file."""
    conv = dataclasses.replace(make_conv(codes, factor=factor), weight_bits=bits)
    program = shared()[1]
    builder = GraphBuilder(program)
    name = write_weight(builder, conv)
    output = helper.make_tensor_value_info(name, TensorProto.INT8, codes.shape)
    tensors = list(builder.initializers.values())
    if not builder.nodes:
        return conv, numpy_helper.to_array(tensors[0]), tensors
    graph = helper.make_graph(builder.nodes, "weight", [], [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    return conv, np.asarray(ReferenceEvaluator(model).run(None, {})[0]), tensors


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("odd", [False, True], ids=["all", "odd"])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 1, 1, 3)])
def test_any_weight_comes_back(bits, odd, shape):
    generator = np.random.default_rng(bits)
    if odd and bits == 8:
        return  # which needs two parts
    codes = generator.integers(0, 2**bits, shape) * 2 - (2**bits - 1) if odd else None
    codes = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape) if codes is None else codes
    multiple = max(127 // max(int(np.abs(codes).max()), 1), 1) if bits < 8 else 1
    factor = [multiple, -1, 0, 1, -multiple][: shape[0]]
    if bits == 8:
        codes, factor = np.maximum(codes, -127), [1, -1, 1, 1, 1][: shape[0]]
    conv, value, tensors = weight_of(codes, bits, factor)
    assert value.dtype == np.int8
    np.testing.assert_array_equal(value, conv.integer_weight)
    stored = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8}[bits]
    assert packed_bits(conv) == stored
    largest = next(tensor for tensor in tensors if tensor.name.startswith("conv.weight"))
    assert len(largest.raw_data) == -(-codes.size * stored // 8)


@pytest.mark.parametrize(
    "overrides",
    [(), BITS[2], BITS[3], BITS[5], DOREFA, (*DOREFA, *BITS[2]), (*ODD, *BITS[2]), FCOS],
    ids=["4 bits", "2 bits", "3 bits", "5 bits", "dorefa", "dorefa, 2 bits", "without zero, 2 bits", "fcos"],
)
def test_the_runtime_folds_them_and_has_the_references_values(overrides):
    _, program = shared(*overrides)
    graph = build_onnx(program)
    executed = check_integer(graph)
    predictions = sum(conv.grid is None for conv in program.convs())
    assert executed["QLinearConv"] == len(list(program.convs())) - predictions
    # What is left are the predictions' own, and of each level the places under a kernel; nothing unpacks at run time.
    levels = len(program.outputs)
    assert executed["Cast"] == predictions and executed["Mul"] == predictions + levels
    assert executed["Reshape"] == 2 * predictions + 2 * levels
    assert not {"BitShift", "BitwiseAnd", "DequantizeLinear", "QuantizeLinear"} & set(executed)
    batch = image(32, 32)
    session, reference = runtime_session(graph, optimize=True), run(program, batch)
    for info, found in zip(session.get_outputs(), session.run(None, {"image": batch}), strict=True):
        np.testing.assert_array_equal(found, reference[info.name], info.name)


ODD_BITS = [(2, (*ODD, "MODEL.QUANT.WEIGHT.CENTERED", "True", "MODEL.QUANT.WEIGHT.NUM_BITS", bits)) for bits in "12"]


@pytest.mark.parametrize("bits, overrides", [(4, ()), (2, BITS[2]), *ODD_BITS, (4, ODD)])
def test_a_weight_takes_its_bits_once(bits, overrides):
    _, program = shared(*overrides)
    graph = build_onnx(program)
    kinds = {tensor.name: tensor for tensor in graph.graph.initializer}
    weights = {conv.name: conv for conv in program.convs()}
    for path, conv in weights.items():
        if packed_bits(conv) == 8:
            continue
        tensor = kinds[f"{path}.weight.{'int4' if bits == 4 else '2bit'}"]
        assert tensor.data_type == (TensorProto.INT4 if bits == 4 else TensorProto.UINT8)
        assert len(tensor.raw_data) == conv.weight.size * bits // 8
    packed = sum(conv.weight.size * packed_bits(conv) / 8 for conv in weights.values())
    assert graph.ByteSize() < 1.15 * packed + 500_000
    assert sum(4 * conv.weight.size for conv in weights.values()) / graph.ByteSize() > {4: 7, 2: 11}[bits]


def test_prediction_weights_of_few_bits_are_packed_too():
    generator = np.random.default_rng(0)
    _, program = shared()
    operations = []
    for operation in program.operations:
        if getattr(operation, "grid", 0) is None:
            codes = generator.integers(-8, 8, operation.weight.shape).astype(np.int16)
            ones = np.ones(len(codes))
            few = {"weight": codes, "weight_bits": 4, "multiple": ones.astype(np.int16), "sign": ones.astype(np.int8)}
            operation = dataclasses.replace(operation, **few)
        operations.append(operation)
    changed = dataclasses.replace(program, operations=tuple(operations))
    graph, batch = build_onnx(changed), image(32, 32)
    assert "head.cls_score.weight.int4" in {tensor.name for tensor in graph.graph.initializer}
    session, reference = runtime_session(graph, optimize=True), run(changed, batch)
    for info, found in zip(session.get_outputs(), session.run(None, {"image": batch}), strict=True):
        np.testing.assert_array_equal(found, reference[info.name], info.name)
