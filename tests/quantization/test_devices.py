"""Quantizers on a device other than the CPU: one without data, which shows that no operation mixes the two."""

import pytest
import torch
from quantization.specs import LATER_SPECS, SPECS, data, ident

from aqdet.quantization import CALIBRATION_METHODS, build_quantizer
from aqdet.quantization.observer import HistogramObserver

ALL = [*SPECS, *LATER_SPECS]


def elsewhere(spec):
    return build_quantizer(spec, num_channels=6).to("meta")


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
@pytest.mark.parametrize("spec", [spec for spec in ALL if spec.role == "input"], ids=ident)
def test_statistics_of_activations_come_from_the_cpu(spec, method):
    observer = HistogramObserver()
    observer.update(data(spec))
    with torch.no_grad():
        elsewhere(spec).set_range(observer.statistics(), method)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("spec", ALL, ids=ident)
def test_a_step(spec, dtype):
    quantizer = elsewhere(spec)
    quantizer._ready = True
    x = data(spec).to("meta", dtype).requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in quantizer.parameters())
