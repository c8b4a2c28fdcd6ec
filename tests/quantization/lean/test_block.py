"""Norms, pooling and recipes: the same values and gradients as plain layers, less memory."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, CycleBatchNormList
from torch import nn
from torch.utils.checkpoint import checkpoint

from aqdet.layers import LevelNorms, QuantConv2d, StreamQuantizer, max_pool2d, relu_before, run_chain
from aqdet.quantization import QuantSpec, calibrate, fake_quantize, use_kernels
from aqdet.quantization.kernels import free_norms, keeping_less
from aqdet.quantization.lean import conv as lean_conv
from aqdet.quantization.lean.norm import computed, defer
from aqdet.quantization.lean.recipe import Recipe, note_recipe, recipe_of

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
SHAPES = {"small": (2, 6, 5, 7), "in parts": (3, 16, 90, 80)}
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)
all_shapes = pytest.mark.parametrize("shape", SHAPES)
METHODS = ("lsq", "pact", "dorefa")


def normalize(norm, x):
    return computed(defer(norm, x))


def batch_norm(channels, levels=None, **kwargs):
    norm = levels(3, num_features=channels) if levels else nn.BatchNorm2d(channels, **kwargs)
    with torch.no_grad():
        for number, each in enumerate(norm if levels is LevelNorms else [norm]):
            each.weight.copy_(torch.linspace(0.5, 2 + number, channels))
            each.bias.copy_(torch.linspace(-1, 1 + number, channels))
    return norm


def activation(shape, layout, seed=0):
    x = torch.randn(SHAPES[shape], generator=torch.Generator().manual_seed(seed)) * 2 + 1
    return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@all_layouts
@all_shapes
@pytest.mark.parametrize("levels", (None, CycleBatchNormList, LevelNorms))
def test_normalize_is_the_norm(layout, shape, levels):
    norm = batch_norm(SHAPES[shape][1], levels)
    other = copy.deepcopy(norm)
    for seed in range(2):
        x, y = activation(shape, layout, seed), activation(shape, layout, seed)
        ours, theirs = normalize(norm, x), other(y)
        grad = torch.randn_like(theirs)
        ours.backward(grad), theirs.backward(grad)
        close(ours, theirs)
        close(x.grad, y.grad)
        # The note gives the output back to the bit.
        base, scale, shift, _ = recipe_of(ours)
        assert base.data_ptr() == x.data_ptr()
        assert torch.equal(base * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1), ours)
    for a, b in zip(norm.parameters(), other.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-2)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in norm.state_dict().items())
    if levels:
        assert norm._pos == other._pos == 2


@pytest.mark.parametrize(
    "norm",
    [
        batch_norm(6).eval(),
        batch_norm(6, momentum=None),
        batch_norm(6, track_running_stats=False),
        nn.GroupNorm(2, 6),
        nn.BatchNorm2d(6, affine=False),
    ],
    ids=("eval", "cumulative", "no running statistics", "group norm", "no affine"),
)
def test_any_other_norm_is_called(norm):
    x = activation("small", "contiguous")
    y = normalize(norm, x)
    assert recipe_of(y).base is y and torch.equal(y, copy.deepcopy(norm)(x))
    with torch.no_grad():
        y = normalize(batch_norm(6), x)
    assert recipe_of(y).base is y


def test_one_value_a_channel_is_refused_as_ever():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        normalize(batch_norm(6), torch.randn(1, 6, 1, 1, requires_grad=True))


def test_a_change_in_place_ends_a_recipe():
    x = torch.randn(4, requires_grad=True)
    y = note_recipe(x * 2, Recipe(x.detach(), torch.tensor(2.0)))
    assert recipe_of(y).base is not y
    y.relu_()
    assert recipe_of(y).base is y
    assert recipe_of(copy.copy(x)).base is not x and recipe_of(x).base is x


@all_layouts
@all_shapes
@pytest.mark.parametrize("gradient", ("lsq", "pact"))
@pytest.mark.parametrize("low, high", [(0, 15), (-8, 7)])
def test_gradients_from_a_recipe_are_those_from_the_tensor(layout, shape, gradient, low, high):
    """To the bit: what is computed again is what was there. By channel, and from bytes."""
    generator = torch.Generator().manual_seed(0)
    channels = SHAPES[shape][1]
    scale, shift = torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)
    z = activation(shape, layout).detach()
    codes = (z * 20).round().clamp(-128, 127).to(torch.int8)
    for recipe in (Recipe(z, scale, shift), Recipe(codes, torch.tensor(0.07))):
        view = (lambda t: t) if recipe.shift is None else (lambda t: t.view(1, -1, 1, 1))
        x = recipe.base * view(recipe.scale)
        x = x if recipe.shift is None else x + view(recipe.shift)
        grad = torch.randn(x.shape, generator=generator).contiguous(memory_format=LAYOUTS[layout])
        results = []
        for noted in (False, True):
            leaf, step = x.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
            node = leaf.view_as(leaf)
            if noted:
                note_recipe(node, recipe)
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, to=kept: to.append(t.data_ptr()) or t, lambda t: t):
                y = fake_quantize(node, step, low, high, gradient=gradient)
            assert (node.data_ptr() in kept) == (gradient == "lsq" and not noted)
            y.backward(grad)
            results.append((y, leaf.grad, step.grad))
        assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
        torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-4, atol=1e-2)


@all_layouts
@pytest.mark.parametrize("size, stride, padding", [(3, 2, 1), (2, 2, 0), (5, 1, 2), (3, 3, 1)])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 3, 9, 8), (1, 2, 7, 2)])
def test_pooling_keeps_two_bytes_of_each_output(layout, size, stride, padding, shape):
    """With ties, of which the first place counts, and where the window is wider than the input."""
    x = torch.randint(-3, 3, shape, generator=torch.Generator().manual_seed(0)).float()
    x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    other, kept = x.detach().clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = max_pool2d(x, kernel_size=size, stride=stride, padding=padding)
    assert [(t.dtype, t.shape) for t in kept] == [(torch.int16, y.shape), (torch.int64, y.shape[2:])]
    expected = F.max_pool2d(other, size, stride, padding)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad), expected.backward(grad)
    assert torch.equal(y, expected) and torch.equal(x.grad, other.grad)


def test_pooling_without_gradients_looks_for_no_places():
    with torch.no_grad():
        y = max_pool2d(torch.randn(1, 1, 3, 8, requires_grad=True), kernel_size=3, stride=2, padding=1)
    assert "_MaxPool2d" not in str(max_pool2d(torch.randn(1, 1, 3, 8), kernel_size=3, stride=2, padding=1).grad_fn)
    assert y.shape == (1, 1, 2, 4)


def test_pooling_of_an_input_too_wide_for_two_bytes_is_as_ever():
    y = max_pool2d(torch.randn(1, 1, 3, 12000, requires_grad=True), kernel_size=3, stride=2, padding=1)
    assert "MaxPool2DWithIndices" in str(y.grad_fn)


class Block(nn.Module):
    """conv, norm, ReLU, quantized conv, norm, quantized stream, which two convolutions read."""

    def __init__(self, method):
        super().__init__()
        torch.manual_seed(0)

        def layer(signed):
            specs = QuantSpec(method, 4, "weight", per_channel=True), QuantSpec(method, 4, "input", signed=signed)
            return QuantConv2d.from_float(Conv2d(4, 4, 3, padding=1, bias=False, norm=batch_norm(4)), *specs)

        self.first, self.second, self.third, self.fourth = (layer(signed) for signed in (True, False, False, False))
        self.stream = StreamQuantizer(relu=True)
        self.stream.quantize("pact", 8)

    def forward(self, x):
        x = relu_before(self.second.input_quantizer, self.first(x), inplace=True)
        x = self.stream(self.second(x))
        return self.third(x) + self.fourth(x)


def plain_forward(block, x):
    """The same from parts that keep all they need themselves."""

    def layer(conv, x):
        return conv.norm(F.conv2d(conv.input_quantizer(x), conv.weight_quantizer(conv.weight), padding=1))

    x = block.stream.quantizer(layer(block.second, layer(block.first, x).relu()).relu())
    return layer(block.third, x) + layer(block.fourth, x)


def step(block, run, x, autocast=False):
    block.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = run(x)
    (y.float().square() * torch.linspace(0, 1, y.numel()).view(y.shape)).sum().backward()
    return {"y": y, "x": x.grad, **{n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("integer", (False, True), ids=("float", "integer"))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("through", ("plain", "checkpoint", "deepcopy", "pickle"))
def test_a_block_has_the_gradients_of_its_parts(method, through, integer, monkeypatch):
    if not integer:
        monkeypatch.setattr(lean_conv, "largest_integer_weight", lambda _: 0)
    block, x = Block(method), torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
    calibrate(block, lambda: block(x))
    expected = step(block, lambda x: plain_forward(block, x), x)
    if through == "deepcopy":
        block = copy.deepcopy(block)
    elif through == "pickle":
        block = pickle.loads(pickle.dumps(block))
    run = (lambda x: checkpoint(block, x, use_reentrant=False)) if through == "checkpoint" else block
    actual = step(block, run, x)
    assert set(actual) == set(expected)
    for name, want in expected.items():
        torch.testing.assert_close(actual[name], want, rtol=1e-5, atol=1e-5 * want.abs().max().item(), msg=name)


@pytest.mark.parametrize("is_lean", (True, False))
def test_activation_checkpointing_of_an_affine_for_each_level_is_refused(is_lean):
    """Which level is computed once more is not known."""
    norm, x = batch_norm(6, LevelNorms), activation("small", "contiguous")
    y = checkpoint(normalize if is_lean else norm, *([norm] * is_lean), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="set MODEL.HEAD_LEVEL_AFFINE False"):
        y.sum().backward()


@pytest.mark.parametrize("levels", (None, CycleBatchNormList))
def test_activation_checkpointing_leaves_running_statistics_and_position_as_one_forward_does(levels):
    norms = [batch_norm(6, levels), batch_norm(6, levels)]
    for norm, through in zip(norms, (False, True), strict=True):
        for seed in range(2):
            x = activation("small", "contiguous", seed)
            y = checkpoint(normalize, norm, x, use_reentrant=False) if through else normalize(norm, x)
            y.square().sum().backward()
    plain, other = (norm.state_dict() for norm in norms)
    assert all(torch.equal(other[key], value) for key, value in plain.items())
    if levels:
        assert norms[1]._pos == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_block_under_autocast(method):
    block, x = Block(method), torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
    calibrate(block, lambda: block(x))
    exact, cast = step(block, block, x), step(block, block, x, autocast=True)
    assert all(torch.isfinite(value).all() for value in cast.values())
    assert F.cosine_similarity(cast["y"].float().flatten(), exact["y"].flatten(), dim=0) > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_a_block_under_autocast_has_the_gradients_of_its_parts(method):
    """To the bit: what backward quantizes again is what the forward has quantized, rounded as it was."""
    block, x = Block(method), torch.randn(4, 4, 40, 40, generator=torch.Generator().manual_seed(1))
    calibrate(block, lambda: block(x))
    actual = step(block, block, x, autocast=True)
    expected = step(block, lambda x: plain_forward(block, x), x, autocast=True)
    assert set(actual) == set(expected) and all(torch.equal(actual[name], value) for name, value in expected.items())


def test_what_a_block_keeps():
    """The input and, of each convolution in it, the output; beside these a byte or two of the stream's."""
    block, x = Block("lsq"), torch.randn(2, 4, 9, 8, requires_grad=True)
    calibrate(block, lambda: block(x.detach()))
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    parameters = {p.data_ptr() for p in block.parameters()}
    large = [t for pointer, t in kept.items() if t.numel() == x.numel() and pointer not in parameters]
    sizes = sorted(t.element_size() for t in large)
    assert sizes == [1, 1, 4, 4, 4, 4, 4]


