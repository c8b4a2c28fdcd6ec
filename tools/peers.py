"""Other implementations of 4-bit training, which ``benchmark.py train --peers`` compares with aqdet's.

A peer is the float detector with every convolution that aqdet quantizes replaced. The weight, with a scale for each
output channel, and the input are quantized to the same bit widths. Sums and pyramid levels stay in float, which makes a
peer's step shorter than aqdet's. All scales are learned, but for those of torch's fused kernels.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver
from torch.ao.quantization import MovingAveragePerChannelMinMaxObserver as PerChannelObserver
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize as LearnableFakeQuantize

from aqdet.layers import Site
from aqdet.modeling import QuantPolicy, quantizable_layers
from aqdet.quantization import QuantSpec, integer_range

INSTALL_BREVITAS = "Brevitas is not installed, left out: pip install brevitas==0.13.4, in a copy of the environment"

MakeConv = Callable[[nn.Conv2d, QuantSpec, QuantSpec | None], nn.Conv2d]
MakeQuantizer = Callable[[QuantSpec, int], nn.Module]


class NaiveLSQ(nn.Module):
    """LSQ (1902.08153) as a chain of tensor operations, which autograd differentiates one by one.

    Args:
        spec: The quantizer's spec.
        num_channels: The number of output channels, for the scales of a weight.
    """

    def __init__(self, spec: QuantSpec, num_channels: int) -> None:
        super().__init__()
        self.quant_min, self.quant_max = integer_range(spec.num_bits, spec.signed)
        self.scale = nn.Parameter(torch.ones(num_channels, 1, 1, 1) if spec.per_channel else torch.ones(()))
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        """Maps any shape, ``(O, ...)`` for a weight, to the same; the first call sets the scale."""
        if not self.started:
            magnitude = x.detach().abs()
            mean = magnitude.mean(dim=(1, 2, 3), keepdim=True) if self.scale.dim() else magnitude.mean()
            self.scale.data.copy_(2 * mean / math.sqrt(self.quant_max))
            self.started = True
        factor = 1 / math.sqrt(x.numel() / self.scale.numel() * self.quant_max)
        scale = (self.scale - self.scale * factor).detach() + self.scale * factor
        ratio = (x / scale).clamp(self.quant_min, self.quant_max)
        return ((ratio.round() - ratio).detach() + ratio) * scale


def make_torch_quantizer(module: type, spec: QuantSpec, **options: object) -> nn.Module:
    """Returns one of torch's fake-quantize modules with an observer; zero is the smallest unsigned code."""
    quant_min, quant_max = integer_range(spec.num_bits, spec.signed)
    kind = "per_channel" if spec.per_channel else "per_tensor"
    return module(
        PerChannelObserver if spec.per_channel else MovingAverageMinMaxObserver,
        quant_min,
        quant_max,
        dtype=torch.qint8 if spec.signed else torch.quint8,
        qscheme=getattr(torch, f"{kind}_{'symmetric' if spec.signed else 'affine'}"),
        **options,
    )


def make_learnable(spec: QuantSpec, num_channels: int) -> nn.Module:
    """Returns a quantizer of torch's kernels with LSQ's gradients."""
    channels = {"channel_len": num_channels} if spec.per_channel else {}
    return make_torch_quantizer(LearnableFakeQuantize, spec, use_grad_scaling=True, **channels)


def make_fused(spec: QuantSpec, num_channels: int) -> nn.Module:
    """Returns the quantizer of torch's own quantization-aware training, whose kernel also observes the range."""
    return make_torch_quantizer(FusedMovingAvgObsFakeQuantize, spec)


class FakeQuantConv2d(nn.Conv2d):
    """A convolution whose input and weight pass a module each."""

    quantize_input: nn.Module
    quantize_weight: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C, H, W)`` to ``(N, O, H', W')``."""
        return self._conv_forward(self.quantize_input(x), self.quantize_weight(self.weight), self.bias)


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """Returns the arguments of a convolution like ``conv``."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}


def make_fake_quant_conv(make: MakeQuantizer, conv: nn.Conv2d, weight: QuantSpec, input: QuantSpec | None) -> nn.Conv2d:
    """Returns a convolution with quantizers; an exact input gets none."""
    layer = FakeQuantConv2d(**geometry(conv))
    layer.quantize_weight = make(weight, conv.out_channels)
    layer.quantize_input = nn.Identity() if input is None else make(input, 1)
    return layer


def make_brevitas_conv(conv: nn.Conv2d, weight: QuantSpec, input: QuantSpec | None) -> nn.Conv2d:
    """Returns Brevitas's convolution with learned scales; the input's starts from statistics of the first call."""
    from brevitas.nn import QuantConv2d
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    options = {}
    if input is not None:
        options = {
            "input_quant": Int8ActPerTensorFloat if input.signed else Uint8ActPerTensorFloat,
            "input_bit_width": input.num_bits,
            "input_collect_stats_steps": 1,
        }
    return QuantConv2d(
        **geometry(conv),
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=weight.num_bits,
        weight_scaling_impl_type="parameter_from_stats",
        **options,
    )


def peers() -> dict[str, MakeConv]:
    """Returns the peers that are installed."""
    makers: dict[str, MakeConv] = {
        "LSQ as tensor operations": functools.partial(make_fake_quant_conv, NaiveLSQ),
        "torch, learnable fake-quantize": functools.partial(make_fake_quant_conv, make_learnable),
        "torch, fused fake-quantize": functools.partial(make_fake_quant_conv, make_fused),
    }
    if importlib.util.find_spec("brevitas"):
        makers["Brevitas"] = make_brevitas_conv
    else:
        print(INSTALL_BREVITAS)
    return makers


def convert(model: nn.Module, cfg: CfgNode, make: MakeConv) -> None:
    """Replaces, in place, the convolutions of a float detector that aqdet would quantize by a config."""
    policy = QuantPolicy.from_config(cfg)
    for name, conv in list(quantizable_layers(model)):
        assert isinstance(conv, nn.Conv2d)
        specs = policy.specs(name, cast(Site, conv.quant_site))
        if specs is None:
            continue
        layer = make(conv, *specs)
        layer.weight, layer.bias = conv.weight, conv.bias
        norm = getattr(conv, "norm", None)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer if norm is None else nn.Sequential(layer, norm))


def start_learning(model: nn.Module) -> None:
    """Stops the observers of torch's learnable modules, after the first batch."""
    for module in model.modules():
        if isinstance(module, LearnableFakeQuantize):
            module.enable_param_learning()
