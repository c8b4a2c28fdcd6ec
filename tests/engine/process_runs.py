"""Trainings by two CPU processes, as a program: ``python process_runs.py FOLDER``.

As in kill_runs, everything is imported once and forked. Prints a JSON report as its last line.
"""

import copy
import json
import os
import shutil
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import calibrated, make_batch, make_model
from kill_runs import TINY
from scale_moves import ScaleMoves, scales_overrides
from tiny_data import train_cfg, write_dataset

from aqdet.checkpoint import AqdetCheckpointer
from aqdet.engine import Trainer
from aqdet.engine.hooks.calibration import CalibrationHook
from aqdet.engine.launch import is_restart, join_process_group
from aqdet.modeling.scaffold import Distillation
from aqdet.quantization import calibrate, quantizers
from aqdet.utils.distributed import distribute, unwrap

DETECTOR = ("MODEL.QUANT.ENABLED", "True", "MODEL.AUX.ENABLED", "True", "MODEL.FPN.RELU", "True")
DETECTOR += ("MODEL.AUX.TAPS", "fpn")
FROZEN = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "FrozenBN", "MODEL.RETINANET.NORM", "FrozenBN")
FROZEN += ("MODEL.AUX.NORM", "FrozenBN")
WHOLE = ("MODEL.AUX.TAPS", "both", "MODEL.EXTRA_LOSS.ENABLED", "True", "MODEL.QUANT.INPUT.QUANTIZER", "lsqplus")
WHOLE += ("MODEL.FPN.RELU", "False", "MODEL.QUANT.RULES", '[["res4|bbox_subnet", {"INPUT.QUANTIZER": "n2uq"}]]')


