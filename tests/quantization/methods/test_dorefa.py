import pytest
import torch
from quantization.specs import ready

from aqdet.quantization import QuantSpec


def test_weights_by_hand():
    # M = 0.6; tanh(w) / 1.2 + 1/2 = 1, 0.25, 0.5, 0.583; in thirds, half to even: 3, 1, 2, 2.
    w = torch.atanh(torch.tensor([0.6, -0.3, 0.0, 0.1]))
    quantizer = ready(QuantSpec("dorefa", 2, "weight"), w)
    torch.testing.assert_close(quantizer(w), torch.tensor([0.6, -0.2, 0.2, 0.2]))
    assert quantizer.to_integer(w).codes.tolist() == [3, -1, 1, 1]


def test_per_channel_weights_of_one_dimension_have_a_scale_each():
    # Alone in its channel, every weight is the largest.
    w = torch.tensor([1.0, 0.1, -0.01])
    quantizer = ready(QuantSpec("dorefa", 4, "weight", per_channel=True), w)
    torch.testing.assert_close(quantizer(w), torch.tanh(w))
    assert quantizer.to_integer(w).codes.tolist() == [15, 15, -15]


@pytest.mark.parametrize("signed", (False, True))
def test_input_with_range_one_is_the_paper(signed):
    quantizer = ready(QuantSpec("dorefa", 3, "input", signed=signed))
    steps = 3 if signed else 7
    quantizer.scale.fill_(1 / steps)
    x = torch.tensor([-2.0, -0.4, 0.0, 0.4, 0.9, 5.0])
    expected = [-3, -1, 0, 1, 3, 3] if signed else [0, 0, 0, 3, 6, 7]
    assert quantizer.to_integer(x).codes.tolist() == expected
    torch.testing.assert_close(quantizer(x), torch.tensor(expected) / steps)
