"""A detector with the lean kernels and with the plain operations: the same values."""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import AUX, FCOS, QUANT, calibrated, gradients, make_batch, make_model

import aqdet
from aqdet.quantization import KERNELS, fake_quantize, register_kernels, set_kernels, use_kernels
from aqdet.quantization.kernels import plain
from aqdet.quantization.lean import conv

BATCH = make_batch()
FROZEN = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "MODEL.RETINANET.NORM", "", "MODEL.AUX.NORM", "")


def both_ways(*overrides):
    """Losses and gradients of a detector, plain and lean."""
    model = calibrated(make_model(*QUANT, *AUX, *overrides), BATCH).to(memory_format=torch.channels_last)
    for _ in range(3):  # the focal loss is a script whose arithmetic settles after some runs
        gradients(model, BATCH)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    results = []
    for name in ("plain", "lean"):
        model.load_state_dict(state)  # running statistics move
        with use_kernels(name):
            results.append(gradients(model, BATCH))
    return results


@pytest.mark.parametrize("method", ("lsq", "pact", "dorefa"))
def test_without_batch_statistics_a_step_is_the_same_to_the_bit(method, monkeypatch):
    """But for gradients of scales and biases, which are sums of the same terms in another order."""
    monkeypatch.setattr(conv, "largest_integer_weight", lambda _: 0)
    methods = ("MODEL.QUANT.WEIGHT.QUANTIZER", method, "MODEL.QUANT.INPUT.QUANTIZER", method)
    (losses, grads), (lean_losses, lean_grads) = both_ways(*FROZEN, *methods)
    assert set(losses) == set(lean_losses) and all(
        torch.equal(lean_losses[key], value) for key, value in losses.items()
    )
    assert set(grads) == set(lean_grads)
    for name, want in grads.items():
        if name.endswith(("scale", "alpha", "bias")):
            torch.testing.assert_close(lean_grads[name], want, rtol=0, atol=1e-5 * want.abs().max().item(), msg=name)
        else:
            assert torch.equal(lean_grads[name], want), name


@pytest.mark.parametrize("arch", ((), FCOS), ids=("RetinaNet", "FCOS"))
def test_with_batch_norm_and_integers_a_step_differs_by_rounding(arch):
    """A sum in another order can carry a value across the edge between two codes: one step of a 4-bit grid."""
    (losses, grads), (lean_losses, lean_grads) = both_ways(*arch)
    for key, value in losses.items():
        torch.testing.assert_close(lean_losses[key], value, rtol=1e-3, atol=1e-3, msg=key)
    assert set(grads) == set(lean_grads)
    a, b = (torch.cat([g[name].flatten() for name in grads]).double() for g in (grads, lean_grads))
    assert F.cosine_similarity(a, b, dim=0) > 0.999


def test_kernels_are_chosen_by_name_and_put_back():
    calls = []

    def mine(*args, **kwargs):
        calls.append(args)
        return plain("fake_quantize")(*args, **kwargs)

    register_kernels("mine", {"fake_quantize": mine})
    try:
        x, scale = torch.randn(5), torch.tensor(0.5)
        with pytest.raises(ZeroDivisionError), use_kernels("mine"):
            fake_quantize(x, scale, 0, 3)
            raise ZeroDivisionError
        fake_quantize(x, scale, 0, 3)
        assert len(calls) == 1
    finally:
        del KERNELS["mine"]
    with pytest.raises(ValueError, match="kernels must be one of plain, lean, fused, got 'fast'"):
        set_kernels("fast")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (f"{node.module}." if node.module else "")
            yield from (module + alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_nothing_needs_the_lean_kernels_but_one_line():
    package = Path(aqdet.__file__).parent
    # The fused kernels are a set beside them that takes some of theirs.
    files = [path for path in package.rglob("*.py") if not {"lean", "fused"} & set(path.parts)]
    users = [path for path in files if any("lean" in name.split(".") for name in imports_of(path))]
    assert users == [package / "quantization" / "__init__.py"]


def test_quantizers_know_torch_alone_and_layers_nothing_above_them():
    package = Path(aqdet.__file__).parent
    for folder, allowed in (("quantization", ()), ("layers", ("detectron2",))):
        for path in (package / folder).rglob("*.py"):
            depth = len(path.relative_to(package).parts)  # as many dots lead out of the package
            for name in imports_of(path):
                assert not name.startswith("aqdet.") and (allowed or "detectron2" not in name), (path, name)
                above = name.startswith("." * depth) and not name.startswith("..quantization")
                assert not above, (path, name)


def test_the_arithmetic_is_plain():
    path = Path(aqdet.__file__).parent / "quantization" / "functional.py"
    assert set(imports_of(path)) == {"__future__.annotations", "typing.Any", "torch", "torch.Tensor"}
    text = path.read_text(encoding="utf-8")
    assert not any(word in text for word in ("torch.ops", "torch._C", "setattr", "global "))
