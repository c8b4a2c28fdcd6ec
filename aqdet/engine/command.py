"""The training or evaluation that a command line asks for, in one process or more.

The exit status is 2 for wrong input or a file that cannot be written, 3 for a loss that is not finite, and 128 + n for
signal n.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import NoReturn

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint import CLASSES_KEY, build_checkpointer
from ..config import load_config
from ..config_files import find_config_file
from ..data import check_datasets, check_num_classes, register_declared
from ..data.class_names import check_class_order
from ..data.registry import DatasetCheck
from ..evaluation import check_coco_eval
from ..utils.console import SIGNALLED, signal_of
from .checked_trainer import NonFiniteLoss
from .config_check import check_config, fit_to_machine
from .hooks.interrupt import Interrupted
from .launch import (
    continuing_command,
    is_restart,
    join_process_group,
    launch,
    make_deterministic,
    rank_of_this_process,
)
from .output_folder import check_output_dir, evaluation_noted
from .run_log import RunLog
from .trainer import Trainer

USER_ERROR = 2
NON_FINITE = 3


def setup(args: argparse.Namespace) -> tuple[CfgNode, DatasetCheck]:
    """Reads the config, registers its datasets, and checks both against each other; writes nothing in ``OUTPUT_DIR``.

    Returns:
        The config, and the check of its datasets.
    """
    train = not args.eval_only
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    check_coco_eval(cfg.TEST.COCO_EVAL)
    setup_logger(distributed_rank=rank_of_this_process(), name="aqdet")
    fit_to_machine(cfg)
    join_process_group(cfg.MODEL.DEVICE)
    check_output_dir(cfg.OUTPUT_DIR, train=train)
    register_declared(cfg, train=train)
    check_num_classes(cfg, train=train)
    cfg.freeze()
    nowhere = cfg.clone()
    nowhere.defrost()
    nowhere.OUTPUT_DIR = None  # Detectron2 would write its config and log there even if the run is refused later
    if args.config_file:
        args.config_file = find_config_file(args.config_file)  # Detectron2 logs the file, and knows no names of configs
    if cfg.MODEL.DEVICE == "cpu":
        logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_about_cuda)
    default_setup(nowhere, args)
    make_deterministic(cfg)
    logging.getLogger("aqdet.train_net").info("Running with full config:\n%s", cfg.dump())
    return cfg, check_datasets(cfg, train=train)


def _is_not_about_cuda(record: logging.LogRecord) -> bool:
    """Keeps back a warning of PyTorch that a CUDA toolkit is installed where there is no GPU.

    PyTorch warns while Detectron2 makes its table of the environment, and the table says whether a GPU is available.
    """
    return not str(record.msg).startswith("No CUDA runtime is found")


def train(cfg: CfgNode, args: argparse.Namespace, check: DatasetCheck, log: RunLog) -> None:
    """Runs a training. ``OUTPUT_DIR`` becomes this run's once all checks have passed."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume or is_restart())
    with trainer.started():
        log.write_to(cfg.OUTPUT_DIR)
        check.write(cfg.OUTPUT_DIR)
        trainer.train()


def evaluate(cfg: CfgNode, args: argparse.Namespace, check: DatasetCheck, log: RunLog) -> None:
    """Evaluates a checkpoint or an exported folder; writes into ``OUTPUT_DIR/inference`` alone."""
    if args.exported:
        try:
            from ..evaluation.exported import load_exported
        except ModuleNotFoundError as error:  # training does not need ONNX Runtime
            raise ValueError(f"--exported needs {error.name}: pip install '.[export]'") from error
        model, weights = load_exported(cfg, args.exported), args.exported
    else:
        model = Trainer.build_model(cfg)
        checkpointer = build_checkpointer(cfg, model)
        weights = (checkpointer.file_to_resume() if args.resume else "") or cfg.MODEL.WEIGHTS
        check_class_order(cfg, checkpointer.load(weights, checkpointables=[]).get(CLASSES_KEY), weights)
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    log.write_to(folder)
    check.write(folder)
    with evaluation_noted(cfg, weights=weights):
        Trainer.test(cfg, model)


def run(args: argparse.Namespace) -> None:
    """Calls :func:`main` in one process or more, and ends the process with an exit status if something fails.

    Args:
        args: The options of Detectron2's ``default_argument_parser``, and ``exported``, which is a folder or "".
    """
    try:
        launch(main, args)
    except ValueError as error:
        if os.environ.get("AQDET_DEBUG"):
            raise
        fail(str(error))
    except torch.multiprocessing.ProcessExitedException as error:
        # The process that failed has printed the reason.
        sys.exit(error.exit_code)


def main(args: argparse.Namespace) -> None:
    """Runs one process's part of the job."""
    try:
        with RunLog() as log:
            cfg, check = setup(args)
            (evaluate if args.eval_only else train)(cfg, args, check, log)
    except Interrupted as stop:
        if comm.is_main_process():
            way_on = f"; continue with: {continuing_command()}" if stop.can_resume else ""
            print(f"{stop}{way_on}", file=sys.stderr)
        raise
    except KeyboardInterrupt as interrupt:
        signum = signal_of(interrupt)
        if comm.is_main_process():
            print(f"stopped by {signum.name}", file=sys.stderr)
        sys.exit(SIGNALLED + signum)
    except NonFiniteLoss as error:
        if comm.is_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(NON_FINITE)
    except (ValueError, OSError) as error:
        if os.environ.get("AQDET_DEBUG"):
            raise
        message = str(error)
        if message.startswith("Caught "):
            # A worker of the data loader sends its traceback, whose last line is the error.
            message = message.strip().splitlines()[-1]
        fail(f"{' '.join(message.split())} (AQDET_DEBUG=1 shows where)")


def fail(message: str) -> NoReturn:
    """Prints one line and ends the process."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)
