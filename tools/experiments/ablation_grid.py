"""The rows of the ablation: what is trained from which start, and which part of the grid the options ask for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

LENGTHS = {"shapes": (600, 400), "bccd": (408, 306), "cards": (900, 450)}
"""Iterations of a start and of each run from one; runs of another length have it in their name."""
WIDTH = 64
"""Channels of a ResNet-18's first stage; runs of a narrower one have its width in their name."""
BITS = (2, 4)
OTHERS = ("dorefa", "pact", "lqnet")
WEIGHTS_ALONE = "lsqodd"
"""A quantizer of weights, whose rows have LSQ's inputs."""
TAPS = ("fpn", "backbone", "both")
PARTS = {
    "extra": ("MODEL.EXTRA_LOSS.ENABLED", "True"),
    "distill": ("MODEL.DISTILL.ENABLED", "True"),
    **{f"aux_{taps}": ("MODEL.AUX.ENABLED", "True", "MODEL.AUX.TAPS", taps) for taps in TAPS},
    "two_stage": (),
}
"""Part of a method -> the overrides that it adds to a run. "two_stage", as in 1903.11236, changes the start alone."""
START, FLOAT, BASELINE, TWO_STAGE = "start", "float", "baseline", "two_stage"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of the table: a training apart from its seed.

    Attributes:
        detector: "retinanet" or "fcos".
        quantizer: The quantizer's name, or ``START`` or ``FLOAT`` for full precision.
        bits: Bits of weights and inputs, 32 for full precision.
        method: ``BASELINE``, or names of ``PARTS`` joined by "+".
    """

    detector: str
    quantizer: str
    bits: int
    method: str

    def __str__(self) -> str:
        is_float = self.quantizer in (START, FLOAT)
        kind = self.quantizer if is_float else f"{self.quantizer}_w{self.bits}a{self.bits}"
        return f"{self.detector}_{kind}" + f"_{self.method}" * (not is_float or self.method != BASELINE)

    @property
    def parts(self) -> list[str]:
        """The parts that the method is made of."""
        return self.method.split("+")

    @property
    def reference(self) -> Cell:
        """The row that this one is compared with: its detector in full precision, from the usual start."""
        return Cell(self.detector, FLOAT, 32, BASELINE)

    @property
    def same_start(self) -> Cell:
        """The row of full precision from this row's own start."""
        return Cell(self.detector, FLOAT, 32, TWO_STAGE if TWO_STAGE in self.parts else BASELINE)

    @property
    def teacher(self) -> Cell:
        """The row whose detector is the teacher in distillation: full precision from this row's own start.

        The features of a detector from another start have another basis. With a teacher from the usual start, w2a2 of
        two stages ended at 52.2, 52.1 and 50.6 AP (seeds 0, 1, 2), lower than without a teacher.
        """
        return self.same_start

    def start(self, taps: str) -> Cell:
        """Returns the row that this one starts from.

        Args:
            taps: The taps of the path in the start of a two-stage run that has no path itself.
        """
        method = BASELINE
        if TWO_STAGE in self.parts:
            method = next((part for part in self.parts if part.startswith("aux_")), f"aux_{taps}")
        return Cell(self.detector, START, 32, method)

    def overrides(self, start: str, teacher: str) -> list[str]:
        """Returns ``KEY VALUE ...`` of a run, without those that its seed and its length need.

        Args:
            start: The checkpoint to start from.
            teacher: The checkpoint that distillation learns from.
        """
        found = ["MODEL.WEIGHTS", "" if self.quantizer == START else start]
        is_float = self.quantizer in (START, FLOAT)
        found += ["MODEL.QUANT.ENABLED", str(not is_float), "MODEL.AUX.ENABLED", "False"]
        if not is_float:
            for tensor in ("WEIGHT", "INPUT"):
                name = "lsq" if tensor == "INPUT" and self.quantizer == WEIGHTS_ALONE else self.quantizer
                found += [f"MODEL.QUANT.{tensor}.QUANTIZER", name]
                found += [f"MODEL.QUANT.{tensor}.NUM_BITS", str(self.bits)]
        for part in self.parts:
            if part != BASELINE:
                found += PARTS[part]
            if part == "distill":
                found += ["MODEL.DISTILL.WEIGHTS", teacher]
        return found


