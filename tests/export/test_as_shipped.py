"""The program in torch against the plain reference, and the trained detector in the arithmetic that ships."""

import numpy as np
import programs
import pytest
import torch
from programs import make_conv

from aqdet.export.as_shipped import AsShipped, ProgramNetwork, pad_channels
from aqdet.export.description import pad_image
from aqdet.export.program import IMAGE, Grid, Output, Program
from aqdet.export.reference import run


@pytest.mark.parametrize("overrides", [(), programs.LSQPLUS, programs.SEVEN_BITS], ids=["u4", "lsqplus", "7 bits"])
def test_predictions_equal_the_reference_to_the_bit(overrides):
    _, program = programs.shared(*overrides)
    image = programs.image(64, 96, count=2)
    expected = run(program, image)
    found = ProgramNetwork(program)(torch.from_numpy(image))
    for kind, names in zip(found, zip(*(output.names for output in program.outputs), strict=True), strict=True):
        for value, name in zip(kind, names, strict=True):
            np.testing.assert_array_equal(value.numpy(), expected[name])
            assert value.dtype == torch.float32


def test_sums_beyond_float32_are_exact():
    # 2**24 + 255 is no float32; its float32 is 2**24 + 256, and a sum that is rounded on the way may miss that.
    weight = np.ones((1, 3, 9, 9))
    conv = make_conv(weight, bias=[2**24 - 61965 + 255], scale=[1.0], grid=None)
    conv = conv.__class__(**{**conv.__dict__, "input": IMAGE})
    program = Program(Grid(1.0, 0, 255), (conv,), (Output("p3", "y", "y", 8),), 1)
    image = np.full((1, 3, 9, 9), 255, np.uint8)
    network = ProgramNetwork(program)
    assert network.weight_0.dtype == torch.float64
    assert network(torch.from_numpy(image))[0][0].item() == run(program, image)["y"].item() == 2**24 + 256


def test_pad_channels():
    x = torch.arange(4.0).view(1, 2, 1, 2)
    padded = pad_channels(x, (0, 1, 1, 0), (7, 9))
    assert padded.tolist() == [[[[7, 7, 7], [0, 1, 7]], [[9, 9, 9], [2, 3, 9]]]]


def test_a_batch_is_padded_as_the_runtime_pads_it():
    model, program = programs.shared()
    small, large = programs.image(60, 90)[0], programs.image(64, 96)[0]
    shipped = AsShipped(model)
    seen = []
    shipped.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inputs = [{"image": torch.from_numpy(image), "height": 30, "width": 45} for image in (small, large)]
    found = shipped(inputs)
    np.testing.assert_array_equal(seen[0].numpy(), np.stack([pad_image(program, small), large]))
    assert [entry["instances"].image_size for entry in found] == [(30, 45)] * 2
    assert not model.training and "model" not in dict(shipped.named_modules())


def test_detections_are_those_of_the_trained_model_but_for_rounding(monkeypatch):
    model, _ = programs.shared()
    monkeypatch.setattr(model, "test_score_thresh", 0.001)
    inputs = [{"image": torch.from_numpy(programs.image(64, 96)[0]), "height": 64, "width": 96}]
    with torch.no_grad():
        own, shipped = (m(inputs)[0]["instances"] for m in (model, AsShipped(model)))
    assert len(own) > 20 and len(shipped) == pytest.approx(len(own), rel=0.2)
    assert shipped.scores.max().item() == pytest.approx(own.scores.max().item(), rel=0.1)
