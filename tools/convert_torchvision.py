#!/usr/bin/env python
"""Converts a torchvision ResNet-18/34/50 state dict to a checkpoint that a detector starts from."""

import argparse
import os
import sys

from aqdet.utils.arguments import file_to_read, file_to_write
from aqdet.utils.console import run_console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, choices=(18, 34, 50), required=True)
    parser.add_argument("--input", type=file_to_read, required=True, help="torchvision's .pth file")
    parser.add_argument("--output", type=file_to_write, required=True, help="checkpoint for MODEL.WEIGHTS")
    args = parser.parse_args()
    # Late, so that --help opens at once.
    from aqdet.checkpoint import load_weights_file, save_atomically
    from aqdet.checkpoint.torchvision import SCOPE, convert_torchvision_resnet

    try:
        model, left_out = convert_torchvision_resnet(load_weights_file(args.input))
        expected = expected_keys(args.depth)
        wrong = sorted(set(model) ^ expected)
        if wrong:
            raise ValueError(
                f"{args.input!r} is no ResNet-{args.depth}: {len(wrong)} keys differ, {', '.join(wrong[:6])}"
            )
        os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
        save_atomically({"model": model, "aqdet": {"scope": [SCOPE]}}, args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(model)} keys converted, {len(left_out)} left out ({', '.join(left_out)}): {args.output}")


def expected_keys(depth: int) -> set[str]:
    """The keys of our backbone at that depth."""
    from detectron2.layers import ShapeSpec

    from aqdet.checkpoint.torchvision import SCOPE
    from aqdet.config import load_config
    from aqdet.modeling import build_quant_resnet_backbone

    overrides = [
        "MODEL.RESNETS.DEPTH",
        str(depth),
        "MODEL.RESNETS.NORM",
        "BN",
        "MODEL.BACKBONE.FREEZE_AT",
        "0",
    ]
    overrides += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64" if depth < 50 else "256"]
    overrides += ["MODEL.RESNETS.OUT_FEATURES", "['res5']"]
    backbone = build_quant_resnet_backbone(load_config("", overrides), ShapeSpec(channels=3))
    return {SCOPE + key for key in backbone.state_dict()}


if __name__ == "__main__":
    run_console(main)