def fork(run, *arguments):
    """Calls a function in another process; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        run(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def together(folder, run, world_size=2):
    """Calls ``run(folder)`` in processes of one group; their exit statuses and the seconds until the last."""

    def in_group(rank):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        run(folder)

    folder.mkdir()
    start = time.monotonic()
    children = [fork(in_group, rank) for rank in range(world_size)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], time.monotonic() - start


def write(path, data):
    torch.save(data, f"{path}.part")
    os.replace(f"{path}.part", path)


def gradients(folder, *overrides):
    """Two iterations' losses and gradients on this process's share of four images, the ranges calibrated on it."""
    model = make_model(*DETECTOR, *FROZEN, *overrides)
    if overrides:
        teacher = make_model(*FROZEN, seed=1)
        model.distillation = Distillation(teacher, feature_weight=0.0, logit_weight=1.0)
    share = make_batch(4)[comm.get_rank() :: comm.get_world_size()]
    calibrated(model, share)
    del model.loss_normalizer  # as calibration by the hook does
    wrapped = distribute(model)
    for iteration in range(2):  # DDP would stop in the second if a parameter had not been used in the first
        model.zero_grad()
        with EventStorage(iteration):
            losses = wrapped(share)
        sum(losses.values()).backward()
    result = {
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
        "scales": {name: grid.scale.detach() for name, q in quantizers(model) if (grid := q.grid()) is not None},
        "normalizer": model.loss_normalizer,
    }
    write(folder / f"rank{comm.get_rank()}.pth", result)


def whole_gradients(folder):
    """With everything that training can add to the losses."""
    gradients(folder, *WHOLE)


def failing_calibration(folder):
    """Rank 1 cannot read its data, while rank 0 aligns the auxiliary path."""
    model = make_model(*DETECTOR, *WHOLE)
    model.auxiliary.initialize_from(model)

    def run():
        if comm.get_rank() == 1:
            raise ValueError("no such image")
        with torch.no_grad(), EventStorage(0):
            model(make_batch(2))

    try:
        calibrate(model, run, method="minmax")
    except (ValueError, RuntimeError) as error:
        (folder / f"rank{comm.get_rank()}.txt").write_text(f"{type(error).__name__}: {error}")


def align(model, batch):
    """The parameters of the adaptors, and their average over processes as the hook has it."""
    model.auxiliary.initialize_from(model)
    alone = copy.deepcopy(model)
    calibrated(alone, batch)
    hook = CalibrationHook(lambda: [batch], 1, "minmax")
    hook.trainer = SimpleNamespace(model=model)
    hook.before_train()
    return {"own": dict(alone.auxiliary.named_parameters()), "average": dict(model.auxiliary.named_parameters())}


def aligning(folder):
    """Each process aligns to its own images."""
    found = align(make_model(*DETECTOR, *WHOLE), make_batch(4)[2 * comm.get_rank() :][:2])
    write(folder / f"rank{comm.get_rank()}.pth", found)


class KillOnce(HookBase):
    """Kills the second process in an iteration, if torchrun has not restarted it yet."""

    def __init__(self, iteration):
        self._iteration = iteration

    def before_step(self):
        if comm.get_rank() == 1 and self.trainer.iter == self._iteration and not is_restart():
            os.kill(os.getpid(), signal.SIGKILL)


class StopOnce(HookBase):
    """Sends the second process a signal in an iteration."""

    def __init__(self, iteration):
        self._iteration = iteration

    def before_step(self):
        if comm.get_rank() == 1 and self.trainer.iter == self._iteration:
            os.kill(os.getpid(), signal.SIGTERM)


def train(cfg, *hooks, resume=False):
    """A training, and what it ends with: rank, start, parameters, AP."""
    seed_all_rng(cfg.SEED + comm.get_rank())
    trainer = Trainer(cfg)
    trainer.register_hooks(list(hooks))
    trainer.resume_or_load(resume=resume)
    start = trainer.start_iter
    trainer.train()
    return start, {name: p.detach().clone() for name, p in unwrap(trainer.model).named_parameters()}


def elastic_worker(cfg):
    """What torchrun starts: trains, is killed once, goes on."""
    torch.set_num_threads(1)
    join_process_group("cpu")
    start, parameters = train(cfg, KillOnce(3), resume=is_restart())
    write(Path(cfg.OUTPUT_DIR) / f"rank{comm.get_rank()}.pth", (start, parameters))
    dist.destroy_process_group()


def learning(cfg):
    """How far a training of 50 iterations moves the scales."""
    moves = ScaleMoves()
    train(cfg, moves)
    (Path(cfg.OUTPUT_DIR) / f"rank{comm.get_rank()}.txt").write_text(json.dumps(moves.found))


def detections(folder):
    """How many each image has, and the sorted scores, of the last evaluation."""
    found = json.loads((folder / "coco_instances_results.json").read_text())
    counts = [sum(box["image_id"] == image for box in found) for image in range(1, 6)]
    return counts, sorted(box["score"] for box in found)


def stopping(cfg):
    """A signal to one process stops both after the same iteration."""
    status = None
    try:
        train(cfg, StopOnce(1))
    except SystemExit as end:
        status = (end.code, end.iteration)
    (Path(cfg.OUTPUT_DIR) / f"rank{comm.get_rank()}.txt").write_text(json.dumps(status))


def resuming(folder):
    """Each process has a disk of its own: what a resume finds when its folder holds what; iterations or an error."""
    disks = [folder / f"disk{rank}" for rank in range(2)]
    own, main = disks[comm.get_rank()], comm.is_main_process()
    own.mkdir()
    found = []

    def resume():
        checkpointer = AqdetCheckpointer(torch.nn.Linear(1, 1), str(own))
        try:
            found.append(checkpointer.resume_or_load("", resume=True).get("iteration"))
        except ValueError as error:
            found.append(str(error).replace(str(folder), ""))
        comm.synchronize()

    def save(iteration):
        AqdetCheckpointer(torch.nn.Linear(1, 1), str(own), save_to_disk=True).save("model_0000004", iteration=iteration)

    if not main:
        save(3)  # of an earlier run, when this node was the main one
    resume()
    if main:
        save(4)
    resume()  # another file of the same name
    if not main:
        (own / "model_0000004.pth").unlink()
    resume()
    if main:
        shutil.copy(own / "model_0000004.pth", disks[1])
    comm.synchronize()
    resume()  # the same file, wherever it is
    (folder / f"rank{comm.get_rank()}.txt").write_text(json.dumps(found))


def starting(cfg):
    """Where a training begins that the main process has no checkpoint of, and the second one has."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    (Path(cfg.OUTPUT_DIR) / "start.txt").write_text(str(trainer.start_iter))


