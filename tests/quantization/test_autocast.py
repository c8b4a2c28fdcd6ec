import pytest
import torch
from quantization.specs import ready

from aqdet.quantization import QuantSpec, conv2d_fake_quantized

GEOMETRY = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


def step(rule: str, autocast: bool, dtype: torch.dtype | None, quantized_inside: bool):
    """Output and gradients of one convolution; the backward runs outside of autocast, as it should."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator) for s in ((2, 4, 9, 8), (6, 4, 3, 3)))
    quantizer = ready(QuantSpec("lsq", 4, "weight", per_channel=True), weight)
    leaves = [x, torch.tensor(0.2), weight, torch.randn(6, generator=generator)]
    for leaf in leaves:
        leaf.requires_grad_()
    inside = {}
    if quantized_inside:
        inside = {"quantize_weight": quantizer, "weight_parameters": (quantizer.scale,)}
        leaves.append(quantizer.scale)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = conv2d_fake_quantized(*leaves[:4], -8, 7, rule=rule, dtype=dtype, **GEOMETRY, **inside)
    y.float().square().sum().backward()
    return [y, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("rule", ("lsq", "pact"))
@pytest.mark.parametrize("quantized_inside", (False, True))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
def test_the_convolution_runs_in_the_dtype_it_is_given(rule, dtype, quantized_inside):
    plain, cast = (step(rule, autocast, dtype, quantized_inside) for autocast in (False, True))
    assert cast[0].dtype == (dtype or torch.float32)
    for a, b in zip(cast, plain, strict=True):
        assert torch.equal(a, b)
    assert all(grad.dtype == torch.float32 for grad in cast[1:])
