"""
Advice before step 0 on whether a training with this config is likely to learn from these data, a line each.

A finding is about a record. Advice compares the data as a whole with the config, or two datasets with each other. No
training is refused because of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from detectron2.config import CfgNode

from .findings import Report
from .matching import Matcher, resize
from .statistics import COLOURS, Statistics

__all__ = ["advise"]

FEW_OBJECTS = 10
# Advice is given if no anchor reaches more than this share of a class's objects; a remedy must leave at most REMEDIED.
UNMATCHED = 0.1
REMEDIED = 0.02
# Number of objects that remedies are tried on: all objects of a large dataset would take a minute.
REMEDY_OBJECTS = 5000
SCALES = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
# Limits for two datasets to be alike: the factor between the medians of sizes, and the difference between the means of
# colours, in grey levels and in standard deviations of the images.
SIZE_FACTOR = 2.5
COLOUR_LEVELS = 30.0
COLOUR_DEVIATIONS = 2.0
_MIN_IMAGES = 5
_SHOWN = 8


def advise(cfg: CfgNode, reports: Mapping[str, Report]) -> list[str]:
    """
    Compares datasets with a config.

    Args:
        cfg: the config.
        reports: the reports of the declared datasets, by name.

    Returns:
        a line for each likely cause of a failed training, with the way out.
    """
    train = [name for name in cfg.DATASETS.TRAIN if name in reports]
    test = [name for name in cfg.DATASETS.TEST if name in reports]
    lines = [line for name in train for line in _unmatched(cfg, reports[name])]
    lines += _rare_classes([reports[name] for name in train])
    lines += [line for name in dict.fromkeys([*train, *test]) for line in _crowded(cfg, reports[name])]
    for name in test:
        for other in train:
            if name != other:
                lines += _different(cfg, reports[other], reports[name])
    return lines


# --- Objects that the detector cannot match ---


def _unmatched(cfg: CfgNode, report: Report) -> Iterator[str]:
    statistics = report.statistics
    matcher = Matcher.from_config(cfg)
    if statistics is None or matcher is None or not statistics.objects:
        return
    missed = _missed(cfg, matcher, statistics)
    names = list(report.categories.values())
    classes = np.array([row[0] for row in statistics.objects], dtype=int)
    shares = {names[index]: (missed[classes == index].mean(), (classes == index).sum()) for index in np.unique(classes)}
    worst = sorted((item for item in shares.items() if item[1][0] > UNMATCHED), key=lambda item: -item[1][0])
    if not worst:
        return
    listed = ", ".join(f"{_percent(share)} of {number} {name}" for name, (share, number) in worst[:_SHOWN])
    more = f" and {len(worst) - _SHOWN} more classes" if len(worst) > _SHOWN else ""
    rule = "no point of FCOS lies in them" if matcher.threshold is None else f"no anchor has IoU {matcher.threshold:g}"
    size = f"INPUT.MIN_SIZE_TRAIN {tuple(_listed(cfg.INPUT.MIN_SIZE_TRAIN))}"
    yield (
        f"{report.name}: {_percent(missed.mean())} of the objects are too small or too thin to be learnt well ({rule} "
        f"at {size}): {listed}{more}; {_remedies(cfg, statistics, missed)}"
    )


def _missed(cfg: CfgNode, matcher: Matcher, statistics: Statistics, scale: float = 1.0) -> np.ndarray:
    """Returns the share of the config's image sizes at which each object is missed: (N,)."""
    rows = np.array(statistics.objects, dtype=np.float64)
    shorts = _shortest_sides(cfg)
    missed = np.zeros(len(rows))
    for short in shorts:
        longest = round(cfg.INPUT.MAX_SIZE_TRAIN * max(scale, 1))
        boxes, sizes = resize(rows[:, 1:5], rows[:, 5:7], round(short * scale), longest)
        missed += ~matcher.is_matched(boxes, sizes)
    return missed / len(shorts)