def planned(dataset: str, taps: str, methods: Sequence[str] = ()) -> list[Cell]:
    """Returns all rows of a dataset, 2 bits first.

    Args:
        dataset: A key of ``LENGTHS``.
        taps: The taps of the form of the path that is combined with everything else.
        methods: Further methods, which are added to LSQ's rows.
    """
    best = f"aux_{taps}"
    rows = [BASELINE, "extra", "distill", *(f"aux_{name}" for name in TAPS), f"{best}+extra", f"{best}+distill"]
    rows += [TWO_STAGE, f"{best}+{TWO_STAGE}", f"{best}+distill+{TWO_STAGE}"]
    if dataset != "shapes":
        rows = [BASELINE, "distill", best, f"{best}+distill", f"{best}+{TWO_STAGE}", f"{best}+distill+{TWO_STAGE}"]
    rows += [method for method in methods if method not in rows]
    cells = [Cell("retinanet", FLOAT, 32, method) for method in (BASELINE, TWO_STAGE)]
    if dataset != "shapes":  # what the path gives full precision, too
        cells.append(Cell("retinanet", FLOAT, 32, f"{best}+{TWO_STAGE}"))
    cells += [Cell("retinanet", "lsq", bits, method) for bits in BITS for method in rows]
    if dataset == "cards":
        return cells
    if dataset == "bccd":
        cells += [Cell("retinanet", "dorefa", 4, method) for method in (BASELINE, best)]
    else:
        cells += [Cell("retinanet", name, 2, method) for name in OTHERS for method in (BASELINE, best)]
        forms = (BASELINE, TWO_STAGE, f"{best}+{TWO_STAGE}", f"{best}+distill+{TWO_STAGE}")
        cells += [Cell("retinanet", WEIGHTS_ALONE, 2, method) for method in forms]
        cells += [Cell("fcos", FLOAT, 32, BASELINE), *(Cell("fcos", "lsq", 2, method) for method in (BASELINE, best))]
    return cells


def part_of_grid(args: argparse.Namespace, cells: Sequence[Cell]) -> list[Cell]:
    """Returns the rows of the detectors and quantizers that the options name, and full precision in any case.

    Full precision of two stages belongs to LSQ's rows.
    """

    def fits(cell: Cell) -> bool:
        quantizer = "lsq" if cell.quantizer == FLOAT else cell.quantizer
        return cell == cell.reference or not args.quantizers or quantizer in args.quantizers

    return [cell for cell in cells if fits(cell) and (not args.detectors or cell.detector in args.detectors)]


def is_usual(args: argparse.Namespace) -> bool:
    """Returns whether starts and runs have the lengths of ``LENGTHS``."""
    return (args.start_iterations, args.iterations) == LENGTHS[args.dataset]


def part_name(args: argparse.Namespace) -> str:
    """Returns the name of a part of the grid: its dataset, and what it has that is unusual or is not the whole."""
    unusual = [f"width{args.width}"] * (args.width != WIDTH)
    unusual += [f"{args.start_iterations}+{args.iterations}"] * (not is_usual(args))
    unusual += [args.split] * (args.split != "val")
    return " ".join([args.dataset, *(args.detectors or ()), *(args.quantizers or ()), *unusual])


def chosen(args: argparse.Namespace, cell: Cell) -> bool:
    """Returns whether the options ask for a row; full precision from the starts of wanted rows is always asked for."""
    if not args.methods:
        return cell.bits in (32, *args.bits)
    starts = {Cell(cell.detector, FLOAT, 32, method).same_start for method in args.methods}
    return cell in starts or (cell.method in args.methods and cell.bits in (32, *args.bits))