def compare(folder, run):
    """Two processes against one."""
    folder.mkdir()
    statuses, _ = together(folder / "two", run)
    single = folder / "one"
    single.mkdir()
    os.waitpid(fork(run, single), 0)
    one = torch.load(single / "rank0.pth")
    two = [torch.load(folder / "two" / f"rank{rank}.pth") for rank in range(2)]
    # The gradient of a scale is a sum that cancels: where next to nothing is left of it, its rounding is that of the
    # summands. So an error counts relative to a tenth of what such gradients typically are, at least.
    largest = {name: g.abs().max().item() for name, g in one["gradients"].items()}
    learned = [name for name in largest if "_quantizer." in name or ".quantizer." in name]
    floor = 0.1 * statistics.median(largest[name] for name in learned if largest[name])
    return {
        "statuses": statuses,
        "names": list(one["gradients"]),
        "gradient_error": max(
            (g - r["gradients"][name]).abs().max().item() / max(largest[name], floor if name in learned else 1e-7)
            for r in two
            for name, g in one["gradients"].items()
        ),
        "zero_gradients": [name for name, g in one["gradients"].items() if not g.any()],
        "scales": all(torch.equal(s, r["scales"][name]) for r in two for name, s in one["scales"].items()),
        "normalizers": [r["normalizer"] for r in (one, *two)],
    }


def main(folder):
    torch.set_num_threads(1)
    report = {run.__name__: compare(folder / run.__name__, run) for run in (gradients, whole_gradients)}
    statuses, _ = together(folder / "aligning", aligning)
    ranks = [torch.load(folder / "aligning" / f"rank{rank}.pth") for rank in range(2)]
    moved = [key for key in ranks[0]["own"] if not torch.equal(ranks[0]["own"][key], ranks[1]["own"][key])]
    report["aligning"] = {
        "statuses": statuses,
        "moved": moved,
        "agree": all(torch.equal(ranks[0]["average"][key], ranks[1]["average"][key]) for key in ranks[0]["average"]),
        "error": max(
            ((ranks[0]["own"][key] + ranks[1]["own"][key]) / 2 - ranks[0]["average"][key]).abs().max().item()
            for key in moved
        ),
    }

    statuses, seconds = together(folder / "failing", failing_calibration)
    texts = [(folder / "failing" / f"rank{rank}.txt").read_text() for rank in range(2)]
    report["calibration"] = {"statuses": statuses, "texts": texts, "seconds": seconds}

    entry = write_dataset(folder / "data", "tiny_processes", num_images=5)
    # One size, because processes pad only their own images; small steps, because nothing normalizes.
    same = ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.CROP.ENABLED", "False", "SOLVER.BASE_LR", "1e-5")
    # In float, because a quantizer makes a step of the last bit's difference; every box counts for the AP.
    same += ("MODEL.QUANT.ENABLED", "False", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    cfg = {
        name: train_cfg(entry, folder / name, *TINY, *FROZEN, *same, max_iter=6)
        for name in ("alone", "elastic", "stopped", "new")
    }

    os.waitpid(fork(lambda: write(folder / "alone" / "rank0.pth", train(cfg["alone"]))), 0)
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, start_method="fork", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", monitor_interval=0.1, run_id="aqdet",
    )  # fmt: skip
    elastic_launch(launch, elastic_worker)(cfg["elastic"])
    start, parameters = torch.load(folder / "elastic" / "rank0.pth")
    other = torch.load(folder / "elastic" / "rank1.pth")[1]
    alone = torch.load(folder / "alone" / "rank0.pth")[1]
    report["elastic"] = {
        "start": start,
        "ranks_agree": all(torch.equal(p, other[name]) for name, p in parameters.items()),
        "error": max(((p - alone[name]).abs().max() / p.abs().max()).item() for name, p in parameters.items()),
        "detections": [detections(folder / name / "inference") for name in ("elastic", "alone")],
    }
    together(folder / "group", lambda _: stopping(cfg["stopped"]))
    report["stopped"] = [json.loads((folder / "stopped" / f"rank{rank}.txt").read_text()) for rank in range(2)]

    batch = ("SOLVER.IMS_PER_BATCH", "8")  # four in each process, as alone
    learned = train_cfg(entry, folder / "learned", *scales_overrides("SGD", 2, 64), *batch, max_iter=50)
    statuses, _ = together(folder / "learning", lambda _: learning(learned))
    texts = [(folder / "learned" / f"rank{rank}.txt").read_text() for rank in range(2)]
    report["learned"] = {"statuses": statuses, "moves": [json.loads(text) for text in texts]}

    together(folder / "disks", resuming)
    report["resumed"] = [json.loads((folder / "disks" / f"rank{rank}.txt").read_text()) for rank in range(2)]
    together(folder / "again", lambda _: starting(cfg["stopped" if comm.get_rank() else "new"]))
    report["started"] = [(folder / name / "start.txt").read_text() for name in ("new", "stopped")]
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
