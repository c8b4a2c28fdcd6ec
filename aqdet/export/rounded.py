"""The trained model with the constants that ship."""

from __future__ import annotations

import copy

from torch import nn

from ..modeling import QuantGeneralizedRCNN
from .extract import Extractor
from .extract_regions import extract_two_stage


def with_rounded_constants(model: nn.Module) -> nn.Module:
    """Returns a copy of a detector with the constants that ship, otherwise the same.

    A bias is what int32 makes of it: it moves by at most half a unit of its convolution's sum, through the norm's
    running mean. A sum has the scales of :mod:`~aqdet.export.sums`. Between this model and the program only float32's
    own rounding is left, so that the two can be compared closely.
    """
    model = copy.deepcopy(model)
    if isinstance(model, QuantGeneralizedRCNN):
        extract_two_stage(model, round_constants=True)
    else:
        Extractor(round_constants=True).detector(model)
    return model
