"""Names of the classes of registered datasets."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)


def thing_classes(name: str) -> list[str] | None:
    """Returns the class names of a registered dataset, which is loaded if they are known only then."""
    if MetadataCatalog.get(name).get("thing_classes") is None:
        DatasetCatalog.get(name)
    classes = MetadataCatalog.get(name).get("thing_classes")
    return None if classes is None else list(classes)


def listed(classes: list[str]) -> str:
    """Returns the first ten of some names, for a message."""
    return ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")


def check_class_order(cfg: CfgNode, trained: Any, weights: str) -> None:
    """
    Checks that the datasets to test on have the classes of a checkpoint in their order; other names are a warning.

    Args:
        cfg: config whose datasets are registered.
        trained: names of the classes that the checkpoint holds; anything but a list of names is passed over, since
            older checkpoints have none, and others' something else.
        weights: the checkpoint, for the message.

    Raises:
        ValueError: in one line, naming a dataset that has the same classes in another order.
    """
    if not (isinstance(trained, list | tuple) and all(isinstance(name, str) for name in trained)):
        return
    for name in cfg.DATASETS.TEST:
        classes = thing_classes(name)
        if classes is None or list(classes) == list(trained):
            continue
        if sorted(classes) == sorted(trained):
            raise ValueError(
                f"DATASETS.TEST: {name} has the classes of {weights} in another order, {listed(classes)}, where it "
                f"was trained with {listed(list(trained))}"
            )
        logger.warning("%s has other classes than %s was trained with: %s", name, weights, listed(list(trained)))
