"""Warnings of quantizers that do not learn."""

import logging

import torch
from helpers import QUANT, calibrated, make_batch, make_model
from quantization.specs import ready

from aqdet.engine.hooks.quantizer_watch import QuantizerWatchHook
from aqdet.layers import QuantConvTranspose2d
from aqdet.quantization import QuantSpec, calibrate, name_quantizers, quantizers


class StandIn:
    def __init__(self, model):
        self.model, self.start_iter, self.iter, self.max_iter = model, 0, 99, 1000


def test_scales_at_their_floor_and_weights_of_one_value_are_warned_about_once(caplog):
    model = calibrated(make_model(*QUANT), make_batch())
    watch = QuantizerWatchHook(period=100)
    watch.trainer = StandIn(model)

    def warnings():
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    with caplog.at_level(logging.WARNING):
        watch.before_step()
        scales = dict(quantizers(model))
        with torch.no_grad():
            for quantizer in scales.values():
                for parameter in quantizer.parameters():
                    parameter.mul_(1.01)
        watch.after_step()
        assert not warnings()
        with torch.no_grad():
            scales["backbone.fpn_output3.input_quantizer"].scale.fill_(-1e-12)
            model.head.cls_subnet[0].weight.zero_()
        watch.trainer.iter = 100
        watch.after_step()  # not in the period
        assert not warnings()
        for watch.trainer.iter in (199, 299, 999):
            watch.after_step()
    assert warnings() == [
        "1 quantizers have a scale at its floor, below which it cannot shrink: backbone.fpn_output3.input_quantizer",
        "1 layers have one quantized value for all their weights, and so no function: head.cls_subnet.0",
    ]


def test_a_scale_at_its_floor_is_seen_where_there_is_no_uniform_grid(caplog):
    model = torch.nn.ModuleDict(
        {"a": ready(QuantSpec("lsqodd", 2, "weight")), "b": ready(QuantSpec("lqnet", 2, "input"))}
    )
    name_quantizers(model)
    watch = QuantizerWatchHook(period=100)
    watch.trainer = StandIn(model)
    with caplog.at_level(logging.WARNING):
        watch.before_step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        watch.after_step()
        assert "at its floor" not in caplog.text
        with torch.no_grad():
            model["a"].scale.fill_(-1.0)
        watch.trainer.iter = 199
        watch.after_step()
    assert "1 quantizers have a scale at its floor, below which it cannot shrink: a" in caplog.text


def test_scales_that_explode_or_stand_still_are_warned_about_once(caplog):
    model = calibrated(make_model(*QUANT), make_batch())
    watch = QuantizerWatchHook(period=100)
    watch.trainer = StandIn(model)
    watch.before_step()
    still, shrunk, grown = [name for name, q in quantizers(model) if hasattr(q, "scale")][:3]
    with torch.no_grad():
        for name, quantizer in quantizers(model):
            for parameter in quantizer.parameters():
                parameter.mul_({still: 1, shrunk: 0.2, grown: 3.9}.get(name, 1.001))
    with caplog.at_level(logging.WARNING):
        for watch.trainer.iter in (99, 199, 999):
            watch.after_step()
            with torch.no_grad():
                dict(quantizers(model))[grown].scale[-1] *= 1.1  # one channel of many, from x4.3 on
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [
        f"1 quantizers have a scale that moved by more than x4 since training started (MODEL.QUANT.SCALE_LR, "
        f"SOLVER.BASE_LR): {shrunk}",
        f"1 quantizers have a scale that has not moved since training started: no gradient reaches it: {still}",
        f"1 quantizers have a scale that moved by more than x4 since training started (MODEL.QUANT.SCALE_LR, "
        f"SOLVER.BASE_LR): {grown}",
    ]


def test_a_transposed_convolution_is_seen_by_its_output_channels(caplog):
    """Three channels in and five out: its weight has output channels for the second axis."""
    deconv = torch.nn.ConvTranspose2d(3, 5, 2)
    layer = QuantConvTranspose2d.from_float(deconv, QuantSpec("lsq", 4, "weight", per_channel=True), None)
    model = torch.nn.Sequential(layer)
    calibrate(model, lambda: model(torch.rand(1, 3, 4, 4)))
    name_quantizers(model)
    watch = QuantizerWatchHook(period=100)
    watch.trainer = StandIn(model)
    with caplog.at_level(logging.WARNING):
        watch.before_step()
        for number_of_dead, said in ((0, 0), (4, 0), (5, 1)):
            with torch.no_grad():
                layer.weight_quantizer.scale.mul_(1.01)
                layer.weight[:, :number_of_dead] = 0
            watch.after_step()
            assert sum("one quantized value" in record.getMessage() for record in caplog.records) == said
