"""Registration of datasets that a config declares, and checks of the data against the config before training."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils import comm

from ..utils.files import IMAGE_ENDINGS, write_text
from .check.advice import advise
from .check.cache import checked
from .check.findings import Report, reports_as_json
from .check.records import find_shared_images
from .class_names import listed, thing_classes
from .declaration import IMAGE_FOLDER, Declaration
from .declared import parse_declared, parse_image_folders
from .embedded.register import set_cache_dir
from .formats.folders import read_folders
from .mask_check import reads_masks

__all__ = [
    "EVALUATOR_TYPE",
    "DatasetCheck",
    "check_datasets",
    "check_num_classes",
    "complete_num_classes",
    "declarations",
    "register_declared",
]

logger = logging.getLogger(__name__)

EVALUATOR_TYPE = "image_classification"
# Meta-architecture, without "Quant" in front -> section of the config with its number of classes.
NUM_CLASSES_NODES = {
    "RetinaNet": "RETINANET",
    "FCOS": "FCOS",
    "Classifier": "CLASSIFIER",
    "GeneralizedRCNN": "ROI_HEADS",
}


def register_declared(cfg: CfgNode, *, train: bool = True) -> None:
    """
    Registers ``DATASETS.DECLARED`` and ``IMAGE_FOLDERS`` and checks that the datasets to train and test on exist.

    Every process of a job has to call it. It may be called again with the same declarations. It checks labels, and
    opens images only where that cannot be avoided; :func:`check_datasets` is the whole check.

    Args:
        cfg: the config; ``DATASETS.CACHE_DIR`` is applied, too.
        train: whether there is a training; without one, datasets that are not tested on need not exist.

    Raises:
        ValueError: in one line, naming the entry, the field, the value and what would be right.
    """
    set_cache_dir(cfg.DATASETS.CACHE_DIR)
    for declaration in declarations(cfg, None if train else cfg.DATASETS.TEST).values():
        if declaration.format == IMAGE_FOLDER:
            _register_image_folder(declaration)
        else:
            _register(declaration, cfg.DATASETS.STRICT, reads_masks(cfg))
    for key in ("TRAIN", "TEST")[not train :]:
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                close = difflib.get_close_matches(name, DatasetCatalog.list(), 4)
                hint = f"did you mean {' or '.join(close)}" if close else "declare it in DATASETS.DECLARED"
                raise ValueError(f"DATASETS.{key}: no dataset {name!r}, {hint}")


def declarations(cfg: CfgNode, only: Collection[str] | None = None) -> dict[str, Declaration]:
    """
    Returns the entries of ``DATASETS.DECLARED`` and ``IMAGE_FOLDERS`` by name, their paths looked up.

    Args:
        cfg: the config.
        only: names of the entries that are used; None for all.

    Raises:
        ValueError: in one line, as :func:`register_declared` does.
    """
    found = parse_declared(cfg.DATASETS.DECLARED, only)
    for declaration in parse_image_folders(cfg.DATASETS.IMAGE_FOLDERS, only):
        if found.setdefault(declaration.name, declaration) != declaration:
            raise ValueError(f"DATASETS.IMAGE_FOLDERS: {declaration.name!r} is the name of another entry")
    return found


@dataclasses.dataclass(frozen=True)
class DatasetCheck:
    """
    The result of :func:`check_datasets`.

    Attributes:
        reports: reports of the declared datasets that are used, by name.
        advice: lines on the data as a whole.
        strict: value of ``DATASETS.STRICT``.
    """

    reports: tuple[Report, ...]
    advice: tuple[str, ...]
    strict: bool

    def write(self, folder: str | os.PathLike[str]) -> None:
        """
        Writes ``dataset_check.txt`` and ``dataset_check.json`` in the main process, if there are reports.

        Args:
            folder: ``OUTPUT_DIR`` of a training that has started, ``OUTPUT_DIR/inference`` of an evaluation.
        """
        if self.reports and comm.is_main_process():
            text = "\n\n".join([*(r.text() for r in self.reports), *(f"advice: {line}" for line in self.advice)])
            content = reports_as_json(self.reports, self.strict, self.advice)
            for ending, written in (("txt", f"{text}\n"), ("json", content)):
                write_text(os.path.join(folder, f"dataset_check.{ending}"), written, errors="surrogatepass")


def check_datasets(cfg: CfgNode, *, train: bool = True) -> DatasetCheck:
    """Checks the declared datasets before step 0 and logs the findings.

    Likely causes of a failed training in the data as a whole are logged, too (:mod:`aqdet.data.check.advice`). Images
    are decoded unless ``DATASETS.CHECK_IMAGES`` is False. A check is not repeated until a file that it read changes.
    One process of each machine checks, and the others wait. Nothing is written yet; :meth:`DatasetCheck.write` does
    that when the run has its folder.

    Args:
        cfg: config whose datasets are registered.
        train: whether the data to train on are used, and not only those to test on.

    Returns:
        The reports and the advice.

    Raises:
        ValueError: in one line, if there are errors, or under ``DATASETS.STRICT`` any findings but notes.
    """
    names = dict.fromkeys(_used(cfg, train))
    known = declarations(cfg, names)
    with _first_of_the_machine():
        reports = {
            name: checked(known[name], pixels=cfg.DATASETS.CHECK_IMAGES, masks=reads_masks(cfg))[0]
            for name in names
            if name in known
        }
    if cfg.MODEL.KEYPOINT_ON:
        _refuse_without_keypoints([name for name in names if name in cfg.DATASETS.TRAIN or name in known])
    for first, second in _train_and_test(cfg, reports):
        find_shared_images(first, second)
    for name in names:
        if name in reports:
            _log(reports[name], cfg)
        else:
            logger.info("Dataset %s is not of DATASETS.DECLARED or IMAGE_FOLDERS: not checked", name)
    advice = advise(cfg, reports)
    for line in advice:
        logger.warning(line)
    for report in reports.values():
        _refuse(report, f"dataset {report.name}", cfg.DATASETS.STRICT)
    return DatasetCheck(tuple(reports.values()), tuple(advice), cfg.DATASETS.STRICT)


def _refuse_without_keypoints(names: Iterable[str]) -> None:
    for name in names:
        if MetadataCatalog.get(name).get("keypoint_names") is None:
            raise ValueError(
                f"MODEL.KEYPOINT_ON is True, but dataset {name} has no keypoint_names: keypoints of declared datasets "
                "are not read; register yours with Detectron2's register_coco_instances, whose metadata is given "
                "keypoint_names and keypoint_flip_map"
            )


def check_num_classes(cfg: CfgNode, *, train: bool = True) -> None:
    """
    Checks the number of classes in the config against the datasets, and the datasets against each other.

    The number 0 is replaced by the datasets' number.

    Args:
        cfg: config whose datasets are registered.
        train: whether the data to train on are used, and not only those to test on.

    Raises:
        ValueError: in one line, naming the config key or the datasets that disagree.
    """
    node = _num_classes_node(cfg)
    architecture = cfg.MODEL.META_ARCHITECTURE
    first, expected = "", None
    for name in _used(cfg, train):
        has_boxes = MetadataCatalog.get(name).get("evaluator_type") != EVALUATOR_TYPE
        if has_boxes == (architecture == "QuantClassifier"):
            found, wanted = ("boxes", "image folders") if has_boxes else ("image folders", "boxes")
            raise ValueError(f"dataset {name} has {found}, but MODEL.META_ARCHITECTURE {architecture} needs {wanted}")
        classes = thing_classes(name)
        if classes is None:
            logger.warning("Dataset %s does not name its classes: their number is not checked", name)
            continue
        if expected is None:
            first, expected = name, classes
        if classes != expected:
            raise ValueError(
                f"datasets {first} and {name} have different classes: {listed(expected)} and {listed(classes)}"
            )
        if node is None:
            continue
        if cfg.MODEL[node].NUM_CLASSES == 0:
            logger.info("MODEL.%s.NUM_CLASSES: %d, from %s", node, len(classes), name)
            cfg.MODEL[node].NUM_CLASSES = len(classes)
        if len(classes) != cfg.MODEL[node].NUM_CLASSES:
            raise ValueError(
                f"MODEL.{node}.NUM_CLASSES is {cfg.MODEL[node].NUM_CLASSES}, but {name} has "
                f"{len(classes)} classes: {listed(classes)} (0 takes the number from the data)"
            )
    if _lacks_num_classes(cfg):
        where = "DATASETS.TRAIN or TEST" if train else "DATASETS.TEST"
        raise ValueError(f"MODEL.{node}.NUM_CLASSES is 0, but no dataset in {where} names its classes")


def complete_num_classes(cfg: CfgNode) -> None:
    """
    Replaces a number of classes of 0 by the data's, as training does; no data are needed for any other number.

    Raises:
        ValueError: as :func:`register_declared` and :func:`check_num_classes` do.
    """
    if _lacks_num_classes(cfg):
        register_declared(cfg)
        check_num_classes(cfg)


def _used(cfg: CfgNode, train: bool) -> list[str]:
    return [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] if train else list(cfg.DATASETS.TEST)


def _lacks_num_classes(cfg: CfgNode) -> bool:
    node = _num_classes_node(cfg)
    return node is not None and cfg.MODEL[node].NUM_CLASSES == 0


def _num_classes_node(cfg: CfgNode) -> str | None:
    return NUM_CLASSES_NODES.get(cfg.MODEL.META_ARCHITECTURE.removeprefix("Quant"))


def _register(declaration: Declaration, strict: bool, masks: bool) -> None:
    name = declaration.name
    known = MetadataCatalog.get(name).get("declaration") if name in DatasetCatalog else declaration
    if known != declaration:
        raise ValueError(f"DATASETS.DECLARED: {name!r} is registered already with other files, choose another name")
    report, json_file = checked(declaration, pixels=False, masks=masks)
    _refuse(report, f"DATASETS.DECLARED: {name}", strict)
    changed = report.number("repaired", "dropped")
    if changed:
        logger.warning("Dataset %s: %d findings repaired or dropped:\n%s", name, changed, report.summary())
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    image_root = declaration.image_root
    DatasetCatalog.register(name, lambda: load_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        declaration=declaration,
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=list(report.categories.values()),
        thing_dataset_id_to_contiguous_id={key: index for index, key in enumerate(report.categories)},
    )


def _register_image_folder(declaration: Declaration) -> None:
    name, root, classes = declaration.name, declaration.image_root, declaration.classes or ()
    if len(classes) == 1:
        logger.warning("DATASETS.IMAGE_FOLDERS: %r has one class, %r: any classifier is right", root, classes[0])
    if name in DatasetCatalog:
        if MetadataCatalog.get(name).get("declaration") != declaration:
            raise ValueError(f"DATASETS.IMAGE_FOLDERS: {name!r} is registered already with other files, choose another")
        return
    DatasetCatalog.register(name, lambda: _load_image_folder(declaration))
    MetadataCatalog.get(name).set(
        declaration=declaration, image_root=root, thing_classes=list(classes), evaluator_type=EVALUATOR_TYPE
    )


def _load_image_folder(declaration: Declaration) -> list[dict[str, Any]]:
    """Returns records ``{"file_name", "image_id", "label"}``, in the order of classes and file names."""
    report = Report(declaration.name)
    source = read_folders(declaration, report)
    for finding in report.findings:
        if finding.kind == "no-images":
            raise ValueError(f"folder {finding.file!r} has no image ({', '.join(IMAGE_ENDINGS)})")
    other = report.counts["file-ignored"]
    if other:
        logger.warning("%s: %d files that are no images by their names are left out", source.image_root, other)
    return [
        {
            "file_name": os.path.join(source.image_root, image["file_name"]),
            "image_id": image["id"],
            "label": image["category_id"],
        }
        for image in source.images
    ]


def _refuse(report: Report, what: str, strict: bool) -> None:
    """Raises an error with the first findings of each kind if a report has findings that stop a training."""
    count = report.refused(strict)
    if not count:
        return
    shown: dict[str, str] = {}
    for finding in report.findings:
        if report.is_refused(finding.kind, strict):
            shown.setdefault(finding.kind, f"{report.counts[finding.kind]} {finding.kind}: {finding}")
    raise ValueError(
        f"{what}: {count} problem{'s' if count > 1 else ''}{' (DATASETS.STRICT)' if strict else ''}; "
        f"{'; '.join(shown.values())}; "
        "tools/check_dataset.py lists them all"
    )


@contextlib.contextmanager
def _first_of_the_machine() -> Iterator[None]:
    """Lets one process of each machine run the block first, and the others when it is done."""
    # Detectron2 knows the rank within the machine only for processes that it has started itself.
    local_rank = os.environ["LOCAL_RANK"] if dist.is_torchelastic_launched() else comm.get_local_rank()
    is_first = int(local_rank) == 0
    if not is_first:
        comm.synchronize()
    try:
        yield
    finally:
        if is_first:
            comm.synchronize()


def _train_and_test(cfg: CfgNode, reports: dict[str, Report]) -> Iterator[tuple[Report, Report]]:
    for test in cfg.DATASETS.TEST:
        for train in cfg.DATASETS.TRAIN:
            if train != test and train in reports and test in reports:
                yield reports[train], reports[test]


def _log(report: Report, cfg: CfgNode) -> None:
    facts = ", ".join(f"{value} {key}" for key, value in report.facts.items())
    logger.info("Dataset %s: %s; classes %s", report.name, facts, report.classes())
    empty = report.counts["image-without-boxes"]
    if empty and report.name in cfg.DATASETS.TRAIN:
        left_out = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        what = "not trained on" if left_out else "trained on as negatives"
        logger.info(
            "Dataset %s: %d images without boxes are %s (DATALOADER.FILTER_EMPTY_ANNOTATIONS is %s)",
            report.name,
            empty,
            what,
            left_out,
        )
    if report.counts:
        level = logging.WARNING if report.refused(strict=True) else logging.INFO
        logger.log(level, "Check of %s:\n%s", report.name, report.summary())
