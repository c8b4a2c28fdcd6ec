"""Losses of several heads on one set of targets, against Detectron2's of each."""

import fvcore.nn
import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import FCOS, make_batch, make_model

from aqdet.modeling.meta_arch.shared_losses import giou_loss

CASES = [
    ("RetinaNet", ()),
    ("smooth", ("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", "0.1")),
    *((kind, ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", kind)) for kind in ("giou", "diou", "ciou")),
    ("FCOS", FCOS),
]


@pytest.mark.parametrize("has_boxes", (True, False), ids=("boxes", "no boxes"))
@pytest.mark.parametrize("overrides", [case[1] for case in CASES], ids=[case[0] for case in CASES])
def test_each_head_has_the_losses_and_gradients_of_detectron2(overrides, has_boxes):
    model = make_model(*overrides)
    instances = [sample["instances"] if has_boxes else sample["instances"][:0] for sample in make_batch()]
    features = [torch.zeros(len(instances), 8, size, size) for size in (8, 4, 2, 1, 1)]
    anchors = model.anchor_generator(features)
    labels, boxes = model.label_anchors(anchors, instances)
    assert has_boxes == bool(((torch.stack(labels) >= 0) & (torch.stack(labels) != model.num_classes)).any())
    sizes = [model.num_classes, 4, *([1] if overrides is FCOS else [])]
    generator = torch.Generator().manual_seed(0)

    def predictions(size):
        shapes = [(len(instances), len(level), size) for level in anchors]
        return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]

    heads = [[predictions(size) for size in sizes] for _ in range(3)]
    leaves = [leaf for head in heads for part in head for leaf in part]
    with EventStorage(0) as storage:
        shared = model.losses_of_heads(anchors, labels, boxes, heads)
        normalizer, logged = model.loss_normalizer, storage.latest()["num_pos_anchors"]
        gradients = torch.autograd.grad(sum(value for head in shared for value in head.values()), leaves)
        del model.loss_normalizer
        alone = []
        for logits, deltas, *rest in heads:
            alone.append(model.losses(anchors, logits, labels, deltas, boxes, *rest))
            assert (model.loss_normalizer, storage.latest()["num_pos_anchors"]) == (normalizer, logged)
            del model.loss_normalizer
        expected = torch.autograd.grad(sum(value for head in alone for value in head.values()), leaves)
    assert [list(head) for head in shared] == [list(head) for head in alone]
    for found, want in zip(shared, alone, strict=True):
        assert all(torch.equal(found[name], value) for name, value in want.items())
    for found, want in zip(gradients, expected, strict=True):  # a compiled loss rounds as it was compiled
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-8)


def test_giou_is_fvcores_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    low, size = torch.rand(2, 2000, 2, generator=generator).mul(8).round()  # apart, touching, inside, equal, flat
    boxes = torch.cat([low, low + size], dim=1)
    found = []
    for loss in (giou_loss, fvcore.nn.giou_loss):
        leaf = (boxes + 0.0).requires_grad_()
        values = loss(leaf, boxes.roll(1, dims=0))
        values.sum().backward()
        found.append((values, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert giou_loss(boxes[:0], boxes[:0]).shape == (0,)
