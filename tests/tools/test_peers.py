import math
import sys

import benchmark
import benchmark_train
import peers
import pytest
import torch
from helpers import QUANT, make_batch, make_cfg, make_model

from aqdet.layers import QuantConv2d
from aqdet.quantization import QuantSpec, fake_quantize

TORCH_PEERS = [name for name in peers.peers() if name != "Brevitas"]
RELU = ("MODEL.FPN.RELU", "True")


@pytest.mark.parametrize("per_channel, range_", [(True, (-8, 7)), (False, (0, 15))])
def test_tensor_operations_are_lsq(per_channel, range_):
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    spec = QuantSpec("lsq", 4, "weight" if per_channel else "input", signed=per_channel, per_channel=per_channel)
    naive = peers.NaiveLSQ(spec, 6)
    grad = torch.linspace(-1, 1, x.numel()).view_as(x)
    (dx, dscale), y = torch.autograd.grad(naive(x), (x, naive.scale), grad), naive(x)
    scale = naive.scale.detach().clone().requires_grad_()
    expected = fake_quantize(x, scale, *range_, gradient="lsq")
    torch.testing.assert_close(y, expected)
    expected_dx, expected_dscale = torch.autograd.grad(expected, (x, scale), grad)
    torch.testing.assert_close(dx, expected_dx)
    shared = x.numel() // scale.numel()
    torch.testing.assert_close(dscale, expected_dscale / math.sqrt(shared * range_[1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TORCH_PEERS)
def test_replaces_what_aqdet_quantizes_at_the_same_widths(name):
    ours = {path: layer for path, layer in make_model(*QUANT, *RELU).named_modules() if isinstance(layer, QuantConv2d)}
    model = make_model(*RELU)
    peers.convert(model, make_cfg(*QUANT, *RELU), peers.peers()[name])
    theirs = {path: m for path, m in model.named_modules() if isinstance(m, peers.FakeQuantConv2d)}
    assert [path.removesuffix(".0") if path not in ours else path for path in theirs] == list(ours)
    assert not any(type(m) is torch.nn.Conv2d for m in model.modules())
    for layer, own in zip(theirs.values(), ours.values(), strict=True):
        levels = 2**own.weight_quantizer.spec.num_bits
        assert 1 < max(len(row.unique()) for row in layer.quantize_weight(layer.weight)) <= levels
        if own.input_quantizer is None:
            assert isinstance(layer.quantize_input, torch.nn.Identity)
            continue
        spec = own.input_quantizer.spec
        x = torch.linspace(-1 if spec.signed else 0, 1, 4096).view(1, -1, 16, 16)
        assert 2 < len(layer.quantize_input(x).unique()) <= 2**spec.num_bits


def step(name, make_conv=None):
    variant = benchmark_train.build(name, 16, make_batch(2), make_conv)
    variant.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in variant.model.parameters())
    return benchmark_train.saved_bytes(variant), benchmark_train.peak_bytes(variant)


@pytest.fixture(scope="module")
def own():
    return step("LSQ w4a4")


@pytest.mark.parametrize("name", [*TORCH_PEERS, "Brevitas"])
def test_trains_and_keeps_more_than_aqdet(own, name):
    if name == "Brevitas":
        pytest.importorskip("brevitas")
    kept, peak = step(name, peers.peers()[name])
    assert own[0] < kept and own[1] < peak


@pytest.mark.parametrize("installed", [False, True])
def test_brevitas_is_optional(monkeypatch, capsys, installed):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", "--peers", "--threads", "1"])
    called = []
    monkeypatch.setattr(benchmark_train, "train_one", lambda *arguments: called.append(list(arguments[-1])))
    benchmark.main()
    assert called == [[*TORCH_PEERS, *["Brevitas"] * installed]]
    assert ("pip install brevitas" in capsys.readouterr().out) is not installed
