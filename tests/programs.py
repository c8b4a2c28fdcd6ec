"""Small calibrated detectors whose batch norms look trained (any sign, some channels off), and single convs."""

import functools

import numpy as np
import torch
from helpers import QUANT, calibrated, make_batch, make_model

from aqdet.export.extract import extract
from aqdet.export.program import Conv, Grid

STD = ("MODEL.PIXEL_STD", "[57.0, 57.0, 57.0]")
RELU = ("MODEL.FPN.RELU", "True")
OVERRIDES = (*QUANT, *STD, *RELU)
SEVEN_BITS = ("MODEL.QUANT.RESIDUAL_NUM_BITS", "7", "MODEL.QUANT.BOUNDARY_NUM_BITS", "7")
LSQPLUS = (
    *("MODEL.FPN.RELU", "False", "MODEL.QUANT.INPUT.QUANTIZER", "lsqplus"),
    *("MODEL.QUANT.RESIDUAL_QUANTIZER", "lsqplus"),
)
U4 = Grid(0.5, 0, 15)


def trained_like(*overrides):
    """A new detector with ``OVERRIDES`` and these."""
    model = make_model(*OVERRIDES, *overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                if module.affine:
                    module.weight.normal_(generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
                    module.weight[:2] = torch.tensor([0.0, 1e-9])
    return calibrated(model, make_batch()).eval()


@functools.cache
def shared(*overrides):
    """``(detector, program)``, made once; not to be changed."""
    model = trained_like(*overrides)
    return model, extract(model)


def image(height=64, width=64, count=1):
    """``(N, 3, H, W)`` of noise."""
    return np.random.default_rng(0).integers(0, 256, (count, 3, height, width), dtype=np.uint8)


def make_conv(weight, *, bias=None, factor=None, scale=None, grid=U4, **geometry):
    """A conv from ``x`` to ``y`` with weights of 4 bits; ``factor`` is sign times multiple."""
    out = len(weight)
    factor = np.ones(out) if factor is None else np.array(factor)
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, **geometry}
    return Conv(
        output="y",
        input="x",
        name="conv",
        level="",
        weight=np.asarray(weight, np.int16),
        weight_bits=4,
        sign=np.sign(factor).astype(np.int8),
        multiple=np.maximum(np.abs(factor), 1).astype(np.int16),
        scale=np.ones(out, np.float32) if scale is None else np.asarray(scale, np.float32),
        bias=np.zeros(out, np.int32) if bias is None else np.asarray(bias, np.int32),
        grid=grid,
        **geometry,
    )
