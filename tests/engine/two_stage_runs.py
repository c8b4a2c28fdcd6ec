"""A Mask R-CNN's steps in two CPU processes, as a program: ``python two_stage_runs.py FOLDER``.

Prints a JSON report as its last line.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.process_runs import together, write
from helpers import AUX, QUANT, calibrated
from two_stage import MASK, rcnn, shaped_batch

from aqdet.quantization import quantizers
from aqdet.utils.distributed import distribute

OVERRIDES = (*MASK, *QUANT, *AUX, "MODEL.FPN.RELU", "True")


def gradients(model, module, share):
    """Losses and gradients of a step whose samples depend on the process alone."""
    torch.manual_seed(comm.get_rank())
    model.zero_grad()
    with EventStorage(0):
        losses = module(share)
    sum(losses.values()).backward()
    return {k: v.item() for k, v in losses.items()}, {n: p.grad.clone() for n, p in model.named_parameters()}


def steps(folder):
    """Three steps; the second process's images have no objects."""
    model = rcnn(*OVERRIDES)
    share = shaped_batch(4, empty=(2, 3))[2 * comm.get_rank() :][:2]
    calibrated(model.train(), share)
    _, own = gradients(model, model, share)
    for gradient in own.values():
        dist.all_reduce(gradient)
        gradient /= comm.get_world_size()
    wrapped = distribute(model)
    losses, reduced = gradients(model, wrapped, share)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.step()
        gradients(model, wrapped, share)
    result = {
        "losses": losses,
        "reduced": reduced,
        "own": own,
        "parameters": dict(model.named_parameters()),
        "moved": [name for name, p in model.named_parameters() if not torch.equal(p, before[name])],
        "scales": {name: grid.scale.detach() for name, q in quantizers(model) if (grid := q.grid()) is not None},
    }
    write(folder / f"rank{comm.get_rank()}.pth", result)


def without_regions(folder):
    """A mask head whose norms share their batch, of which the first process has none."""
    head = rcnn(*MASK, "MODEL.ROI_MASK_HEAD.NORM", "naiveSyncBN_N").roi_heads.mask_head.train()
    x = torch.rand(3 * comm.get_rank(), 16, 14, 14, generator=torch.Generator().manual_seed(0))
    y = head.layers(x)
    y.square().sum().backward()
    write(folder / f"rank{comm.get_rank()}.pth", {"mean": head.mask_fcn1.norm.running_mean, "shape": y.shape})


def main(folder):
    torch.set_num_threads(1)
    statuses, _ = together(folder / "two", steps)
    ranks = [torch.load(folder / "two" / f"rank{rank}.pth") for rank in range(2)]
    first, second = ranks
    shared, _ = together(folder / "shared", without_regions)
    heads = [torch.load(folder / "shared" / f"rank{rank}.pth") for rank in range(2)]
    report = {
        "shared": shared,
        "shapes": [list(head["shape"]) for head in heads],
        "shared_mean": bool(torch.equal(heads[0]["mean"], heads[1]["mean"]) and heads[0]["mean"].abs().sum() > 0),
        "statuses": statuses,
        "losses": [rank["losses"] for rank in ranks],
        "names": list(first["reduced"]),
        "moved": first["moved"],
        "error": max(
            (rank["reduced"][name] - own).abs().max().item() / max(own.abs().max().item(), 1e-6)
            for rank in ranks
            for name, own in rank["own"].items()
        ),
        "agree": {
            key: all(torch.equal(value, second[key][name]) for name, value in first[key].items())
            for key in ("reduced", "parameters", "scales")
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