def test_a_float_convolution_behind_a_norm_computes_its_input_again():
    """As in the auxiliary path's head: the same values and gradients, and nothing is kept between norm and conv."""
    found, kept = [], []
    for kernels in ("plain", "lean"):
        torch.manual_seed(0)
        convs = [nn.Conv2d(6, 6, 3, padding=1, bias=number == 2) for number in range(3)]
        layers = [convs[0], batch_norm(6), nn.ReLU(), convs[1], batch_norm(6), nn.ReLU(), convs[2]]
        x, saved = activation("in parts", "contiguous")[:, :6].detach().requires_grad_(), {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.update({t.data_ptr(): t.numel()}) or t, lambda t: t)  # fmt: skip  # noqa: E501
        with use_kernels(kernels), free_norms(), hooks:
            y = run_chain(layers, x)
        y.square().sum().backward()
        parameters = nn.ModuleList(layers).parameters()
        found.append([y.detach(), x.grad, *(p.grad for p in parameters)])
        kept.append(sum(saved.values()))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert kept[1] < 0.8 * kept[0]


@all_layouts
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("then", ((), (nn.ReLU(),)), ids=("norm", "ReLU"))
def test_a_float_1x1_convolution_is_computed_again(layout, stride, then):
    """As the auxiliary path's projections: its output is not kept, and of its input the places that it reads."""
    found, kept = [], []
    for kernels in ("plain", "lean"):
        torch.manual_seed(0)
        conv = Conv2d(16, 16, 1, stride=stride, bias=False, norm=batch_norm(16))
        x, saved = activation("in parts", layout), {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.update({t.data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t)  # fmt: skip  # noqa: E501
        with use_kernels(kernels), free_norms(), hooks:
            y = run_chain([conv, *then], x * 1)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        found.append([y.detach(), x.grad, *(p.grad for p in conv.parameters()), *conv.norm.buffers()])
        kept.append(sum(saved.values()))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert kept[1] < (0.6 if stride == 1 else 0.3) * kept[0]


@all_layouts
def test_a_stem_is_computed_again_from_the_image(layout):
    """What the convolution gives is kept by neither the norm nor the pooling."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 64, 64, generator=generator).contiguous(memory_format=LAYOUTS[layout])
    specs = QuantSpec("lsq", 8, "weight", per_channel=True), None
    found, kept = [], []
    stem = QuantConv2d.from_float(Conv2d(3, 16, 7, 2, 3, bias=False, norm=batch_norm(16)), *specs)
    calibrate(stem, lambda: stem(image))
    state = copy.deepcopy(stem.state_dict())
    for kernels in ("plain", "lean"):
        stem.load_state_dict(state), stem.zero_grad()
        saved = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.update({t.data_ptr(): t.nbytes}) or t, lambda t: t)  # fmt: skip  # noqa: E501
        with use_kernels(kernels), keeping_less(), hooks:
            y = max_pool2d(stem(image), kernel_size=3, stride=2, padding=1)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        found.append([y.detach(), *(p.grad for p in stem.parameters()), *stem.norm.buffers()])
        kept.append(sum(saved.values()))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert kept[1] < image.nbytes + 2 * y.numel() + 8 * y[0, 0].numel() + 4 * sum(p.nbytes for p in stem.parameters())


@pytest.mark.parametrize("case", ["eval", "GN", "bias", "half"])
def test_elsewhere_a_1x1_convolution_is_as_ever(case):
    norm = {"GN": nn.GroupNorm(2, 16)}.get(case, batch_norm(16))
    conv = Conv2d(16, 16, 1, bias=case == "bias", norm=norm).train(case != "eval")
    with free_norms(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "half"):
        y = run_chain([conv], activation("in parts", "contiguous"))
    assert "_NormBehind" not in str(y.grad_fn)


@pytest.mark.parametrize("case", ["GN", "eval", "no_grad", "half"])
def test_a_stem_that_is_not_computed_again_quantizes_its_weight_once(case):
    """As LQ-Nets, whose basis moves with each quantization in training."""
    norm = nn.GroupNorm(2, 8) if case == "GN" else batch_norm(8)
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    specs = QuantSpec("lqnet", 3, "weight", per_channel=True), None
    stem = QuantConv2d.from_float(Conv2d(3, 8, 3, 2, 1, bias=False, norm=norm), *specs)
    calibrate(stem, lambda: stem(image))
    stem.train(case != "eval")
    calls = []
    stem.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "half")
    with half, keeping_less(), torch.set_grad_enabled(case != "no_grad"):
        stem(image)
    assert len(calls) == 1


@pytest.mark.parametrize("kernel_size, quantized", [(1, False), (3, True)], ids=("1x1", "stem"))
def test_a_backward_under_autocast_convolves_in_the_forwards_precision(kernel_size, quantized):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=not quantized)
    conv = Conv2d(3, 8, kernel_size, bias=False, norm=batch_norm(8))
    if quantized:
        conv = QuantConv2d.from_float(conv, QuantSpec("lsq", 8, "weight", per_channel=True), None)
        calibrate(conv, lambda: conv(x))
    found = []
    for enabled in (False, True):
        conv.zero_grad()
        with free_norms(), keeping_less():
            y = run_chain([conv], x)
        assert "_NormBehind" in str(y.grad_fn)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y.backward(torch.ones_like(y).tril())
        found.append(conv.weight.grad.clone())
    assert torch.equal(*found)