def _remedies(cfg: CfgNode, statistics: Statistics, missed: np.ndarray) -> str:
    """Returns the smallest change of the config that leaves few of the objects unmatched, else the best change."""
    step = -(-len(missed) // REMEDY_OBJECTS)
    statistics, missed = dataclasses.replace(statistics, objects=statistics.objects[::step]), missed[::step]
    tried: list[tuple[str, float]] = []
    share = float(missed.mean())
    goal = min(REMEDIED, share / 4)
    current = Matcher.from_config(cfg)
    if current is None:
        return ""
    shorts = _listed(cfg.INPUT.MIN_SIZE_TRAIN)
    if all(shorts):
        larger = [(scale, float(_missed(cfg, current, statistics, scale).mean())) for scale in SCALES]
        scale, left = _least(larger, goal)
        sizes = ", ".join(str(round(short * scale)) for short in shorts) + ("," if len(shorts) == 1 else "")
        longest = round(cfg.INPUT.MAX_SIZE_TRAIN * scale)
        tried.append((f"INPUT.MIN_SIZE_TRAIN ({sizes}) with MAX_SIZE_TRAIN {longest}", left))
    if current.threshold is not None:
        smaller = []
        for scale in SCALES:
            matcher = Matcher.from_config(cfg, scale=1 / scale)
            if matcher is not None:
                smaller.append((scale, float(_missed(cfg, matcher, statistics).mean())))
        scale, left = _least(smaller, goal)
        tried.append((f"MODEL.ANCHOR_GENERATOR.SIZES divided by {scale:g}", left))
        ratios = _ratios(statistics, missed)
        wider = Matcher.from_config(cfg, ratios=ratios)
        if wider is not None:
            listed = ", ".join(f"{ratio:g}" for ratio in ratios)
            text = f"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[{listed}]]"
            tried.append((text, float(_missed(cfg, wider, statistics).mean())))
    helpful = sorted((item for item in tried if item[1] < 0.75 * share), key=lambda item: item[1])
    if not helpful:
        return "cut the images into parts, so that objects are larger in them"
    return "change one: " + ", or ".join(f"{text} leaves {_percent(left)}" for text, left in helpful)


def _least(tried: Sequence[tuple[float, float]], goal: float) -> tuple[float, float]:
    """Returns the first (change, share left) whose share reaches the goal, else the one with the smallest share."""
    return next((item for item in tried if item[1] <= goal), min(tried, key=lambda item: item[1]))


def _ratios(statistics: Statistics, missed: np.ndarray) -> list[float]:
    """Returns heights by widths for anchors: 1, and powers of two as far as the objects that are missed need them."""
    rows = np.array(statistics.objects, dtype=np.float64)[missed > 0]
    if not len(rows):
        return [0.5, 1.0, 2.0]
    # Sides are kept with two digits, so that a side of less than 0.005 is 0 there.
    sides = rows[:, 3:5].clip(0.01)
    logs = np.log2(sides[:, 1] / sides[:, 0])
    low, high = min(-1, round(np.percentile(logs, 5))), max(1, round(np.percentile(logs, 95)))
    return [2.0**power for power in range(max(low, -4), min(high, 4) + 1)]


# --- Classes and numbers of objects ---


def _rare_classes(reports: Sequence[Report]) -> Iterator[str]:
    """Returns advice on classes with few objects in all training sets together."""
    totals: dict[str, int] = {}
    for report in reports:
        if report.statistics is not None:
            for name, number in zip(report.categories.values(), report.statistics.per_class, strict=False):
                totals[name] = totals.get(name, 0) + number
    rare = sorted((number, name) for name, number in totals.items() if number < FEW_OBJECTS)
    if rare:
        listed = ", ".join(f"{name} {number}" for number, name in rare[:_SHOWN])
        more = f" and {len(rare) - _SHOWN} more" if len(rare) > _SHOWN else ""
        yield (
            f"DATASETS.TRAIN: {len(rare)} of {len(totals)} classes have fewer than {FEW_OBJECTS} objects: "
            f"{listed}{more}; they will hardly be learnt: label more of them, or leave the classes out"
        )


def _crowded(cfg: CfgNode, report: Report) -> Iterator[str]:
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if report.statistics is None or not report.statistics.per_image or limit < 0:
        return
    per_image = report.statistics.per_image
    number, most = sum(images for objects, images in per_image if objects > limit), per_image[-1][0]
    if number:
        yield (
            f"{report.name}: {number} image{'s have' if number > 1 else ' has'} more objects than "
            f"TEST.DETECTIONS_PER_IMAGE {limit}, up to {most} ({report.statistics.fullest}): the rest cannot be "
            f"found; set TEST.DETECTIONS_PER_IMAGE {most} or more"
        )


# --- Two datasets ---


def _different(cfg: CfgNode, train: Report, test: Report) -> Iterator[str]:
    first, second = train.statistics, test.statistics
    if first is None or second is None:
        return
    names = f"{train.name} and {test.name}"
    if min(len(first.sizes), len(second.sizes)) >= _MIN_IMAGES:
        medians = [np.median(np.array(s.sizes), axis=0).astype(int) for s in (first, second)]
        sides = [float(np.sqrt(np.prod(median.astype(float)))) for median in medians]
        if max(sides) > SIZE_FACTOR * min(sides):
            text = " and ".join(f"{width}x{height}" for width, height in medians)
            yield f"{names}: images of very different size, {text} in the middle: is one of them scaled or cut?"
    if min(len(first.objects), len(second.objects)) >= _MIN_IMAGES:
        seen = _object_side(first, _shortest_sides(cfg), cfg.INPUT.MAX_SIZE_TRAIN)
        then = _object_side(second, [cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST)
        if max(seen, then) > SIZE_FACTOR * min(seen, then):
            yield (
                f"{names}: objects of very different size after the resize, {seen:.0f} and {then:.0f} pixels in the "
                "middle; compare INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST, and the data"
            )
    if min(len(first.colours), len(second.colours)) >= _MIN_IMAGES:
        mine, other = np.array(first.colours), np.array(second.colours)
        away = np.abs(mine.mean(axis=0) - other.mean(axis=0))
        spread = np.sqrt((mine.var(axis=0) + other.var(axis=0)) / 2)
        wild = (away > COLOUR_LEVELS) & (away > COLOUR_DEVIATIONS * spread)
        if wild.any():
            values = zip(COLOURS, mine.mean(axis=0), other.mean(axis=0), wild, strict=True)
            text = ", ".join(f"{name} {a:.0f} and {b:.0f}" for name, a, b, is_wild in values if is_wild)
            yield f"{names}: images of very different colours (means, of 255): {text}; is one of them grey or inverted?"


def _object_side(statistics: Statistics, shorts: Sequence[int], longest: int) -> float:
    """Returns the median over objects of the square root of their area in pixels of the network's input."""
    rows = np.array(statistics.objects, dtype=np.float64)
    areas = [resize(rows[:, 1:5], rows[:, 5:7], short, longest)[0][:, 2:].prod(axis=1) for short in shorts]
    return float(np.median(np.sqrt(areas)))


def _shortest_sides(cfg: CfgNode) -> list[int]:
    """Returns the shorter sides that training images are resized to; for a range, its ends and its middle."""
    sides = _listed(cfg.INPUT.MIN_SIZE_TRAIN)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sides) == 2:
        return [sides[0], sum(sides) // 2, sides[1]]
    return sides


def _listed(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 or not share else "less than 1%"
