"""torch.compile sees one graph of a quantized block, with the gradients of the plain form."""

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn

from aqdet.layers import QuantConv2d, StreamQuantizer
from aqdet.quantization import QuantSpec, calibrate, use_kernels


class Block(nn.Module):
    def __init__(self, weight, input):
        super().__init__()
        self.stream = StreamQuantizer(relu=True)
        self.stream.quantize(input, 8)
        specs = QuantSpec(weight, 4, "weight"), QuantSpec(input, 4, "input", signed=False)
        convs = [Conv2d(4, 4, 3, padding=1, bias=False, norm=nn.BatchNorm2d(4)) for _ in range(2)]
        self.first, self.second = (QuantConv2d.from_float(conv, *specs) for conv in convs)

    def forward(self, x):
        return self.second(torch.relu(self.first(self.stream(x)))).square().sum()


@pytest.mark.parametrize("weight, input", [("lsq", "pact"), ("dorefa", "dorefa"), ("lsqodd", "lsqplus")])
def test_a_block_is_one_graph(weight, input):
    torch.manual_seed(0)
    block, x = Block(weight, input), torch.randn(2, 4, 8, 8)
    calibrate(block, lambda: block(x), method="minmax")
    torch._dynamo.reset()
    found = []
    for module, name in ((block, "plain"), (torch.compile(block, backend="aot_eager", fullgraph=True), "lean")):
        block.zero_grad()
        for norm in (block.first.norm, block.second.norm):
            norm.reset_running_stats()
        with use_kernels(name):
            loss = module(x)
            loss.backward()
        found.append(
            [loss.detach(), *(p.grad.clone() for p in block.parameters()), block.first.norm.running_var.clone()]
        )
    for compiled, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


def test_a_network_is_compiled_before_it_is_calibrated():
    torch.manual_seed(0)
    block, x = Block("lsq", "lsq"), torch.randn(2, 4, 8, 8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block.compile(backend="aot_eager")
    calibrate(block, lambda: block(x), method="minmax")
    assert not torch._dynamo.utils.counters["frames"]  # calibration runs as it is written
    block(x).backward()
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all(p.grad is not None for p in block.parameters())
