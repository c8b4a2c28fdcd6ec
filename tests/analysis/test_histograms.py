"""Histograms and clipping shares against loops over the values."""

import math

import pytest
import torch
from detectron2.layers import Conv2d
from helpers import QUANT, calibrated, make_batch, make_model
from torch import nn

from aqdet.analysis.histograms import NUM_BINS, activation_histograms, weight_histograms
from aqdet.layers import QuantAdd, QuantConv2d, QuantConvTranspose2d, StreamQuantizer
from aqdet.quantization import QuantSpec, calibrate, quantizers


def make_layer(weight=("lsq", 4), signed=True, per_channel=True, centered=False):
    """A convolution calibrated on less than it will read, so that something is clipped; and its input."""
    torch.manual_seed(0)
    specs = (
        QuantSpec(*weight, "weight", per_channel=per_channel, centered=centered),
        QuantSpec("lsq", 3, "input", signed=signed),
    )
    model = nn.Sequential(QuantConv2d.from_float(Conv2d(3, 5, 3), *specs))
    x = torch.randn(2, 3, 6, 6)
    calibrate(model, lambda: model(x / 2), method="mean")
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 9.0
        model[0].weight[1, 0, 0, 0] = -9.0
    return model, x


def slowly(pairs, quant_min, quant_max):
    """Below, above, level counts and bin counts of (value, scale) pairs, value by value."""
    below = above = 0
    codes, bins = [0] * (quant_max - quant_min + 1), [0] * NUM_BINS
    margin = (quant_max - quant_min) / 4
    width = (quant_max - quant_min + 2 * margin) / NUM_BINS
    for value, scale in pairs:
        ratio = value / scale
        below += ratio < quant_min
        above += ratio > quant_max
        codes[round(min(max(ratio, quant_min), quant_max)) - quant_min] += 1
        bins[min(max(math.floor((ratio - quant_min + margin) / width), 0), NUM_BINS - 1)] += 1
    return below, above, codes, bins


def check(histogram, pairs, quant_min, quant_max):
    below, above, codes, bins = slowly(pairs, quant_min, quant_max)
    assert histogram.below == below / len(pairs) and histogram.above == above / len(pairs)
    assert histogram.used == sum(count > 0 for count in codes)
    assert histogram.quantized.tolist() == list(range(quant_min, quant_max + 1))
    # A value within rounding of an edge may be in either bin.
    assert abs(histogram.counts - bins).sum() <= 0.02 * len(pairs) and histogram.counts.sum() == len(pairs)
    assert len(histogram.edges) == NUM_BINS + 1
    margin = (quant_max - quant_min) / 4
    assert histogram.edges[[0, -1]].tolist() == [quant_min - margin, quant_max + margin]


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights(per_channel):
    model, _ = make_layer(per_channel=per_channel)
    histogram = weight_histograms(model)["0.weight_quantizer"]
    scale = model[0].weight_quantizer.scale.tolist() * (1 if per_channel else 5)
    pairs = [(v, scale[i]) for i, row in enumerate(model[0].weight) for v in row.flatten().tolist()]
    check(histogram, pairs, -8, 7)
    assert histogram.below > 0 and histogram.above > 0 and histogram.unit == "steps"


def test_weights_of_a_transposed_convolution():
    torch.manual_seed(0)
    weight = QuantSpec("lsq", 4, "weight", per_channel=True)
    layer = QuantConvTranspose2d.from_float(nn.ConvTranspose2d(3, 5, 2), weight, None)
    model = nn.Sequential(layer)
    calibrate(model, lambda: model(torch.rand(1, 3, 4, 4)))
    scale = layer.weight_quantizer.scale.tolist()
    pairs = [(v, scale[i]) for i in range(5) for v in layer.weight[:, i].flatten().tolist()]
    check(weight_histograms(model)["0.weight_quantizer"], pairs, -8, 7)


