"""Statistics of a sample of a dataset's images and objects, to compare with a config and another dataset."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

__all__ = ["COLOURS", "Statistics", "colours_of"]

# Largest number of images and of objects in a sample; larger datasets give every n-th, so that a report stays small.
NUM_OBJECTS = 50_000
NUM_IMAGES = 10_000
# Numbers that describe the colours of an image, each from 0 to 255.
COLOURS = ("red", "green", "blue", "contrast", "saturation")

_Item = TypeVar("_Item")


@dataclasses.dataclass
class Statistics:
    """
    A sample of a dataset's images and objects, with counts of all.

    Attributes:
        objects: sampled objects, a row each: class (an index into the sorted ids), x, y, width, height of the box in
            pixels, and width and height of its image. Crowd regions are no objects.
        per_class: number of all objects of each class, in the order of the ids.
        per_image: (number of objects, number of images with so many objects) over all images.
        fullest: file name of an image with the most objects.
        sizes: width and height of sampled images.
        colours: values of :data:`COLOURS` of sampled images; empty unless pixels were read.
    """

    objects: list[list[float]] = dataclasses.field(default_factory=list)
    per_class: list[int] = dataclasses.field(default_factory=list)
    per_image: list[list[int]] = dataclasses.field(default_factory=list)
    fullest: str = ""
    sizes: list[list[int]] = dataclasses.field(default_factory=list)
    colours: list[list[float]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, content: Mapping[str, Any], colours: Sequence[Sequence[float]] = ()) -> Statistics:
        """
        Draws the sample.

        Args:
            content: usable COCO records.
            colours: values of :data:`COLOURS` of the images.
        """
        indices = {category["id"]: index for index, category in enumerate(content["categories"])}
        images = {image["id"]: image for image in content["images"]}
        # The records can have an object of an image that cannot be read and is not in them.
        objects = [a for a in content["annotations"] if not a["iscrowd"] and a["image_id"] in images]
        per_class = collections.Counter(indices[a["category_id"]] for a in objects)
        per_image = collections.Counter(a["image_id"] for a in objects)
        rows = []
        for annotation in _every_nth(objects, NUM_OBJECTS):
            image = images[annotation["image_id"]]
            size = [image["width"], image["height"]]
            if min(size) > 0:
                box = [round(float(value), 2) for value in annotation["bbox"]]
                rows.append([indices[annotation["category_id"]], *box, *size])
        sizes = [[image["width"], image["height"]] for image in _every_nth(content["images"], NUM_IMAGES)]
        fullest = max(per_image, key=lambda key: per_image[key], default=None)
        return cls(
            objects=rows,
            per_class=[per_class[index] for index in range(len(indices))],
            per_image=[[number, images] for number, images in sorted(collections.Counter(per_image.values()).items())],
            fullest="" if fullest is None else images[fullest]["file_name"],
            sizes=[size for size in sizes if min(size) > 0],
            colours=[[round(float(v), 1) for v in values] for values in _every_nth(list(colours), NUM_IMAGES)],
        )


def colours_of(pixels: np.ndarray) -> tuple[float, ...]:
    """
    Describes the colours of an image.

    Args:
        pixels: (H, W, 3) in the order red, green, blue, from 0 to 255.

    Returns:
        the values of :data:`COLOURS`: the means of the channels, the standard deviation of the pixels' brightness (the
        mean over channels), and the mean difference between a pixel's largest and smallest channel. They are taken
        over a grid of about 64 pixels a side.
    """
    steps = [max(1, side // 64) for side in pixels.shape[:2]]
    seen = pixels[:: steps[0], :: steps[1]].astype(np.float32)
    red, green, blue = (float(value) for value in seen.mean(axis=(0, 1)))
    contrast = float(seen.mean(axis=2).std())
    saturation = float((seen.max(axis=2) - seen.min(axis=2)).mean())
    return red, green, blue, contrast, saturation


def _every_nth(items: Sequence[_Item], number: int) -> Sequence[_Item]:
    step = -(-len(items) // number) if items else 1
    return items[::step]
