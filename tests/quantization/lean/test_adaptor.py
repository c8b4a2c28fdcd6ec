"""Adaptors of the auxiliary path, which keep codes of the sums that they read."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from aqdet.layers import QuantAdd, StreamQuantizer, run_chain
from aqdet.modeling.scaffold.adaptor import Adaptor
from aqdet.quantization import calibrate, use_kernels
from aqdet.quantization.kernels import KERNELS, free_norms
from aqdet.quantization.lean.recipe import summed, terms_of

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
SHAPES = {"small": (2, 6, 5, 7), "in parts": (3, 16, 90, 80)}
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)
all_shapes = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(autouse=True)
def without(monkeypatch):
    """A set of kernels like the lean ones, but for what is tested here."""
    monkeypatch.setitem(
        KERNELS, "without", {name: KERNELS["lean"][name] for name in KERNELS["lean"] if name != "adapt"}
    )


@contextlib.contextmanager
def counting_saved(saved):
    """Notes the bytes of each tensor that is kept for backward."""

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def activation(shape, layout, seed):
    x = torch.randn(SHAPES[shape], generator=torch.Generator().manual_seed(seed)) * 2 + 1
    return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def tapped_sum(x, y, add, stream):
    """A block's sum, which a hook of the stream behind it reads, and the output of the stream."""
    taps = []
    handle = stream.register_forward_pre_hook(lambda _, inputs: taps.append(inputs[0]))
    out = run_chain([add, stream], x, lambda: y)
    handle.remove()
    return taps[0], out


@all_layouts
@all_shapes
@pytest.mark.parametrize("with_carried", [False, True])
def test_an_adaptor_keeps_codes_of_a_tapped_sum(layout, shape, with_carried):
    """The codes of the sum's operands, and a byte for its ReLU: the same values and gradients as the plain form's."""
    add, stream = QuantAdd(signed=(True, True)), StreamQuantizer(relu=True)
    add.quantize("pact", 8), stream.quantize("pact", 8)
    adaptor = Adaptor(SHAPES[shape][1], "BN")
    with torch.no_grad():
        adaptor.conv.weight.add_(torch.linspace(-0.2, 0.2, adaptor.conv.weight.numel()).view_as(adaptor.conv.weight))
        adaptor.conv.norm.weight.mul_(-1.5)
    modules = nn.ModuleList([add, stream, adaptor])
    calibrate(modules, lambda: tapped_sum(activation(shape, layout, 1), activation(shape, layout, 2), add, stream))
    state, found, kept = copy.deepcopy(modules.state_dict()), {}, {}
    for kernels in ("plain", "without", "lean"):
        modules.load_state_dict(state)
        x, y, h, saved = *(activation(shape, layout, number) for number in (1, 2, 3)), {}
        modules.zero_grad()
        total, out = tapped_sum(x * 1, y * 1, add, stream)
        assert torch.equal(summed(*terms_of(total)), total) and summed(*terms_of(total)).stride() == total.stride()
        with free_norms(), counting_saved(saved), use_kernels(kernels):
            read = adaptor(total, h if with_carried else None)
        assert (total.data_ptr() in saved) == (kernels != "lean")
        # Not alike at all places, of which a norm has no gradient.
        ((read.square() + out) * torch.linspace(0, 1, read.numel()).view(read.shape)).sum().backward()
        gradients = [p.grad for p in modules.parameters()] + [h.grad] * with_carried
        found[kernels] = [total.detach(), read.detach(), x.grad, y.grad, *gradients, *modules.state_dict().values()]
        kept[kernels] = sum(saved.values())
    assert kept["lean"] < 0.4 * kept["plain"]
    for plain, theirs, ours in zip(found["plain"], found["without"], found["lean"], strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-2)


@all_layouts
def test_it_reads_the_codes_of_a_stream(layout):
    """As adaptors of the pyramid's levels do, which are quantized."""
    stream, adaptor = StreamQuantizer(relu=True), Adaptor(SHAPES["small"][1], "BN")
    stream.quantize("pact", 8)
    x = activation("small", layout, 1)
    calibrate(nn.ModuleList([stream]), lambda: stream(x))
    found = []
    for kernels in ("without", "lean"):
        x.grad, saved = None, {}
        adaptor.zero_grad()
        with free_norms(), use_kernels(kernels):
            level = stream(x * 1)
            with counting_saved(saved):
                adaptor(level).square().sum().backward()
        assert (level.data_ptr() in saved) == (kernels != "lean")
        found.append([x.grad, *(p.grad for p in adaptor.parameters())])
    assert all(torch.equal(ours, theirs) for theirs, ours in zip(*found, strict=True))


@pytest.mark.parametrize("case", ["eval", "GN", "none", "half", "hook", "not free"])
def test_elsewhere_it_is_the_plain_form(case):
    adaptor = Adaptor(32, {"GN": "GN", "none": ""}.get(case, "BN"))
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if case == "eval":
        adaptor.eval()
    calls = []
    if case == "hook":
        adaptor.conv.register_forward_hook(lambda *_: calls.append(1))
    freely = contextlib.nullcontext() if case == "not free" else free_norms()
    with freely, torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "half"):
        state = copy.deepcopy(adaptor.state_dict())
        ours = adaptor(x)
        adaptor.load_state_dict(state)
        with use_kernels("plain"):
            theirs = adaptor(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if case == "half" else 1e-5, atol=1e-5)
    assert "_Adaptor" not in str(ours.grad_fn) and len(calls) == 2 * (case == "hook")


def test_a_change_in_place_ends_the_note_of_a_sums_terms():
    add, stream = QuantAdd(signed=(True, True)), StreamQuantizer(relu=True)
    add.quantize("pact", 8), stream.quantize("pact", 8)
    x, y = activation("small", "contiguous", 1), activation("small", "contiguous", 2)
    calibrate(nn.ModuleList([add, stream]), lambda: run_chain([add, stream], x, lambda: y))
    total, _ = tapped_sum(x, y, add, stream)
    assert terms_of(total) is not None
    total.detach().add_(0)
    assert terms_of(total) is None


def test_a_sum_that_nothing_taps_has_no_codes_made_for_it():
    add, stream = QuantAdd(signed=(True, True)), StreamQuantizer(relu=True)
    add.quantize("pact", 8), stream.quantize("pact", 8)
    x, y = activation("small", "contiguous", 1), activation("small", "contiguous", 2)
    calibrate(nn.ModuleList([add, stream]), lambda: run_chain([add, stream], x, lambda: y))
    assert terms_of(run_chain([add], x, lambda: y)) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert terms_of(tapped_sum(x, y, add, stream)[0]) is None
