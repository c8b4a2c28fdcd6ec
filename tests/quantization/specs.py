"""Every kind of quantizer, and data for it. Weights are ``(6, 4, 3, 3)``, inputs ``(2, 4, 5, 5)``."""

import itertools

import torch
from torch import Tensor

from aqdet.quantization import Quantizer, QuantSpec, build_quantizer, calibrate

METHODS = ("lsq", "pact", "dorefa")
KINDS = (  # role, signed, per_channel
    ("weight", True, False),
    ("weight", True, True),
    ("input", True, False),
    ("input", False, False),
)
SPECS = [
    QuantSpec(name, bits, role, signed=signed, per_channel=per_channel)
    for name, bits, (role, signed, per_channel) in itertools.product(METHODS, (2, 3, 4, 8), KINDS)
]
# Methods with more than a range to learn: their formulas are tested in files of their own.
LATER_SPECS = [
    QuantSpec(name, bits, role, signed=signed, per_channel=per_channel)
    for name, roles in (("lsqplus", ("input",)), ("lqnet", ("weight", "input")), ("n2uq", ("input",)))
    for bits, (role, signed, per_channel) in itertools.product((2, 4, 8), KINDS)
    if role in roles
]
LATER_SPECS += [
    QuantSpec("lsqodd", bits, "weight", per_channel=per_channel, centered=centered)
    for bits, per_channel, centered in itertools.product((1, 2, 4), (False, True), (False, True))
]
LATER_FOUR_BITS = [spec for spec in LATER_SPECS if spec.num_bits == 4]
FOUR_BITS = [spec for spec in SPECS if spec.num_bits == 4]
UNIFORM = [spec for spec in SPECS if (spec.quantizer, spec.role) != ("dorefa", "weight")]
NUM_CHANNELS = 6


def ident(spec: QuantSpec) -> str:
    sign = "s" if spec.signed else "u"
    return f"{spec.quantizer}-{spec.role}-{spec.num_bits}{sign}" + "-pc" * spec.per_channel + "-mean" * spec.centered


def is_uniform(spec: QuantSpec) -> bool:
    return (spec.quantizer, spec.role) != ("dorefa", "weight")


def data(spec: QuantSpec, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if spec.role == "weight":
        spread = torch.linspace(0.1, 2, NUM_CHANNELS).view(-1, 1, 1, 1)
        return torch.randn(NUM_CHANNELS, 4, 3, 3, generator=generator) * spread
    x = torch.randn(2, 4, 5, 5, generator=generator)
    return x if spec.signed else x.relu()


def ready(spec: QuantSpec, x: Tensor | None = None, method: str = "mse") -> Quantizer:
    """A calibrated quantizer."""
    quantizer = build_quantizer(spec, num_channels=NUM_CHANNELS)
    x = data(spec) if x is None else x
    calibrate(quantizer, lambda: quantizer(x), method=method)
    return quantizer


def bound(quantizer: Quantizer) -> Tensor:
    """The tensor that holds the range of a uniform quantizer: LSQ's and DoReFa's scale, PACT's alpha."""
    return quantizer.alpha if quantizer.spec.quantizer == "pact" else quantizer.scale


def groups(spec: QuantSpec, x: Tensor) -> list[Tensor]:
    """The sets of elements of ``x`` that share a scale."""
    return [row.flatten() for row in x] if spec.per_channel else [x.flatten()]
