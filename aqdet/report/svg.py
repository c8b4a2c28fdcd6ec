"""Charts as inline SVG text.

A report has hundreds of small charts. As text they take a few kB each, share the page's fonts, and need nothing
from outside the file.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

from ..analysis.histograms import SiteHistogram

COLOURS = ("#1f5fa8", "#c4511c", "#2a8a57", "#7b4aa0", "#8a6d1d", "#5a6470")
_MAX_LINES = 32  # Largest number of levels that are drawn one by one; of more levels, the two ends are drawn.


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart: points in order of ``x``, and its colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


def colour(index: int) -> str:
    """Returns the colour of the run with this number."""
    return COLOURS[index % len(COLOURS)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Returns at most ``count + 1`` round numbers from ``low`` to ``high``, 1, 2 or 5 times a power of ten apart.

    Example: ``ticks(0, 153, 5)`` is ``[0, 50, 100, 150]``.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _label(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e4 else f"{value:,.0f}"


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Maps data to pixels of the drawing area, in a picture of ``width`` x ``height``."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: int = 64
    right: int = 12
    top: int = 8
    bottom: int = 40

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + (value - low) / (high - low) * (self.width - self.left - self.right), 2)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(
            self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom), 2
        )

    def frame(self, x_ticks: Sequence[float], y_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str) -> str:
        """Draws the grid, tick labels and axis titles."""
        base, left, right = self.height - self.bottom, self.left, self.width - self.right
        parts = []
        for value, text in y_ticks:
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
            parts.append(f'<text x="{left - 5}" y="{y + 3.5}" text-anchor="end">{text}</text>')
        for value in x_ticks:
            parts.append(f'<path class="axis" d="M{self.x(value)} {base}v4"/>')
            parts.append(f'<text x="{self.x(value)}" y="{base + 15}" text-anchor="middle">{_label(value)}</text>')
        parts.append(f'<path class="axis" d="M{left} {self.top}V{base}H{right}"/>')
        middle = (self.top + base) / 2
        parts.append(
            f'<text x="{(left + right) / 2}" y="{self.height - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
            f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
        )
        return "".join(parts)

    def wrap(self, title: str, content: str) -> str:
        """Wraps the content into a whole picture."""
        name = html.escape(title, quote=True)
        return f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{name}">{content}</svg>'


def _figure(title: str, picture: str, caption: str = "") -> str:
    text = f"<p>{html.escape(caption)}</p>" if caption else ""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{picture}{text}</figure>"


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low <= 0.5 * high else low - margin), high + margin


def line_chart(
    lines: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Draws a figure with one line for each series; a series of few points gets a marker on each.

    Args:
        lines: The series; points that are not finite are left out, and without any point the figure says so.
        title: The text above the figure.
        x_label, y_label: Axis titles, with units.
        x_range, y_range: The ends of the axes; None takes them from the data.

    Returns:
        HTML, with all texts escaped.
    """
    points = []
    for line in lines:
        pairs = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        points.append(pairs)
    xs = [x for pairs in points for x, _ in pairs]
    ys = [y for pairs in points for _, y in pairs]
    if not xs:
        return _figure(title, "", "no data")
    axes = _Axes(560, 280, x_range or _padded(xs), y_range or _padded(ys))
    parts = [
        axes.frame(
            ticks(*axes.x_range, 6), [(value, _label(value)) for value in ticks(*axes.y_range, 5)], x_label, y_label
        )
    ]
    for line, pairs in zip(lines, points, strict=True):
        path = " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in pairs)
        parts.append(f'<polyline class="line" stroke="{line.colour}" points="{path}"/>')
        if len(pairs) <= 40:
            for x, y in pairs:
                tip = html.escape(f"{line.name}: {_label(x)}, {y:.4g}")
                place = f'cx="{axes.x(x)}" cy="{axes.y(y)}" r="3"'
                parts.append(f'<circle {place} fill="{line.colour}"><title>{tip}</title></circle>')
    return _figure(title, axes.wrap(title, "".join(parts)))


def histogram_chart(histogram: SiteHistogram, *, title: str, caption: str, colour: str) -> str:
    """Draws a small figure of the shares of values by bin, on a logarithmic axis, and the quantized values as lines."""
    shares = histogram.counts / max(int(histogram.counts.sum()), 1)
    floor = -5
    axes = _Axes(
        280, 150, (float(histogram.edges[0]), float(histogram.edges[-1])), (floor, 0), left=62, right=8, bottom=34
    )
    unit = "value / step" if histogram.unit == "steps" else "value"
    if histogram.unit == "values" and histogram.spec.per_channel:
        unit = "value / largest quantized value of its channel"
    y_ticks = [(0.0, "100 %"), (-2.0, "1 %"), (-4.0, "0.01 %")]
    base = axes.y(floor)
    quantized = histogram.quantized
    if len(quantized) > _MAX_LINES:
        quantized = quantized[[0, -1]]
    lines = "".join(f"M{axes.x(float(value))} {axes.top}V{base}" for value in quantized)
    bars = []
    for share, start, end in zip(shares, histogram.edges[:-1], histogram.edges[1:], strict=True):
        if share > 0:
            top = axes.y(max(math.log10(share), floor))
            bars.append(f"M{axes.x(float(start))} {base}V{top}H{axes.x(float(end))}V{base}")
    content = (
        axes.frame(ticks(*axes.x_range, 5), y_ticks, unit, "share of values")
        + f'<path class="bars" fill="{colour}" d="{"".join(bars)}"/><path class="quantized" d="{lines}"/>'
    )
    return _figure(title, axes.wrap(title, content), caption)
