"""Adaptive training sample selection: which points of a dense detector learn which object.

After "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection"
(1912.02424). Objects marked as crowd do not come here: Detectron2's mapper leaves them out.

Shape legend: R points of all levels together, R_l of level l, G objects of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor


@torch.no_grad()
def atss_overlaps(points: Sequence[Tensor], objects: Tensor, *, candidates: int, side: float) -> Tensor:
    """Computes the overlap of each object with its positive points, ``(G, R)``, and 0 at all other points.

    At every point stands a square. An object's candidates are, of each level, the points nearest to its centre. Those
    are positive whose square overlaps the object by at least the mean plus the standard deviation of all candidates'
    overlaps, and which lie inside of it. A point that is positive for several objects belongs to the one that its
    square overlaps most, the first of equals: the maximum over G.

    The paper leaves open what its public code does, and this does too: the standard deviation is that of a sample
    (divided by the number less one), and a level of fewer points has all of them as candidates. Among points at equal
    distance the first in the order of the level are taken, so that the result is the same on every device.

    Args:
        points: the points of each level, ``(R_l, 4)``, as squares as large as the level's stride, in pixels.
        objects: boxes ``(G, 4)`` in pixels.
        candidates: points of each level that an object considers; 9 in the paper.
        side: length of a side of the square at each point, in strides; 8 in the paper.
    """
    all_points = torch.cat(list(points))
    centres = (all_points[:, :2] + all_points[:, 2:]) / 2
    stride = all_points[:, 2:3] - all_points[:, :1]
    squares = torch.cat([centres - stride * (side / 2), centres + stride * (side / 2)], dim=1)
    overlaps = pairwise_iou(Boxes(objects), Boxes(squares))
    away = ((objects[:, None, :2] + objects[:, None, 2:]) / 2 - centres).square().sum(dim=2)
    sizes = [len(level) for level in points]
    chosen = torch.cat([_nearest(of_level, candidates) for of_level in away.split(sizes, dim=1)], dim=1)
    number = sum(min(candidates, size) for size in sizes)
    # Relative to the best candidate, so that equal overlaps have a deviation of 0 and equal their mean exactly.
    best = torch.where(chosen, overlaps, 0.0).amax(dim=1, keepdim=True)
    below = torch.where(chosen, overlaps - best, 0.0)
    mean = below.sum(dim=1, keepdim=True) / number
    squared = torch.where(chosen, below - mean, 0.0).square().sum(dim=1, keepdim=True)
    threshold = mean + (squared / max(number - 1, 1)).sqrt()
    sides = torch.cat([centres - objects[:, None, :2], objects[:, None, 2:] - centres], dim=2)
    positive = chosen & (below >= threshold) & (sides.amin(dim=2) > 0)
    return torch.where(positive, overlaps, 0.0)


def _nearest(away: Tensor, number: int) -> Tensor:
    """Returns which of the points ``(G, R_l)`` are the ``number`` nearest of each object, the first among equals."""
    number = min(number, away.shape[1])
    farthest = away.topk(number, dim=1, largest=False).values[:, -1:]
    nearer, as_far = away < farthest, away == farthest
    room = number - nearer.sum(dim=1, keepdim=True)
    return nearer | (as_far & (as_far.cumsum(dim=1) <= room))
