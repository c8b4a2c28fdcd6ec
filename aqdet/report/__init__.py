"""Reports of runs as HTML, and detections drawn on images and videos."""

from .run_folder import Run, load_runs
from .sections import make_report

__all__ = ["Run", "load_runs", "make_report"]
