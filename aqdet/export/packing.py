"""The integer program in one safetensors file: low-bit weights packed, everything else that it consists of.

Weights take 2, 4 or 8 bits a code (the next of these that holds them), several a byte, lowest bits first, in the
order of the flattened ``(O, C / groups, kH, kW)`` tensor. The operations are JSON in the file's metadata.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .program import Add, Conv, Grid, MaxPool, Operation, Output, PadImage, Program, Requantize, Upsample

FORMAT, VERSION = "aqdet-program", 1
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (PadImage, Conv, Requantize, Add, MaxPool, Upsample)}
_PAIRS = ("amount", "values", "mean", "inputs", "multipliers", "stride", "padding", "dilation")


def storage_bits(num_bits: int) -> int:
    """Bits that a code takes in the file: 2, 4 or 8."""
    return next(width for width in (2, 4, 8) if width >= num_bits)


def pack(codes: NDArray[np.integer], num_bits: int) -> NDArray[np.uint8]:
    """Packs unsigned codes below ``2**num_bits``, any shape, into bytes.

    Example: 4-bit codes ``[1, 2, 15]`` are the bytes ``[0x21, 0x0f]``.
    """
    width = storage_bits(num_bits)
    per_byte = 8 // width
    flat = codes.astype(np.uint8).reshape(-1)
    rows = np.pad(flat, (0, -flat.size % per_byte)).reshape(-1, per_byte)
    return (rows << (np.arange(per_byte, dtype=np.uint8) * width)).sum(1).astype(np.uint8)


def unpack(packed: NDArray[np.uint8], num_bits: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The inverse of :func:`pack`."""
    width = storage_bits(num_bits)
    shifts = np.arange(8 // width, dtype=np.uint8) * width
    flat = (packed.reshape(-1, 1) >> shifts) & (2**width - 1)
    return flat.reshape(-1)[: int(np.prod(shape))].reshape(shape).astype(np.uint8)


def _grid_of_codes(weight: NDArray[np.int16], num_bits: int) -> tuple[int, int]:
    """Smallest code and step: -8 and 1 for 4 bits; -15 and 2 where the codes are odd, as DoReFa's are."""
    if int(np.abs(weight.astype(np.int32)).max(initial=0)) > 2 ** (num_bits - 1):
        return -(2**num_bits - 1), 2
    return -(2 ** (num_bits - 1)), 1


def save_program(program: Program, path: str | os.PathLike[str]) -> None:
    """Writes a program."""
    tensors: dict[str, NDArray[Any]] = {}
    operations = []
    for operation in program.operations:
        if not isinstance(operation, Conv):
            entry = dataclasses.asdict(operation)
        else:
            fields = [field.name for field in dataclasses.fields(operation)]
            kept = {name: getattr(operation, name) for name in fields}
            smallest, step = _grid_of_codes(operation.weight, operation.weight_bits)
            codes = (operation.weight.astype(np.int32) - smallest) // step
            tensors[f"{operation.path}.weight"] = pack(codes, operation.weight_bits)
            tensors[f"{operation.output}.factor"] = (operation.sign * operation.multiple).astype(np.int8)
            tensors[f"{operation.output}.scale"] = kept.pop("scale")
            tensors[f"{operation.output}.bias"] = kept.pop("bias")
            for name in ("weight", "sign", "multiple"):
                kept.pop(name)
            shape = list(operation.weight.shape)
            grid = None if operation.grid is None else dataclasses.asdict(operation.grid)
            entry = {**kept, "grid": grid, "shape": shape, "smallest": smallest, "step": step}
        operations.append({"kind": type(operation).__name__, **entry})
    content = {
        "image": dataclasses.asdict(program.image),
        "operations": operations,
        "outputs": [dataclasses.asdict(output) for output in program.outputs],
        "size_divisibility": program.size_divisibility,
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "program": json.dumps(content, separators=(",", ":"))}
    save_file(tensors, os.fspath(path), metadata)


def load_program(path: str | os.PathLike[str]) -> Program:
    """Reads what :func:`save_program` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one line, if it is damaged or no such file.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            raise ValueError(f"its format is not {FORMAT} version {VERSION}")
        content = json.loads(metadata["program"])
        operations = tuple(_operation(dict(entry), tensors) for entry in content["operations"])
        outputs = tuple(Output(**output) for output in content["outputs"])
        return Program(Grid(**content["image"]), operations, outputs, int(content["size_divisibility"]))
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a packed detector of aqdet, or damaged: {' '.join(str(error).split())}"
        ) from error


def _operation(entry: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Operation:
    kind = _KINDS[entry.pop("kind")]
    for name in _PAIRS:
        if name in entry and isinstance(entry[name], list):
            entry[name] = tuple(entry[name])
    if entry.get("grid") is not None:
        entry["grid"] = Grid(**entry["grid"])
    if kind is Conv:
        shape, smallest, step = tuple(entry.pop("shape")), entry.pop("smallest"), entry.pop("step")
        codes = unpack(tensors[f"{entry['path']}.weight"], entry["weight_bits"], shape)
        factor = tensors[f"{entry['output']}.factor"]
        entry["weight"] = (codes.astype(np.int32) * step + smallest).astype(np.int16)
        entry["sign"] = np.sign(factor).astype(np.int8)
        entry["multiple"] = np.maximum(np.abs(factor.astype(np.int16)), 1)
        entry["scale"] = tensors[f"{entry['output']}.scale"]
        entry["bias"] = tensors[f"{entry['output']}.bias"]
    return kind(**entry)
