"""Channels last, which a GPU has in half precision, is a matter of memory alone."""

from types import SimpleNamespace

import torch
from helpers import AUX, QUANT, calibrated, gradients, make_batch, make_cfg, make_model

from aqdet.engine.layout import laid_out

KEYS = (*QUANT, *AUX, "MODEL.AUX.TAPS", "both", "MODEL.FPN.RELU", "True")
LAST = {"memory_format": torch.channels_last}


def test_a_gpu_in_half_precision_alone_has_channels_last(monkeypatch):
    asked = []
    for amp, cuda in ((False, True), (True, False), (True, True)):
        model = SimpleNamespace(parameters=lambda cuda=cuda: iter([SimpleNamespace(is_cuda=cuda)]), to=lambda **k: asked.append(k))  # fmt: skip  # noqa: E501
        assert laid_out(model, make_cfg("SOLVER.AMP.ENABLED", str(amp))) is model
    assert asked == [LAST]


def test_a_step_with_channels_last_is_the_step():
    batch, found = make_batch(), []
    for layout in ({}, LAST):
        torch.manual_seed(0)
        model = make_model(*KEYS).to(**layout).double()
        seen = []
        model.head.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.extend(inputs[0]))
        found.append(gradients(calibrated(model, batch), batch))
        assert not layout or all(x.is_contiguous(**LAST) for x in seen)
    for own, other in zip(*found, strict=True):
        for name, value in own.items():
            difference = (other[name] - value).abs().max()
            assert difference <= 1e-6 * value.abs().max() + 1e-12, name
