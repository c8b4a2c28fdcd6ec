"""The registry of quantizers, and their construction by name."""

from __future__ import annotations

from .methods.dorefa import DoReFaInputQuantizer, DoReFaWeightQuantizer
from .methods.lqnet import LQNetQuantizer
from .methods.lsq import LSQQuantizer
from .methods.lsqodd import LSQOddQuantizer
from .methods.lsqplus import LSQPlusQuantizer
from .methods.n2uq import N2UQQuantizer
from .methods.pact import PACTQuantizer
from .quantizer import Quantizer
from .spec import QuantSpec

QUANTIZER_REGISTRY: dict[str, dict[str, type[Quantizer]]] = {
    "dorefa": {"weight": DoReFaWeightQuantizer, "input": DoReFaInputQuantizer},
    "lqnet": {"weight": LQNetQuantizer, "input": LQNetQuantizer},
    "lsq": {"weight": LSQQuantizer, "input": LSQQuantizer},
    "lsqodd": {"weight": LSQOddQuantizer},
    "lsqplus": {"weight": LSQQuantizer, "input": LSQPlusQuantizer},
    "n2uq": {"input": N2UQQuantizer},
    "pact": {"weight": PACTQuantizer, "input": PACTQuantizer},
}
"""Method name -> role -> class. Add a method by adding an entry before the model is built."""


def build_quantizer(spec: QuantSpec, *, num_channels: int = 1) -> Quantizer:
    """Builds an uncalibrated quantizer.

    Args:
        spec: description of the quantizer.
        num_channels: number of output channels of the layer, used where ``spec.per_channel``.

    Raises:
        ValueError: if the name is unknown or has no class for the role; lists the valid names.
    """
    classes = QUANTIZER_REGISTRY.get(spec.quantizer, {})
    if spec.role not in classes:
        valid = sorted(name for name, roles in QUANTIZER_REGISTRY.items() if spec.role in roles)
        raise ValueError(f"QUANTIZER for {spec.role}s must be one of {', '.join(valid)}, got {spec.quantizer!r}")
    return classes[spec.role](spec, num_channels)
