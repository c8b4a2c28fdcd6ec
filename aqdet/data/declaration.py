"""The declaration of a dataset, which readers of all formats get."""

from __future__ import annotations

import dataclasses

from .share import Share

IMAGE_FOLDER = "folder"
"""Format of a folder with a folder of images for each class."""


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A dataset as it was declared, with its paths looked up.

    Attributes:
        name: the name that the dataset is registered by.
        format: a key of :data:`aqdet.data.formats.FORMATS`, or :data:`IMAGE_FOLDER`.
        file: the annotation file or folder, as the format has it.
        image_root: folder of the images; no image outside of it is read.
        split: name of a split of the format's own; ``""`` for none.
        classes: names in the order of their ids; None for those in the annotations. Classes of image folders are the
            folders' names.
        difficult_as_crowd: whether ``difficult`` objects of VOC become crowd regions.
        class_key: name of the attribute of VIA's regions that is their class; ``""`` to find it.
        share: the part of the images that is used; None for all.
    """

    name: str
    format: str
    file: str
    image_root: str
    split: str = ""
    classes: tuple[str, ...] | None = None
    difficult_as_crowd: bool = False
    share: Share | None = None
    class_key: str = ""
