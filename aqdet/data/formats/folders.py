"""Image folders for classification: a folder of images for each class."""

from __future__ import annotations

import os

from ...utils.files import is_image
from ..check.findings import Report
from ..check.images import without_junk
from ..declaration import Declaration
from .source import Source

__all__ = ["read_folders"]


def read_folders(declaration: Declaration, report: Report) -> Source:
    """
    Reads a folder that has a folder of images for each class; links are followed.

    Args:
        declaration: the dataset; its ``classes`` are names of folders in ``image_root``.
        report: receives findings on files that are passed over and on classes without images.

    Returns:
        the images, in the order of classes and names, each with the ``category_id`` of its class.
    """
    root = declaration.image_root
    classes = declaration.classes or ()
    source = Source("folder", root, root, categories=dict(enumerate(classes)), inputs={root})
    for label, name in source.categories.items():
        paths: list[str] = []
        for folder, folders, files in os.walk(os.path.join(root, name)):
            source.inputs.add(folder)
            folders[:] = without_junk(folder, folders, report)
            paths += [os.path.join(folder, file) for file in without_junk(folder, files, report)]
        images = []
        for path in sorted(paths):
            if is_image(path):
                images.append(os.path.relpath(path, root))
            else:
                report.add("file-ignored", path)
        if not images:
            report.add("no-images", os.path.join(root, name))
        share = declaration.share
        taken = [image for image in images if share is None or share.takes(image)]
        if images and not taken:
            report.add("class-without-boxes", os.path.join(root, name), value=f"none of its images are in {share}")
        for image in taken:
            source.images.append({"id": len(source.images), "file_name": image, "category_id": label})
    source.inputs.update(os.path.join(root, image["file_name"]) for image in source.images)
    return source
