"""The HTML page about one run, or comparing several runs: one file that needs no other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .evaluation_results import collect_test_sets
from .layer_facts import collect_layer_facts
from .run_folder import Run
from .views.accuracy import precision_and_recall, results
from .views.config import config
from .views.header import header
from .views.layers import layers
from .views.pictures import pictures
from .views.plan import plan
from .views.training import training


def make_report(runs: Sequence[Run], *, min_score: float = 0.5, num_pictures: int = 4, num_images: int = 4) -> str:
    """Makes the page.

    Args:
        runs: The runs, see :func:`aqdet.report.load_runs`; the others are compared with the first one. Their configs
            name devices that exist.
        min_score: The lowest score of the detections that pictures show and that images are ranked by.
        num_pictures: How many of the worst and of the best images are shown.
        num_images: How many test images the activations are observed on.

    Returns:
        The page as text.
    """
    sets = collect_test_sets(runs)
    facts = [collect_layer_facts(run, num_images) for run in runs]
    views: list[tuple[str, dict[str, Any] | None]] = [
        ("Results", results(runs, sets)),
        ("Training", training(runs)),
        ("Precision and recall", precision_and_recall(runs, sets)),
        ("Pictures", pictures(runs, sets, min_score, num_pictures)),
        ("Layers", layers(runs, facts)),
        ("Plan", plan(runs, facts)),
        ("Config", config(runs)),
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    environment = _environment()
    return environment.get_template("page.html").render(
        title=f"aqdet report: {title}",
        style=Markup(environment.get_template("style.css").render()),
        made=time.strftime("%Y-%m-%d %H:%M"),
        header=header(runs),  # last, when all notes have been taken
        sections=[_section(name, view) for name, view in views if view is not None],
    )


def _section(title: str, view: dict[str, Any]) -> dict[str, Any]:
    anchor = title.lower().replace(" ", "-")
    return {"title": title, "anchor": anchor, "template": f"{anchor}.html", "view": view}


def _environment() -> Environment:
    """Returns the environment of the page's templates; all text is escaped unless it is marked as HTML."""
    return Environment(
        loader=PackageLoader("aqdet.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
