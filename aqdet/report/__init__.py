"""Reports of runs as HTML."""

from .page import make_report
from .run_folder import Run, load_runs

__all__ = ["Run", "load_runs", "make_report"]
