import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from aqdet.analysis.histograms import NUM_BINS, SiteHistogram
from aqdet.quantization import QuantSpec
from aqdet.report import svg


def parse(figure):
    """The figure's root, which fails unless it is well-formed."""
    return ElementTree.fromstring(figure)


@pytest.mark.parametrize(
    "low, high, count, expected",
    [
        (0, 153, 5, [0, 50, 100, 150]),
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-12, 11, 5, [-10, -5, 0, 5, 10]),
        (0.0, 0.007, 4, [0, 0.002, 0.004, 0.006]),
        (90000, 180000, 3, [100000, 150000]),
    ],
)
def test_ticks(low, high, count, expected):
    assert svg.ticks(low, high, count) == pytest.approx(expected)


def test_a_line_passes_through_its_points():
    line = svg.Series("a <b>", [0, 5, 10], [1.0, 0.0, float("nan")], "#123456")
    root = parse(svg.line_chart([line], title="t", x_label="x", y_label="y", x_range=(0, 10), y_range=(0, 1)))
    points = root.find(".//polyline").get("points").split()
    # 560 x 280 with 64 left, 12 right, 8 above and 40 below; the value that is not finite is left out.
    assert [tuple(map(float, p.split(","))) for p in points] == [(64, 8), (64 + (560 - 76) / 2, 240)]
    texts = [element.text for element in root.iter() if element.text]
    assert {"x", "y", "t", "0.4"} <= set(texts)
    assert "a <b>: 5, 0" in texts


@pytest.mark.parametrize(
    "lines", [[], [svg.Series("a", [], [], "#000")], [svg.Series("a", [1], [float("inf")], "#000")]]
)
def test_no_data_is_said(lines):
    assert "no data" in svg.line_chart(lines, title="t", x_label="x", y_label="y")


@pytest.mark.parametrize("values", [[0.0], [3.0], [-2.0, -2.0], [1e-9, 2e-9], [1e7, 2e7]])
def test_ranges_follow_the_data(values):
    line = svg.Series("a", list(range(len(values))), values, "#000")
    root = parse(svg.line_chart([line], title="t", x_label="x", y_label="y"))
    for circle in root.iter("circle"):
        assert 64 <= float(circle.get("cx")) <= 548 and 8 <= float(circle.get("cy")) <= 240


def histogram(quantized):
    counts = np.zeros(NUM_BINS, dtype=int)
    counts[[10, 50]] = [900, 100]
    edges = np.linspace(-4, 20, NUM_BINS + 1)
    return SiteHistogram(
        "p", QuantSpec("lsq", 4, "input", signed=False), "steps", edges, counts, quantized, 2, 0.0, 0.1
    )


@pytest.mark.parametrize("number, drawn", [(16, 16), (256, 2)])
def test_bars_and_quantized_values(number, drawn):
    figure = svg.histogram_chart(histogram(np.arange(number)), title="t", caption="c", colour="#123456")
    root = parse(figure)
    paths = {element.get("class"): element.get("d") for element in root.iter("path")}
    bars = re.findall(r"M(\S+) \S+?V(\S+?)H(\S+?)V", paths["bars"])
    assert len(bars) == 2 and paths["quantized"].count("M") == drawn
    # The axis has five decades in 150 - 8 - 34 pixels.
    tops = [8 + 108 * -np.log10(share) / 5 for share in (0.9, 0.1)]
    assert [float(top) for _, top, _ in bars] == pytest.approx(tops, abs=0.02)
