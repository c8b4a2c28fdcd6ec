"""Progress of long work: a bar on a terminal, lines elsewhere."""

import io
import sys

import pytest

from aqdet.utils import progress
from aqdet.utils.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)


def test_elsewhere_each_state_is_a_line(monkeypatch, fast):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress_bar(range(3), unit="image", title="checking")) == [0, 1, 2]
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and lines[-1].startswith("checking: 100%") and "3/3" in lines[-1]
    assert list(dict.fromkeys(line.split("/")[0][-1] for line in lines)) == ["0", "1", "2", "3"]


def test_short_work_has_no_line(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(total=2, unit="image") as bar:
        bar.update(), bar.update()
    assert stream.getvalue() == ""


def test_a_terminal_has_a_bar(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    list(progress_bar(iter("ab"), total=2, unit="image"))
    assert stream.getvalue().startswith("\r") and "2/2" in stream.getvalue()
