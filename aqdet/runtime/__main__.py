"""``python -m aqdet.runtime``."""

from ..utils.console import run_console
from .cli import main

if __name__ == "__main__":
    run_console(main)
