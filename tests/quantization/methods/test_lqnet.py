import pytest
import torch
import torch.distributed as dist
from quantization import slow_reference as slow
from quantization.specs import KINDS, NUM_CHANNELS, data, groups, ident, ready
from torch import nn
from torch.utils.checkpoint import checkpoint

from aqdet.layers import QuantConv2d, shared_weights
from aqdet.quantization import QuantSpec, calibrate

SPECS = [
    QuantSpec("lqnet", bits, role, signed=signed, per_channel=per_channel)
    for bits in (2, 3)
    for role, signed, per_channel in KINDS
]
specs = pytest.mark.parametrize("spec", SPECS, ids=ident)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_basis(spec, basis):
    quantizer = ready(spec)
    quantizer.basis.copy_(torch.tensor(basis))
    return quantizer


@specs
def test_forward_and_the_update_are_the_papers_formulas(spec):
    quantizer = ready(spec).train()
    x = data(spec, 1)
    before = quantizer.basis.clone()
    y = quantizer(x)
    assert not torch.equal(quantizer.basis, before)
    for basis, after, xs, ys in zip(before, quantizer.basis, groups(spec, x), groups(spec, y), strict=True):
        levels = slow.basis_levels(basis.tolist(), spec.role == "weight")
        found = [slow.nearest_level(v, levels) for v in xs.tolist()]
        torch.testing.assert_close(ys, torch.tensor([value for value, _ in found]))
        best = slow.least_squares([bits for _, bits in found], xs.tolist())
        expected = [0.9 * v + 0.1 * b for v, b in zip(basis.tolist(), best, strict=True)]
        torch.testing.assert_close(after, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@specs
def test_gradients_are_straight_through(spec):
    quantizer = ready(spec)
    x = (data(spec, 2) * 2).requires_grad_()
    if spec.role == "input":  # before the forward, which moves the basis
        least, largest = quantizer.eval()(torch.tensor([-100.0, 100.0]))
        quantizer.train()
    grad = randn(*x.shape, seed=3)
    quantizer(x).backward(grad)
    expected = grad
    if spec.role == "input":
        expected = grad * ((x > least) & (x <= largest))
        assert (expected == 0).any()
    assert torch.equal(x.grad, expected)
    assert not list(quantizer.parameters())


def test_weights_by_hand():
    quantizer = with_basis(QuantSpec("lqnet", 2, "weight"), [[1.0, 3.0]])
    x = torch.tensor([-9.0, -3.0, -2.9, 0.0, 0.1, 3.0, 3.1])
    assert quantizer(x).tolist() == [-4, -4, -2, -2, 2, 2, 4]
    # B'B = [[7, 1], [1, 7]], B'x = (9 - 3 + ...): by the formula, least squares of the codes.
    rows = [[-1, -1], [-1, -1], [1, -1], [1, -1], [-1, 1], [-1, 1], [1, 1]]
    best = slow.least_squares(rows, x.tolist())
    assert quantizer.basis[0].tolist() == pytest.approx([0.9 * 1 + 0.1 * best[0], 0.9 * 3 + 0.1 * best[1]], rel=1e-4)


@pytest.mark.parametrize("signed", (True, False))
def test_zero_is_a_value_of_activations_and_padding_is_zero(signed):
    spec = QuantSpec("lqnet", 3, "input", signed=signed)
    quantizer = with_basis(spec, [[0.31, 0.77, -1.9 if signed else 1.9]])
    assert quantizer(torch.zeros(4)).tolist() == [0] * 4
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    layer = QuantConv2d.from_float(conv, QuantSpec("lsq", 8, "weight"), spec)
    calibrate(layer, lambda: layer(torch.ones(1, 1, 1, 1)))
    nn.init.constant_(layer.weight, 100.0)
    layer.weight.data[..., 1, 1] = 0
    assert layer(torch.ones(1, 1, 1, 1)).item() == 0


def test_an_unsigned_site_includes_the_relu_even_with_a_level_below_zero():
    quantizer = with_basis(QuantSpec("lqnet", 2, "input", signed=False), [[3.0, -1.0]]).eval()
    x = randn(100).requires_grad_()
    y = quantizer(x)
    assert torch.equal(y, quantizer(x.relu())) and (y >= 0).all()
    y.sum().backward()
    assert not x.grad[x < 0].any()


def test_the_basis_learns_in_training_with_gradients_only():
    quantizer = ready(QuantSpec("lqnet", 2, "weight"))
    before, x = quantizer.basis.clone(), randn(200) * 3
    quantizer.eval()(x)
    with torch.no_grad():
        quantizer.train()(x)
    quantizer.enabled = False
    quantizer(x)
    assert torch.equal(quantizer.basis, before)
    quantizer.enabled = True
    quantizer(x)
    assert not torch.equal(quantizer.basis, before)


@pytest.mark.parametrize("bits", (2, 4))
def test_training_forwards_converge_to_less_error_than_uniform_levels(bits):
    # Clusters at distances that equidistant levels do not have.
    x = torch.cat([randn(200, seed=i) * 0.1 + c for i, c in enumerate((-1, -0.1, 0.1, 1))])
    uniform = ready(QuantSpec("lsq", bits, "weight"), x)
    quantizer = ready(QuantSpec("lqnet", bits, "weight"), x)

    def error(q):
        with torch.no_grad():
            return (q(x) - x).square().mean().item()

    before = error(quantizer)
    for _ in range(60):
        quantizer(x)
    assert error(quantizer) <= 1.001 * before < error(uniform)


@pytest.mark.parametrize("value", (0.0, 0.7, -3.0, 1e-30, 1e30))
@specs
def test_singular_cases_stay_finite(spec, value):
    x = torch.full((NUM_CHANNELS, 4), value)
    if not spec.signed:
        x = x.abs()
    for calibrated_on in (x, None):
        quantizer = ready(spec, calibrated_on)
        for _ in range(50):
            y = quantizer(x)
        assert quantizer.basis.isfinite().all() and y.isfinite().all()
        if (abs(value) < 10 and calibrated_on is not None) or value == 0.7:
            torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3 * abs(value) + 0.05)
    # A dead channel that wakes up finds its levels.
    x = data(spec)
    for _ in range(100):
        y = quantizer(x)
    if abs(value) < 10:
        assert (y - x).square().mean() < 0.5 * x.square().mean()


