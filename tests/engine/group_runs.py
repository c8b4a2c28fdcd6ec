"""What two CPU processes do together in one step, as a program: ``python group_runs.py FOLDER``.

Prints a JSON report as its last line.
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from detectron2.layers import CycleBatchNormList
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from process_runs import together, write

from aqdet.engine import NonFiniteLoss
from aqdet.engine.checked_trainer import CheckedTrainer
from aqdet.layers import LevelNorms, QuantConv2d, run_chains
from aqdet.quantization import QuantSpec, calibrate
from aqdet.quantization.kernels import free_norms
from aqdet.quantization.lean.norm import computed, defer, quantize_deferred

CASES = ("fine", "loss", "gradient")
NORMS = (CycleBatchNormList, LevelNorms)


def non_finite(folder):
    """What each process says, and whether its weights moved, where rank 1 alone has a loss or a gradient of NaN."""
    found = {}
    for case in CASES:
        model = nn.Linear(2, 1)
        trainer = CheckedTrainer(model, [], torch.optim.SGD(model.parameters(), 0.1))
        is_wrong = comm.get_rank() == 1 and case != "fine"
        model.weight.grad = torch.full((1, 2), float("nan") if is_wrong and case == "gradient" else 1.0)
        loss = torch.tensor(float("nan") if is_wrong and case == "loss" else 1.0)
        with EventStorage(0):
            try:
                trainer._write_metrics({"loss_cls": torch.ones(()), "loss_box": loss}, 0.0)
                found[case] = ""
            except NonFiniteLoss as error:
                found[case] = str(error)
    (folder / f"rank{comm.get_rank()}.txt").write_text(json.dumps(found))


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, 8, 7, generator=generator) * 2 + 1, torch.randn(6, 5, 8, 7, generator=generator)


def norm_of(kind):
    norm = kind(5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 5))
        norm.bias.copy_(torch.linspace(-1, 1, 5))
    return norm


def step(norm, x, grad, quantizes):
    """Output, gradients and running statistics."""
    x, scale = x.clone().requires_grad_(), torch.tensor(0.25, requires_grad=True)
    deferred = defer(norm, x)
    y = quantize_deferred(deferred, scale, 0, 15, gradient="lsq") if quantizes else computed(deferred)
    y.backward(grad)
    own = {"y": y.detach(), "x": x.grad}
    shared = {"weight": norm.weight.grad, "bias": norm.bias.grad, "scale": scale.grad}
    return own, shared, {name: value.clone() for name, value in norm.named_buffers()}


def synchronized(folder):
    """Steps on shares of 6 images, four and two, and one on none at all."""
    x, grad = batch()
    share = slice(0, 4) if comm.get_rank() == 0 else slice(4, 6)
    steps = [step(norm_of(nn.SyncBatchNorm), x[share], grad[share], quantizes) for quantizes in (False, True)]
    share = slice(0, 6) if comm.get_rank() == 0 else slice(0, 0)
    steps.append(step(norm_of(nn.SyncBatchNorm), x[share], grad[share], False))
    write(folder / f"rank{comm.get_rank()}.pth", steps)


def levels(count):
    return [torch.randn(6, 4, side, side, generator=torch.Generator().manual_seed(side)) for side in (8, 5, 3)[:count]]


def tower(kind, norms):
    """A head's layers: convolution, norm of each level, ReLU, convolution, the same again without quantizers."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)]
    specs = QuantSpec("lsq", 4, "weight"), QuantSpec("lsq", 8, "input", signed=False)
    convs[:2] = [QuantConv2d.from_float(conv, *specs) for conv in convs[:2]]
    with torch.no_grad():
        calibrate(nn.ModuleList(convs[:2]), lambda: [conv(levels(1)[0].relu()) for conv in convs[:2]], method="minmax")
    first, second = (norms(3, kind, num_features=4) for _ in range(2))
    return nn.ModuleList([convs[0], first, nn.ReLU(), convs[1], second, nn.ReLU(), *convs[2:]])


def tower_step(kind, norms, share):
    """Outputs and gradients by level, gradients and buffers of the layers, and how often processes exchanged."""
    calls, own = [], {}
    layers, xs = tower(kind, norms), [x[share].clone().requires_grad_() for x in levels(3)]
    with contextlib.ExitStack() as stack:
        for name in ("all_gather", "all_reduce"):
            real = getattr(dist, name)
            counted = lambda *a, real=real, **k: calls.append(real.__name__) or real(*a, **k)  # noqa: E731
            stack.enter_context(mock.patch.object(dist, name, counted))
        with free_norms():  # a convolution in float computes its input again
            ys = run_chains(list(layers), xs)
        sum(y.square().sum() for y in ys).backward()
    for number, (x, y) in enumerate(zip(xs, ys, strict=True)):
        own.update({f"x{number}": x.grad, f"y{number}": y.detach()})
    statistics = {name: value for name, value in layers.named_buffers() if value.dtype != torch.bool}
    return own, {name: p.grad for name, p in layers.named_parameters()}, statistics, calls


def towers(folder):
    """Steps of a tower on shares of 6 images, four and two, with one affine for all levels and one for each."""
    share = slice(0, 4) if comm.get_rank() == 0 else slice(4, 6)
    steps = [tower_step(nn.SyncBatchNorm, norms, share) for norms in NORMS]
    write(folder / f"rank{comm.get_rank()}.pth", steps)


def error_of(found, expected):
    return max(((found[key] - want).abs().max() / want.abs().max().clamp(min=1)).item() for key, want in expected.items() if want is not None)  # fmt: skip  # noqa: E501


def main(folder):
    torch.set_num_threads(1)
    statuses, _ = together(folder / "finite", non_finite)
    report = {"finite": [json.loads((folder / "finite" / f"rank{rank}.txt").read_text()) for rank in range(2)]}
    statuses += together(folder / "synchronized", synchronized)[0]
    ranks = [torch.load(folder / "synchronized" / f"rank{rank}.pth") for rank in range(2)]
    statuses += together(folder / "towers", towers)[0]
    report["statuses"], report["synchronized"], report["towers"] = statuses, [], []
    ranks_of_towers = [torch.load(folder / "towers" / f"rank{rank}.pth") for rank in range(2)]
    for index, norms in enumerate(NORMS):
        own, shared, buffers, _ = tower_step(nn.BatchNorm2d, norms, slice(0, 6))
        first, second = (rank[index] for rank in ranks_of_towers)
        report["towers"].append(
            {
                "own": error_of({key: torch.cat([first[0][key], second[0][key]]) for key in own}, own),
                "shared": error_of({k: first[1][k] + second[1][k] for k, v in shared.items() if v is not None}, shared),
                "buffers": max(error_of(part[2], buffers) for part in (first, second)),
                "calls": first[3],
            }
        )
    for index, quantizes in enumerate((False, True, False)):
        own, shared, buffers = step(norm_of(nn.BatchNorm2d), *batch(), quantizes)
        first, second = (rank[index] for rank in ranks)
        report["synchronized"].append(
            {
                "own": error_of({key: torch.cat([first[0][key], second[0][key]]) for key in own}, own),
                "shared": error_of({k: first[1][k] + second[1][k] for k, v in shared.items() if v is not None}, shared),
                "buffers": max(error_of(part[2], buffers) for part in (first, second)),
            }
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
