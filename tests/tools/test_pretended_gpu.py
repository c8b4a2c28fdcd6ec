"""The GPU that pretends: what it counts and what it refuses."""

import pytest
import torch
from pretended_gpu import DeviceMismatch, PretendedTensor, counting, pretending, to_pretended
from torch import nn


def on_gpu(*shape):
    return PretendedTensor(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))


def test_tensors_say_where_they_are():
    with pretending():
        x = torch.zeros(2, device="cuda")
        others = [torch.ones(2).to("cuda"), torch.ones(2).cuda(), x + 1, x.view(1, 2), torch.zeros_like(x)]
        assert all(isinstance(t, PretendedTensor) and t.is_cuda and not t.is_cpu for t in (x, *others))
        assert {t.device for t in others} == {torch.device("cuda:0")}
        assert x.to("cuda", torch.float16).dtype == x.to(torch.ones(1).half()).dtype == torch.float16
        assert torch.ones(2).to("cuda", None, True).is_cuda
        assert type(x.cpu()) is type(x.to("cpu")) is torch.Tensor and not x.cpu().is_cuda
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


def test_launches_bytes_and_products_of_an_elementwise_operation_and_a_convolution():
    with pretending() as ledger:
        x = on_gpu(1, 3, 8, 8)
        x + x.view(1, 3, 8, 8)  # a view launches nothing and an operand is read once
        assert dict(ledger.launches) == {"add": 1} and ledger.bytes["add"] in (2 * 192 * 4, 3 * 192 * 4)
        with counting() as ledger:
            torch.conv2d(x, on_gpu(4, 3, 3, 3))
        assert dict(ledger.launches) == {"convolution": 1}
        assert ledger.flops == 2 * 4 * 36 * 27
        assert ledger.bytes["convolution"] == 4 * (192 + 108 + 144)


def test_an_expanded_operand_is_read_once_and_a_filled_one_is_not_read():
    with pretending() as ledger:
        on_gpu(4, 1).expand(4, 100).clone()
        assert ledger.bytes["clone"] == 4 * (4 + 400)
        on_gpu(100).zero_()
        assert ledger.bytes["zero_"] == 400


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: float(x[0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits_for_the_gpu_is_counted(wait):
    with pretending() as ledger:
        wait(on_gpu(5))
        assert ledger.waits.total() >= 1


def test_what_does_not_wait_is_not_counted():
    with pretending() as ledger:
        x = on_gpu(5).requires_grad_()
        torch.where(x > 0, x, 0.0)[torch.tensor([0, 1], device="cuda")].sum().backward()
        assert not ledger.waits and torch.equal(x.grad.inner, torch.zeros(5))


def test_tensors_of_the_cpu_are_refused_but_for_scalars():
    with pretending():
        x = on_gpu(5)
        assert torch.equal((x * torch.tensor(2.0)).inner, x.inner * 2)
        with pytest.raises(DeviceMismatch, match=r"add.*cuda:0 and, of shape \(5,\), on the CPU"):
            x + torch.ones(5)


def test_a_mismatch_names_the_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    with pretending():
        to_pretended(model)(on_gpu(2, 4))
        model[1].running_mean = torch.zeros(4)
        with pytest.raises(DeviceMismatch, match=r"batch_norm .* in 1: "):
            model(on_gpu(2, 4))


def test_gradients_and_mixed_precision_are_those_of_torch():
    conv = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    conv(x).square().sum().backward()
    expected = conv.weight.grad
    with pretending():
        to_pretended(conv)
        conv(PretendedTensor(x)).square().sum().backward()
        assert torch.equal(conv.weight.grad.inner, expected)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
            assert conv(PretendedTensor(x)).dtype == torch.bfloat16
            with torch.autocast("cuda", enabled=False):
                assert conv(PretendedTensor(x)).dtype == torch.float32


def test_shapes_alone_are_computed_on_the_meta_device():
    with pretending(meta=True) as ledger:
        conv = to_pretended(nn.Conv2d(3, 4, 3))
        y = conv(torch.zeros(1, 3, 800, 800, device="cuda")) + torch.ones(4, 1, 1).to("cuda")
        y.sum().backward()
        assert y.inner.is_meta and conv.weight.grad.inner.is_meta and y.shape == (1, 4, 798, 798)
        assert not ledger.waits and ledger.flops == 2 * 2 * 4 * 798 * 798 * 27


def test_nothing_is_left_behind():
    before = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype, torch.cuda.stream
    with pretending():
        pass
    assert before == (torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype, torch.cuda.stream)
    assert type(torch.ones(1) + 1) is torch.Tensor
