#!/usr/bin/env python
"""Converts a torchvision ResNet-18/34/50 or RegNetX state dict to a checkpoint that a detector starts from."""

import argparse
import os
import sys

from aqdet.utils.arguments import file_to_read, file_to_write
from aqdet.utils.console import run_console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--depth", type=int, choices=(18, 34, 50), help="depth of a ResNet")
    which.add_argument("--regnetx", choices=("400MF", "800MF", "1.6GF", "3.2GF"), help="size of a RegNetX")
    parser.add_argument("--input", type=file_to_read, required=True, help="torchvision's .pth file")
    parser.add_argument("--output", type=file_to_write, required=True, help="checkpoint for MODEL.WEIGHTS")
    args = parser.parse_args()
    # Late, so that --help opens at once.
    from aqdet.checkpoint import load_weights_file, save_atomically
    from aqdet.checkpoint.torchvision import SCOPE, convert_torchvision_regnet, convert_torchvision_resnet

    name = f"RegNetX-{args.regnetx}" if args.regnetx else f"ResNet-{args.depth}"
    try:
        convert = convert_torchvision_regnet if args.regnetx else convert_torchvision_resnet
        model, left_out = convert(load_weights_file(args.input))
        shapes = {key: tuple(value.shape) for key, value in model.items()}
        expected = expected_shapes(args.depth, args.regnetx)
        wrong = sorted(key for key in {*shapes, *expected} if shapes.get(key) != expected.get(key))
        if wrong:
            raise ValueError(f"{args.input!r} is no {name}: {len(wrong)} keys differ, {', '.join(wrong[:6])}")
        os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
        save_atomically({"model": model, "aqdet": {"scope": [SCOPE]}}, args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(model)} keys converted, {len(left_out)} left out ({', '.join(left_out)}): {args.output}")


def expected_shapes(depth: int | None, regnetx: str | None) -> dict[str, tuple[int, ...]]:
    """Returns the keys and shapes of aqdet's backbone of that depth or size."""
    from detectron2.layers import ShapeSpec

    from aqdet.checkpoint.torchvision import SCOPE
    from aqdet.config import load_config
    from aqdet.modeling import build_quant_resnet_backbone

    overrides = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.OUT_FEATURES", "['res5']"]
    if regnetx:
        overrides += ["MODEL.RESNETS.REGNETX", regnetx]
    else:
        width = "64" if depth in (18, 34) else "256"
        overrides += ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.RES2_OUT_CHANNELS", width]
    backbone = build_quant_resnet_backbone(load_config("", overrides), ShapeSpec(channels=3))
    return {SCOPE + key: tuple(value.shape) for key, value in backbone.state_dict().items()}


if __name__ == "__main__":
    run_console(main)
