"""Trainings in processes that are killed, as a program: ``python kill_runs.py FOLDER KILLS SEED``.

Importing takes longer than training here, so this process imports everything and each training is a fork of it.
It never trains itself, because torch's backward does not survive a fork. Prints a JSON report as its last line.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny_data import NARROW, train_cfg, write_dataset

from aqdet.engine import Trainer
from aqdet.engine.hooks.metrics import TIMINGS

ITERATIONS = 10
TINY = (
    *NARROW,
    *"MODEL.QUANT.ENABLED True MODEL.AUX.ENABLED True MODEL.FPN.RELU True SOLVER.CHECKPOINT_PERIOD 2".split(),
    *"TEST.EVAL_PERIOD 4 INPUT.MIN_SIZE_TRAIN (48,64) INPUT.CROP.ENABLED True".split(),
)


class Beat(HookBase):
    """Tells the parent process of each iteration."""

    def __init__(self, pipe):
        self._pipe = pipe

    def before_step(self):
        os.write(self._pipe, b".")


def start(cfg):
    """Starts or continues a training in a process of its own; its id, and a pipe with a byte an iteration."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    status = 1
    try:
        os.setsid()  # so that a signal can go to it and its workers together, as Ctrl-C does
        os.close(reader)
        setup_logger(cfg.OUTPUT_DIR)
        setup_logger(cfg.OUTPUT_DIR, name="aqdet")
        seed_all_rng(cfg.SEED)
        trainer = Trainer(cfg)
        trainer.register_hooks([Beat(writer)])
        for hook in trainer._hooks:
            if isinstance(hook, PeriodicWriter):
                hook._period = 3
        trainer.resume_or_load(resume=True)
        trainer.train()
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(child, reader):
    """Waits for a training; seconds from its first iteration to its second."""
    beats = []
    while os.read(reader, 1):
        beats.append(time.monotonic())
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0, "a training failed"
    return beats


def kill_somewhere(cfg, rng, seconds):
    """Kills a training at a random moment; False if it ended before."""
    child, reader = start(cfg)
    beats = rng.randint(0, 5)
    if all(os.read(reader, 1) for _ in range(beats)):
        time.sleep(rng.uniform(0, seconds if beats else 6 * seconds))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(ProcessLookupError):  # a worker killed with it may not have got as far as to watch it
        os.killpg(child, signal.SIGKILL)
    os.close(reader)
    return os.WIFSIGNALED(status)


def interrupt(cfg, signum):
    """Signals a training, workers and all, in its second iteration; its exit status."""
    child, reader = start(cfg)
    assert os.read(reader, 1) and os.read(reader, 1)
    os.killpg(child, signum)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reader)
    return status


def result(output):
    """What a run ends with: tensors of the last checkpoint, lines of metrics.json, AP."""
    checkpoint = torch.load(output / "model_final.pth", weights_only=True)
    momenta = checkpoint["trainer"]["_trainer"]["optimizer"]["state"]
    tensors = [*checkpoint["model"].values()]
    tensors += [value for state in momenta.values() for value in state.values() if isinstance(value, torch.Tensor)]
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    lines = [json.dumps({key: value for key, value in line.items() if key not in TIMINGS}) for line in lines]
    return tensors, lines, (output / "inference" / "metrics.json").read_text()


def main(folder, kills, seed):
    torch.set_num_threads(1)
    entry = write_dataset(folder / "data", "tiny_killed", num_images=5)
    rng = random.Random(seed)

    def cfg_of(name, workers):
        extra = ("DATALOADER.NUM_WORKERS", str(workers))
        return train_cfg(entry, folder / name, *TINY, *extra, max_iter=ITERATIONS)

    beats = finish(*start(cfg_of("reference", 0)))
    seconds = (beats[-1] - beats[0]) / (len(beats) - 1)
    expected = result(folder / "reference")

    def report(name, **more):
        finish(*start(cfg_of(name, 0)))
        tensors, lines, ap = result(folder / name)
        return {
            "weights": all(torch.equal(a, b) for a, b in zip(tensors, expected[0], strict=True)),
            "metrics": lines == expected[1] and ap == expected[2],
            "numbered": sorted(path.name for path in (folder / name).glob("model_0*.pth")),
            "aside": [path.name for path in (folder / name).glob("*.part")],
            **more,
        }

    runs = []
    while sum(run["kills"] for run in runs) < kills:
        name, workers, done = f"run{len(runs)}", 2 * (len(runs) % 2), 0
        while done < (kills + 1) // 2 and kill_somewhere(cfg_of(name, workers), rng, seconds):
            done += 1
        runs.append(report(name, kills=done, workers=workers))
    interrupted = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        status = interrupt(cfg_of(signum.name, 2), signum)
        last = (folder / signum.name / "last_checkpoint").read_text()
        interrupted.append(report(signum.name, status=status, last=last))
    print(json.dumps({"lines": expected[1], "runs": runs, "interrupted": interrupted}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
