"""The scaffold: everything that a model has during training alone, absent from evaluation and from what ships."""

from .adaptor import Adaptor, aligning, waiting_adaptors
from .aggregation import Aggregation, AggregationBlock, tapped_sums
from .auxiliary import INITS, SCHEDULES, TAPS, AuxiliaryPath, build_auxiliary
from .container import AUXILIARY_PREFIX, SCAFFOLD_PREFIXES, Scaffold, Scaffolded, strip, without_scaffold
from .distillation import Distillation
from .extra_head import build_extra_head

__all__ = [
    "AUXILIARY_PREFIX",
    "Adaptor",
    "Aggregation",
    "AggregationBlock",
    "AuxiliaryPath",
    "Distillation",
    "INITS",
    "SCAFFOLD_PREFIXES",
    "SCHEDULES",
    "Scaffold",
    "Scaffolded",
    "TAPS",
    "aligning",
    "build_auxiliary",
    "build_extra_head",
    "strip",
    "tapped_sums",
    "waiting_adaptors",
    "without_scaffold",
]