def test_what_the_data_does_not_determine_stays():
    # All values get the code (-1, 1): the difference of the basis values is determined, the sum is not.
    quantizer = with_basis(QuantSpec("lqnet", 2, "weight"), [[1.0, 3.0]])
    quantizer(torch.full((1000,), 2.5))
    assert quantizer.basis[0].tolist() == pytest.approx([0.975, 3.025], rel=1e-5)


@specs
def test_values_that_are_not_finite_do_not_stay(spec):
    quantizer = ready(spec)
    x = data(spec)
    x.view(-1)[0] = float("inf")
    quantizer(x)
    assert quantizer.basis.isfinite().all()


def test_there_is_no_integer_form():
    quantizer = ready(QuantSpec("lqnet", 2, "input"))
    quantizer.name = "head.cls_subnet.0.input_quantizer"
    assert quantizer.grid() is None
    words = r"'head\.cls_subnet\.0\.input_quantizer' \(lqnet\) has no uniform integer form: train this layer with lsq"
    with pytest.raises(ValueError, match=words):
        quantizer.to_integer(torch.zeros(3))


@pytest.mark.parametrize("input_method", ("lsq", "lqnet"))
def test_in_a_convolution_the_basis_moves_once_a_step(input_method):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    weight = QuantSpec("lqnet", 3, "weight", per_channel=True)
    layer = QuantConv2d.from_float(conv, weight, QuantSpec(input_method, 3, "input"))
    x = randn(2, 3, 6, 6).requires_grad_()
    calibrate(layer, lambda: layer(x))
    layer.weight.data.mul_(1.3)
    before = layer.weight_quantizer.basis.clone()
    layer.weight_quantizer.eval()
    quantized = layer.weight_quantizer(layer.weight).detach()
    with torch.no_grad():
        expected = torch.conv2d(layer.input_quantizer(x), quantized, layer.bias, padding=1)
    layer.train()
    y = layer(x)
    torch.testing.assert_close(y, expected)
    after = layer.weight_quantizer.basis.clone()
    assert not torch.equal(after, before)
    y.square().sum().backward()
    assert torch.equal(layer.weight_quantizer.basis, after)
    assert layer.weight.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


