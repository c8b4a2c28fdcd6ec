#!/usr/bin/env python
"""Trains or evaluates a detector, with Detectron2's command line.

``torchrun --nproc_per_node N tools/train_net.py ...`` trains in N processes, on GPUs or on CPUs; with
``--max-restarts`` it starts failed ones again, which go on from the last checkpoint. SIGTERM and Ctrl-C save and
print the command that continues. Exit status: 2 for wrong input, 3 for a loss that is not finite, 128 + n for
signal n.
"""

import argparse
import os
import sys

import aqdet  # noqa: F401  (before Detectron2, whose import it keeps quiet)

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from aqdet.config import load_config
from aqdet.data import check_datasets, check_num_classes, register_declared
from aqdet.engine import Interrupted, NonFiniteLoss, Trainer, build_checkpointer, check_config, fit_to_machine
from aqdet.engine.launch import continuing_command, is_restart, join_process_group, launch, make_deterministic
from aqdet.evaluation import check_coco_eval

USER_ERROR = 2
NON_FINITE = 3


def setup(args: argparse.Namespace) -> CfgNode:
    """Reads the config, registers its datasets, and checks both against each other."""
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    check_coco_eval(cfg.TEST.COCO_EVAL)
    fit_to_machine(cfg)
    join_process_group(cfg.MODEL.DEVICE)
    register_declared(cfg, train=not args.eval_only)
    check_num_classes(cfg, train=not args.eval_only)
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} cannot be made: {error.strerror}") from error
    cfg.freeze()
    default_setup(cfg, args)
    make_deterministic(cfg)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="aqdet")
    check_datasets(cfg, train=not args.eval_only)
    return cfg


def main(args: argparse.Namespace) -> None:
    """One process's part of the job."""
    try:
        cfg = setup(args)
        if args.exported:
            try:
                from aqdet.evaluation.exported import load_exported
            except ModuleNotFoundError as error:  # training does without ONNX Runtime
                raise ValueError(f"--exported needs {error.name}: pip install '.[export]'") from error
            Trainer.test(cfg, load_exported(cfg, args.exported))
            return
        if args.eval_only:
            model = Trainer.build_model(cfg)
            build_checkpointer(cfg, model).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
            Trainer.test(cfg, model)
            return
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume or is_restart())
        trainer.train()
    except Interrupted as stop:
        if comm.is_main_process():
            print(f"{stop}; continue with: {continuing_command()}", file=sys.stderr)
        raise
    except NonFiniteLoss as error:
        if comm.is_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(NON_FINITE)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("AQDET_DEBUG"):
            raise
        message = str(error)
        if message.startswith("Caught "):
            # A worker of the data loader sends its traceback, which ends in what happened.
            message = message.strip().splitlines()[-1]
        fail(f"{' '.join(message.split())} (AQDET_DEBUG=1 shows where)")


def fail(message: str) -> None:
    """Prints one line and ends the process."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's, and ``--exported``."""
    parser = default_argument_parser()
    parser.add_argument(
        "--exported",
        metavar="DIR",
        default="",
        help="with --eval-only: evaluate this exported detector, not MODEL.WEIGHTS",
    )
    return parser


def invoke_main() -> None:
    """Parses the command line and runs :func:`main` in one process or more."""
    args = argument_parser().parse_args()
    if args.exported and not args.eval_only:
        fail(f"--exported {args.exported} can only be evaluated: add --eval-only")
    try:
        launch(main, args)
    except ValueError as error:
        if os.environ.get("AQDET_DEBUG"):
            raise
        fail(str(error))
    except torch.multiprocessing.ProcessExitedException as error:
        # The process that failed has printed why.
        sys.exit(error.exit_code)


if __name__ == "__main__":
    invoke_main()
