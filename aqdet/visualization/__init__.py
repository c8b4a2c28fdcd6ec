"""Reports of runs as HTML, and detections drawn on images and videos."""

from .report import make_report
from .run import Run, load_runs

__all__ = ["Run", "load_runs", "make_report"]