@pytest.mark.parametrize("signed, quant_min, quant_max", [(True, -4, 3), (False, 0, 7)])
def test_activations_of_two_forwards(signed, quant_min, quant_max):
    model, x = make_layer(signed=signed)
    histogram = activation_histograms(model, lambda: (model(x), model(2 * x)))["0.input_quantizer"]
    scale = model[0].input_quantizer.scale.item()
    values = [*x.flatten().tolist(), *(2 * x).flatten().tolist()]
    check(histogram, [(value, scale) for value in values], quant_min, quant_max)
    assert histogram.above > 0.01 and histogram.below > (0.01 if signed else 0.4)
    before = model(x)
    assert not model[0]._forward_pre_hooks and torch.equal(before, model(x))


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_method_without_a_grid_is_shown_on_its_own_values(per_channel):
    model, _ = make_layer(weight=("dorefa", 3), per_channel=per_channel)
    histogram = weight_histograms(model)["0.weight_quantizer"]
    quantized = model[0].weight_quantizer(model[0].weight)
    largest = quantized.abs().flatten(1).amax(1).view(-1, 1, 1, 1) if per_channel else torch.ones(())
    distinct = sorted({round(v, 4) for v in (quantized / largest).flatten().tolist()})
    assert histogram.quantized.round(4).tolist() == pytest.approx(distinct, abs=2e-4)
    assert histogram.unit == "values" and histogram.below is None and histogram.above is None
    assert histogram.used == len(distinct) <= 8 and histogram.counts.sum() == model[0].weight.numel()


def test_weights_are_shown_without_the_mean_that_is_subtracted():
    found = []
    for shift in (0.0, 5.0):
        model, _ = make_layer(weight=("lsqodd", 2), centered=True)
        with torch.no_grad():
            model[0].weight += shift
        found.append(weight_histograms(model)["0.weight_quantizer"])
    assert found[0].quantized == pytest.approx([-1, -1 / 3, 1 / 3, 1], abs=1e-4)
    assert found[1].quantized == pytest.approx(found[0].quantized, abs=1e-4)
    assert abs(found[1].counts - found[0].counts).sum() <= 4  # at the edges of bins, by rounding
    assert found[1].used == 4


@pytest.mark.parametrize("method", ["lqnet", "n2uq"])
def test_learned_levels_and_thresholds(method):
    torch.manual_seed(0)
    stream = StreamQuantizer(relu=False, signed=True)
    stream.quantize(method, 2)
    model, x = nn.Sequential(stream), torch.randn(50)
    calibrate(model, lambda: model(x))
    histogram = activation_histograms(model.eval(), lambda: model(x))["0.quantizer"]
    assert histogram.quantized == pytest.approx(model(x).detach().unique().numpy(), abs=1e-4)
    assert histogram.used == 4 and histogram.unit == "values" and histogram.counts.sum() == 50


def test_sums_and_streams_are_read_before_their_quantizer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add, self.stream = QuantAdd(signed=(True, False)), StreamQuantizer(relu=True)
            self.add.quantize("pact", 8)
            self.stream.quantize("pact", 8)

        def forward(self, x, y):
            return self.stream(self.add(x, y))

    model, x, y = Model(), torch.tensor([-3.0, -1.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 0.5, 4.0])
    calibrate(model, lambda: model(x, y), method="minmax")
    found = activation_histograms(model, lambda: model(0.9 * x, 0.9 * y))
    assert set(found) == {"add.x_quantizer", "add.y_quantizer", "stream.quantizer"}
    assert found["add.x_quantizer"].below == found["add.y_quantizer"].below == 0
    assert found["stream.quantizer"].below == 0.5  # the ReLU's work: two sums are negative
    assert found["add.y_quantizer"].used == 4


def test_values_that_are_not_finite_are_named():
    model, x = make_layer()
    with pytest.raises(ValueError, match="0.input_quantizer reads values that are not finite"):
        activation_histograms(model, lambda: model(x * math.inf))
    assert not model[0]._forward_pre_hooks


def test_a_detector_has_a_histogram_for_every_quantizer():
    model = calibrated(make_model(*QUANT, "MODEL.FPN.RELU", "True"), make_batch()).eval()
    found = {**weight_histograms(model), **activation_histograms(model, lambda: model(make_batch()))}
    assert set(found) == {name for name, _ in quantizers(model)}
    for path, histogram in found.items():
        assert histogram.name == path and histogram.counts.sum() > 0


def test_without_calibration_there_is_nothing_to_show():
    model = make_model(*QUANT)
    assert weight_histograms(model) == {} and activation_histograms(model, lambda: None) == {}
    assert weight_histograms(make_model()) == {}
