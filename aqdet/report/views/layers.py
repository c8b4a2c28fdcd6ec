"""Histograms of the values that the quantizers of each layer read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from ...analysis.histograms import SiteHistogram
from .. import svg
from ..layer_facts import LayerFacts
from ..run_folder import Run
from .table import Cell, Row, Table, cells_of, legend_of

_SITE_TEXT = {
    "weight_quantizer": "weight",
    "input_quantizer": "input",
    "quantizer": "shared tensor",
    "x_quantizer": "first operand",
    "y_quantizer": "second operand",
}


def layers(runs: Sequence[Run], facts: Sequence[LayerFacts]) -> dict[str, Any] | None:
    """Returns the histograms by layer and a table of all quantizers, or None if no run has quantizers."""
    shown = [
        (each, entry) for each, entry in zip(facts, legend_of(runs), strict=True) if each.weights or each.activations
    ]
    if not shown:
        return None
    names: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for each, _ in shown for name in _in_order(each)):
        names.setdefault(name.rpartition(".")[0], []).append(name)
    rows, blocks = [], []
    for layer, quantizers in names.items():
        figures = []
        for name in quantizers:
            cells = [Cell(name, "path")]
            for each, entry in shown:
                histogram = each.weights.get(name) or each.activations.get(name)
                if histogram is None:
                    cells += [Cell("-")] * 4
                    continue
                used = "-" if histogram.used is None else f"{histogram.used}/{2**histogram.spec.num_bits}"
                cells += cells_of(_brief(histogram), _share(histogram.below), _share(histogram.above), used)
                title = _SITE_TEXT.get(name.rpartition(".")[2], name) + f", {entry.name}" * (len(runs) > 1)
                chart = svg.histogram_chart(histogram, title=title, caption=_caption(histogram), colour=entry.colour)
                figures.append(Markup(chart))
            rows.append(Row(cells))
        blocks.append({"name": layer, "figures": figures, "columns": {1: 2, 3: 3}.get(len(shown), 4)})
    header = cells_of("quantizer", *(text for _, entry in shown for text in (entry.name, "below", "above", "used")))
    return {
        "legend": [entry for _, entry in shown] if len(shown) == len(runs) else [],
        "num_images": shown[0][0].num_images,
        "table": Table(header, rows),
        "layers": blocks,
        "in_two": len(shown) == 1,
    }


def _brief(histogram: SiteHistogram) -> str:
    """Describes a quantizer as the plan does, for example ``lsq s4/ch``."""
    spec = histogram.spec
    sign = "s" if spec.signed else "u"
    return f"{spec.quantizer} {sign}{spec.num_bits}" + "/ch" * spec.per_channel + " centered" * spec.centered


def _share(value: float | None) -> str:
    if value is None or value == 0:
        return "-" if value is None else "0"
    return f"{100 * value:.2f} %" if value >= 5e-5 else "<0.01 %"


def _caption(histogram: SiteHistogram) -> str:
    spec = histogram.spec
    sign = "signed" if spec.signed else "unsigned"
    rest = ", per channel" * spec.per_channel + ", centered" * spec.centered
    parts = [f"{spec.quantizer}, {spec.num_bits} bits {sign}{rest}"]
    if histogram.below is not None and histogram.above is not None:
        parts.append(f"clipped below {_share(histogram.below)}, above {_share(histogram.above)}")
    else:
        parts.append("no clipping range")
    if histogram.used is not None:
        parts.append(f"{histogram.used} of {2**spec.num_bits} values used")
    return "; ".join(parts)


def _in_order(facts: LayerFacts) -> Iterator[str]:
    """Yields the names of quantizers by layer, as the plan lists the layers; each layer's weight first."""
    names = [*facts.weights, *facts.activations]
    order = {row.name: index for index, row in enumerate(facts.rows)}
    yield from sorted(
        names, key=lambda name: (order.get(name.rpartition(".")[0], len(order)), name not in facts.weights)
    )
