"""The ONNX graph in ONNX Runtime: integers alone, and the reference's codes."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from programs import LSQPLUS, image, make_conv, shared

from aqdet.export.agreement import runtime_session
from aqdet.export.image_conv import of_blocks
from aqdet.export.integer_graph import check_integer
from aqdet.export.onnx_graph import build_onnx
from aqdet.export.program import IMAGE, Grid, Output, Program
from aqdet.export.reference import accumulate, conv_unit, run

SIGNED = ("MODEL.FPN.RELU", "False")
DOREFA = ("MODEL.QUANT.WEIGHT.QUANTIZER", "dorefa", "MODEL.QUANT.INPUT.QUANTIZER", "dorefa")


def outputs(program):
    return [name for output in program.outputs for name in output.names]


def test_onnx_runtime_executes_integers_alone():
    _, program = shared()
    executed = check_integer(build_onnx(program))
    convs = list(program.convs())
    predictions = sum(conv.grid is None for conv in convs)
    assert executed["QLinearConv"] == len(convs) - predictions and executed["MatMulInteger"] == predictions
    # Eight residual sums and two of the pyramid; the only Adds left are the predictions' two parts and int32 biases,
    # and three for each level's places under a kernel.
    assert executed["QLinearAdd"] == 10 and executed["Add"] == 2 * predictions + 3 * len(program.outputs)
    assert executed["Gather"] == predictions and executed["Range"] == 2 * len(program.outputs)
    assert not {"Conv", "DequantizeLinear", "QuantizeLinear", "LeakyRelu", "Relu"} & set(executed)


def test_a_float_operation_is_named():
    _, program = shared()
    graph = build_onnx(program)
    for node in graph.graph.node:
        if node.op_type == "LeakyRelu" and "lateral5" in node.output[0]:
            node.op_type = "Softsign"  # which has no integer form
            del node.attribute[:]
            name = node.output[0]
    with pytest.raises(ValueError, match=r"in float.*--allow-float") as error:
        check_integer(graph)
    assert f"{name} (Softsign)" in str(error.value) and "\n" not in str(error.value)
    assert check_integer(graph, [r"fpn_lateral5\.input_quantizer"])["Softsign"] == 1


@pytest.mark.parametrize("overrides", [(), SIGNED, DOREFA], ids=["relu", "signed", "dorefa"])
@pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimized"])
def test_predictions_are_the_references(overrides, optimize):
    _, program = shared(*overrides)
    batch = image(64, 96)
    reference = run(program, batch)
    session = runtime_session(build_onnx(program), optimize=optimize)
    names = outputs(program)
    for name, found in zip(names, session.run(names, {"image": batch}), strict=True):
        assert found.dtype == np.float32 and found.shape == reference[name].shape
        if optimize:  # as it ships
            np.testing.assert_array_equal(found, reference[name], name)
            continue
        differ = np.abs(found - reference[name]) > 1e-5 * np.abs(reference[name]).max()
        assert differ.mean() < 0.05, name  # one code at a tie moves up to nine positions


def test_an_integer_zero_point_stays_fast():
    _, program = shared(*LSQPLUS)
    zero_points = {grid.zero_point for grid in program.grids().values()}
    assert len(zero_points - {0, 128}) > 3  # of the 8-bit operands, whose range 128 would not fit
    assert all(
        0 <= grid.quant_min + grid.zero_point and grid.quant_max + grid.zero_point < 256
        for grid in program.grids().values()
    )
    assert "LeakyRelu" not in check_integer(build_onnx(program))


def test_shapes_are_dynamic_and_images_independent():
    _, program = shared()
    session = runtime_session(build_onnx(program), optimize=True)
    names = outputs(program)
    for count, height, width in ((1, 32, 96), (3, 64, 32)):
        batch = image(height, width, count)
        found = session.run(names, {"image": batch})
        assert found[0].shape == (count, 9, height // 8, width // 8)
        alone = session.run(names, {"image": batch[-1:]})
        for together, single in zip(found, alone, strict=True):
            np.testing.assert_array_equal(together[-1:], single)


def test_every_dequantize_has_a_zero_point():
    _, program = shared()
    graph = build_onnx(program).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            scale, zero_point = (constants[name] for name in node.input[1:])
            assert list(zero_point.dims) == list(scale.dims), node.name


def test_the_graph_says_what_it_is():
    _, program = shared()
    model = build_onnx(program, metadata={"classes": '["a", "b"]'})
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("classes", '["a", "b"]')]
    assert model.opset_import[0].version == 21 and model.producer_version
    assert "object detector" in model.doc_string and model.doc_string == model.graph.doc_string
    assert "multiples of 32" in model.graph.input[0].doc_string
    assert [info.doc_string.split(",")[0] for info in model.graph.output[:2]] == [
        "logits of level p3",
        "box deltas of level p3",
    ]


def copies_in(graph):
    """The node that repeats the input of a convolution for its int8 parts."""
    return next(node for node in graph.node if node.op_type == "Concat" and "copies" in node.output[0])


def test_dorefa_at_8_bits_reads_its_input_four_times():
    _, program = shared(*DOREFA)
    stem = next(program.convs())
    assert np.abs(stem.weight).max() == 255 and (stem.weight % 2 == 1).all()
    graph = build_onnx(program)
    assert list(copies_in(graph.graph).input) == [f"{stem.output}.blocks"] * 4
    check_integer(graph)


def test_the_image_is_read_in_blocks():
    _, program = shared()
    stem = next(program.convs())
    graph = build_onnx(program).graph
    blocks = next(node for node in graph.node if node.op_type == "SpaceToDepth")
    assert (list(blocks.input), list(blocks.output)) == ([stem.input], [f"{stem.output}.blocks"])
    assert list(copies_in(graph).input) == [f"{stem.output}.blocks"] * 2
    weight = next(t for t in graph.initializer if t.name == f"{stem.name}.weight")
    parts = np.split(numpy_helper.to_array(weight).astype(np.int32), 2, axis=1)
    np.testing.assert_array_equal(parts[0] + parts[1], of_blocks(stem, "blocks").integer_weight)


def test_an_image_that_is_not_read_in_blocks_is_read_in_channels_by_four():
    weight = np.random.default_rng(0).integers(-128, 128, (5, 3, 3, 3))
    conv = dataclasses.replace(make_conv(weight, padding=(1, 1)), input=IMAGE, weight_bits=8)
    program = Program(Grid(1.0, 0, 255), (conv,), (), 32, pyramid=("y",))
    model = build_onnx(program)
    assert list(copies_in(model.graph).input) == [IMAGE, IMAGE, "y.copies_rest"]
    stored = next(t for t in model.graph.initializer if t.name == "conv.weight")
    parts = np.split(numpy_helper.to_array(stored).astype(np.int32), [3, 6], axis=1)
    assert parts[2].shape[1] == 2 and not parts[2].any()
    np.testing.assert_array_equal(parts[0] + parts[1], weight)
    batch = image(32, 64)
    (found,) = runtime_session(model, optimize=True).run(["y"], {"image": batch})
    np.testing.assert_array_equal(found, run(program, batch)["y"])


def test_a_float_operation_after_sizes_is_still_named():
    """What is computed of sizes passes; a value of the image that meets it does not."""
    _, program = shared()
    graph = build_onnx(program)
    gather = next(node for node in graph.graph.node if node.op_type == "Gather")
    values = [
        helper.make_node("Cast", [gather.input[1]], ["float_places"], to=TensorProto.FLOAT),
        helper.make_node("Cast", [gather.output[0]], ["float_codes"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["float_places"], ["total"], keepdims=0),
        helper.make_node("Mul", ["float_codes", "total"], ["mixed"]),
    ]
    graph.graph.node.extend(values)
    graph.graph.output.append(helper.make_tensor_value_info("mixed", TensorProto.FLOAT, None))
    with pytest.raises(ValueError, match=r"float_codes \(Cast\), mixed \(Mul\) in float"):
        check_integer(graph)


def test_worst_pairs_of_products_are_exact_on_any_x86():
    # 49 * 255 * 127 in every sum: without VNNI, uint8 times int8 would saturate at 32767 a pair.
    _, program = shared()
    stem = next(program.convs())
    weight = np.full_like(stem.weight, 127)
    weight[::2] = -127
    change = {"weight": weight, "sign": np.ones_like(stem.sign), "multiple": np.ones_like(stem.multiple)}
    change |= {"scale": np.full_like(stem.scale, 2e-5), "bias": np.full_like(stem.bias, 200_000)}
    grid = dataclasses.replace(stem.grid, scale=program.image.scale * 2e-5 * 20_000)
    wide = dataclasses.replace(stem, **change, grid=grid)
    operations = tuple(wide if operation is stem else operation for operation in program.operations)
    wrong = dataclasses.replace(program, operations=operations)
    graph = build_onnx(wrong, extra_outputs=True)
    batch = np.full((1, 3, 32, 32), 255, np.uint8)
    batch[..., ::3] = 0
    expected = run(wrong, batch)[wide.output]
    assert len(np.unique(expected)) > 8
    for optimize in (False, True):
        (found,) = runtime_session(graph, optimize=optimize).run([wide.output], {"image": batch})
        assert np.abs(found.astype(int) - expected).max() <= (0 if optimize else 1)


def test_per_level_convs_share_their_weights():
    _, program = shared()
    graph = build_onnx(program)
    names = [tensor.name for tensor in graph.graph.initializer]
    tower = [conv for conv in program.convs() if conv.name == "head.cls_subnet.0"]
    distinct = {conv.integer_weight.tobytes() for conv in tower}
    assert len(tower) == 5
    assert sum(name.startswith("head.cls_subnet.0.weight") and name.endswith(".int4") for name in names) == 1
    unpacked = [node for node in graph.graph.node if node.name.startswith("head.cls_subnet.0.weight@")]
    assert sum(node.name.endswith(".int8") for node in unpacked) == len(distinct)


def test_a_prediction_of_other_weights_at_one_level_keeps_them():
    _, program = shared()
    last = [conv for conv in program.convs() if conv.grid is None][-1]
    flipped = dataclasses.replace(last, sign=-last.sign)
    operations = [flipped if operation is last else operation for operation in program.operations]
    graph = build_onnx(dataclasses.replace(program, operations=operations)).graph
    weights = {}
    initializers = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            weights[node.name] = initializers[node.input[1]].astype(np.int32)
    predictions = [operation for operation in operations if getattr(operation, "grid", 0) is None]
    assert len(predictions) == len(weights)
    for conv in predictions:
        rows = conv.integer_weight.transpose(2, 3, 1, 0).reshape(-1, len(conv.weight))
        parts = np.split(weights[f"{conv.output}.products"], 2, axis=1)
        np.testing.assert_array_equal(sum(parts), rows)


def one_level(prediction):
    """A program of an image and two predictions alike, ``y`` and ``z``."""
    convs = (prediction, dataclasses.replace(prediction, output="z"))
    return Program(Grid(0.5, 0, 255), convs, (Output("p3", "y", "z", 8),), 1)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("geometry", [{}, {"stride": (2, 3)}, {"padding": (1, 2)}, {"dilation": (2, 1)}])
@pytest.mark.parametrize("largest", [15, 127])
def test_a_prediction_of_any_geometry_is_the_integer_convolution(kernel, geometry, largest):
    generator = np.random.default_rng(4)
    weight = generator.integers(-largest, largest + 1, (5, 3, *kernel))
    extra = {"bias": generator.integers(-900, 900, 5), "scale": generator.uniform(0.1, 1, 5)}
    conv = dataclasses.replace(make_conv(weight, grid=None, **extra, **geometry), input=IMAGE)
    program = one_level(conv)
    batch = generator.integers(0, 256, (2, 3, 11, 9), dtype=np.uint8)
    (found,) = runtime_session(build_onnx(program), optimize=True).run(["y"], {IMAGE: batch})
    sums = accumulate(conv, batch.astype(np.int64)).astype(np.float32)
    np.testing.assert_array_equal(found, sums * conv_unit(conv, 0.5).reshape(1, -1, 1, 1))


def test_a_prediction_with_groups_is_refused_by_name():
    conv = dataclasses.replace(make_conv(np.ones((3, 1, 1, 1)), grid=None, groups=3), input=IMAGE)
    with pytest.raises(ValueError, match="layer conv: a prediction with groups"):
        build_onnx(one_level(conv))


def test_every_value_is_named_once():
    _, program = shared()
    graph = onnx.load_from_string(build_onnx(program, extra_outputs=True).SerializeToString())
    produced = [name for node in graph.graph.node for name in node.output]
    assert len(produced) == len(set(produced))
    assert {operation.output for operation in program.operations} <= set(produced)