def test_a_head_over_levels_updates_its_weights_basis_once():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    layer = QuantConv2d.from_float(conv, QuantSpec("lqnet", 2, "weight"), QuantSpec("lqnet", 2, "input"))
    x = randn(1, 3, 4, 4)
    calibrate(layer, lambda: layer(x))
    calls = []
    layer.weight_quantizer.register_forward_hook(lambda *_: calls.append(layer.weight_quantizer.basis.clone()))
    with shared_weights(layer):
        outputs = [layer(x), layer(x)]
    assert len(calls) == 1
    sum(y.sum() for y in outputs).backward()
    assert len(calls) == 1


def test_an_iteration_over_levels_moves_an_input_basis_once_by_the_data_of_all():
    spec = QuantSpec("lqnet", 2, "input", signed=False)
    levels, one = (ready(spec, randn(100)).train() for _ in range(2))
    start = levels.basis.clone()
    xs = [torch.full((2, 40 // 4**i), 0.3 * (i + 1), requires_grad=True) for i in range(3)]
    for _ in range(2):
        outputs = [levels(x) for x in xs]
        one_output = one(torch.cat([x.flatten() for x in xs]))
        # The codes are the same: all calls of the iteration moved the basis together, not one after the other.
        torch.testing.assert_close(levels.basis, one.basis)
        torch.cat([*(y.flatten() for y in outputs), one_output]).sum().backward()
    assert not torch.allclose(levels.basis, start)


def test_activations_update_by_the_data_of_all_ranks(monkeypatch):
    spec, sent = QuantSpec("lqnet", 2, "input"), []
    mine, theirs, one = (ready(spec, randn(100)) for _ in range(3))
    weight = ready(QuantSpec("lqnet", 2, "weight"), randn(100))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.clone()))
    theirs(randn(80, seed=1))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(sent[0]))
    mine(randn(50, seed=0))
    # Weights are the same on all ranks.
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: pytest.fail("sent weights"))
    weight(randn(100))
    monkeypatch.undo()
    one(torch.cat([randn(50, seed=0), randn(80, seed=1)]))
    torch.testing.assert_close(mine.basis, one.basis)
    assert not torch.allclose(mine.basis, theirs.basis)


def lqnet_layers():
    """Two convolutions, calibrated, and their input."""
    specs = QuantSpec("lqnet", 2, "weight", per_channel=True), QuantSpec("lqnet", 2, "input")
    torch.manual_seed(0)
    layers = nn.Sequential(*(QuantConv2d.from_float(nn.Conv2d(3, 3, 3, padding=1), *specs) for i in range(2)))
    x = randn(2, 3, 6, 6)
    calibrate(layers, lambda: layers(x))
    return layers, x


def lqnet_step(layers, run, x):
    layers.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad.clone() for n, p in layers.named_parameters()}}


@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
def test_activation_checkpointing_computes_with_the_same_basis_and_moves_it_once(reentrant):
    results, states = [], []
    for through in (False, True):
        layers, x = lqnet_layers()
        run = (lambda x, f=layers: checkpoint(f, x, use_reentrant=reentrant)) if through else layers
        results.append([lqnet_step(layers, run, x) for _ in range(3)])
        states.append(layers.state_dict())
    for actual, expected in zip(*reversed(results), strict=True):
        assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


def test_activation_checkpointing_of_weights_that_get_no_gradient():
    layers, x = lqnet_layers()
    layers[0].requires_grad_(False)
    for _ in range(3):
        checkpoint(layers, x, use_reentrant=False).sum().backward()


def test_activation_checkpointing_of_one_of_several_forwards_is_refused():
    layers, x = lqnet_layers()
    layers(x.requires_grad_()).sum().backward()
    outputs = [checkpoint(layers, value, use_reentrant=False) for value in (x, x + 1)]
    words = r"'0\.input_quantizer' \(lqnet\) moved its basis 2 times .* use another MODEL\.QUANT\.INPUT\.QUANTIZER"
    with pytest.raises(RuntimeError, match=words):
        sum(y.sum() for y in outputs).backward()
