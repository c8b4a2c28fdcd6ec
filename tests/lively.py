"""Detectors in full precision that look trained, and images without ground truth, for quantization without training."""

import torch
from detectron2.layers import FrozenBatchNorm2d
from helpers import QUANT, make_model

from aqdet.engine.post_training import predict
from aqdet.quantization.calibration import observe, set_ranges

STD = ("MODEL.PIXEL_STD", "[57.0, 57.0, 57.0]")


def images(number=1, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    entry = {"height": size, "width": size}
    return [
        {"image": torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8), **entry}
        for _ in range(number)
    ]


def lively(*overrides, theirs=False):
    """A detector in full precision whose norms look trained, and whose predictions are not all alike."""
    model = make_model(*STD, *overrides, theirs=theirs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d | FrozenBatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
        for name, parameter in model.head.named_parameters():
            if "cls_score" in name or "bbox_pred" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


def pair(*overrides, bits="3"):
    """The detector in full precision, and a calibrated one of its weights."""
    quantized = (*QUANT, "MODEL.QUANT.WEIGHT.NUM_BITS", bits, "MODEL.QUANT.INPUT.NUM_BITS", bits)
    full, model = lively(*overrides), make_model(*STD, *quantized, *overrides).eval()
    model.load_state_dict(full.state_dict(), strict=False)
    with torch.no_grad():
        observed = observe(model, lambda: predict(model, images(2)))
    set_ranges(model, observed, "minmax")
    return full, model
