"""The trained model, the reference and ONNX Runtime, layer by layer; and that a wrong program shows."""

import dataclasses

import numpy as np
import pytest
from helpers import FCOS
from programs import LSQPLUS, image, shared

from aqdet.export.agreement import EXECUTIONS, OPTIMIZED, PLAIN, ROUNDED, TENSORRT, TRAINED, compare
from aqdet.export.program import Conv

SIGNED = ("MODEL.FPN.RELU", "False")
BOTTLENECK = (
    *"MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.WIDTH_PER_GROUP 16 MODEL.RESNETS.NUM_GROUPS 2".split(),
    *"MODEL.RESNETS.NORM FrozenBN MODEL.FPN.TOP_BLOCK_IN_FEATURE p5 MODEL.QUANT.RESIDUAL_QUANTIZER lsq".split(),
    *("MODEL.FPN.NORM", "", "MODEL.RETINANET.NORM", ""),
)

REGNETX = (*FCOS, "MODEL.RESNETS.REGNETX", "200MF")


def totals(differences, execution):
    chosen = [d for d in differences if d.execution == execution and not d.is_prediction]
    return sum(d.count for d in chosen), sum(d.local for d in chosen), sum(d.unexplained for d in chosen)


@pytest.mark.parametrize(
    "overrides",
    [(), SIGNED, BOTTLENECK, LSQPLUS, FCOS, REGNETX],
    ids=["relu", "signed", "bottleneck", "lsq+", "fcos", "regnetx"],
)
def test_every_code_is_the_references_or_lies_at_a_tie(overrides):
    model, program = shared(*overrides)
    differences = compare(model, program, list(image(32, 32, 2)))
    assert model.training is False
    limits = {TRAINED: 2e-2, ROUNDED: 3e-3, PLAIN: 1e-4, OPTIMIZED: 0}
    for execution in limits:
        count, local, unexplained = totals(differences, execution)
        assert count > 50_000 and unexplained == 0, execution
        assert local <= limits[execution] * count, execution
    # What ships is the reference to the bit: codes and predictions, from the image on.
    exact = [d for d in differences if d.execution == OPTIMIZED]
    assert not any(d.local or d.whole or d.largest or d.unexplained for d in exact)
    # The stem's border is padded with the rounded mean pixel; anywhere else only float32 is left.
    inner = [d for d in differences if d.execution == ROUNDED and ".stem." not in d.value]
    assert sum(d.local for d in inner) <= 1e-4 * sum(d.count for d in inner)
    values = {execution: {d.value for d in differences if d.execution == execution} for execution in EXECUTIONS}
    assert not values[TENSORRT]  # which was not asked for
    everything = {operation.output for operation in program.operations}
    assert values[PLAIN] == values[OPTIMIZED] == everything
    assert values[TRAINED] == values[ROUNDED] == {n for n in everything if "padded" not in n and "top_down" not in n}
    predictions = [d for d in differences if d.is_prediction]
    assert len(predictions) == sum(len(o.names) for o in program.outputs) * 4 and all(
        d.largest < 1e-4 for d in predictions
    )


@pytest.mark.parametrize("change", ["bias", "scale", "weight"])
def test_a_wrong_conv_is_found_and_named(change):
    model, program = shared()
    operations = list(program.operations)
    index = next(i for i, o in enumerate(operations) if isinstance(o, Conv) and o.name.endswith("res3.0.conv2"))
    conv = operations[index]
    values = {
        "bias": conv.bias + np.round(0.6 * operations[index].grid.scale / conv.scale).astype(np.int32),
        "scale": conv.scale * np.float32(1.02),
        "weight": np.roll(conv.weight, 1, axis=3),
    }
    operations[index] = dataclasses.replace(conv, **{change: values[change]})
    wrong = dataclasses.replace(program, operations=tuple(operations))
    differences = compare(model, wrong, list(image(32, 32)))
    for execution in (TRAINED, ROUNDED):
        assert {d.value for d in differences if d.unexplained and d.execution == execution} == {conv.output}
    for execution in (PLAIN, OPTIMIZED):
        assert totals(differences, execution)[2] == 0
