"""The integer program in torch: a trained detector evaluated in the arithmetic that ships, before it is exported.

A fake-quantized detector computes with float32 what ships as integers. Where a value lies next to a rounding tie, the
two may end at neighbouring codes, and every later layer carries that on: they are like two draws of the same rounding
noise. Executed here, on any device that torch has, the detector has the codes and predictions of what ships to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList
from numpy.typing import NDArray
from torch import Tensor, nn

from .extract import extract
from .program import IMAGE, Add, Conv, DepthToSpace, Grid, MaxPool, Operation, PadImage, Program, Requantize, inputs_of
from .proof import bound_accumulator
from .reference import conv_multiplier

_EXACT_IN_FLOAT32 = 2**24


class ProgramNetwork(nn.Module):
    """Executes a program in torch.

    Codes are float32 tensors of whole numbers. A convolution's sums are exact in float32 where no partial sum can pass
    24 bits, and else in float64.

    Args:
        program: The program.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        grids = program.grids()
        for index, operation in enumerate(program.operations):
            if isinstance(operation, Conv):
                source = grids[operation.input]
                exact = bound_accumulator(operation, source).by_codes < _EXACT_IN_FLOAT32
                dtype = torch.float32 if exact else torch.float64
                self._constant(f"weight_{index}", operation.integer_weight, dtype)
                self._constant(f"bias_{index}", operation.bias, dtype)
                self._constant(f"multiplier_{index}", conv_multiplier(operation, source.scale), torch.float32)
        self._readers = {name: int(name in program.pyramid) for name in grids}
        for operation in program.operations:
            for name in inputs_of(operation):
                self._readers[name] += 1

    def _constant(self, name: str, value: NDArray[Any], dtype: torch.dtype) -> None:
        tensor = torch.from_numpy(np.ascontiguousarray(value)).to(dtype)
        self.register_buffer(name, tensor if tensor.dim() > 1 else tensor.view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> list[list[Tensor]]:
        """Maps uint8 images ``(N, 3, H, W)`` to the head's predictions: for each kind, float32 a level."""
        values = self.values(image)
        by_level = [[values[name] for name in output.names] for output in self.program.outputs]
        return [list(kind) for kind in zip(*by_level, strict=True)]

    @torch.no_grad()
    def values(self, image: Tensor) -> dict[str, Tensor]:
        """Returns the predictions, and the codes of the pyramid where these are outputs, by name.

        Args:
            image: uint8 images ``(N, 3, H, W)`` or, for regions, their codes as they are stored.
        """
        values = {IMAGE: image.to(torch.float32) - self.program.image.zero_point}
        grids = self.program.grids()
        left = dict(self._readers)
        for index, operation in enumerate(self.program.operations):
            names = inputs_of(operation)
            values[operation.output] = self._execute(index, operation, [values[name] for name in names], grids)
            for name in names:
                left[name] -= 1
                if not left[name]:
                    del values[name]
        return values

    def _execute(self, index: int, operation: Operation, inputs: list[Tensor], grids: Mapping[str, Grid]) -> Tensor:
        """See :func:`aqdet.export.reference.execute`."""
        x = inputs[0]
        if isinstance(operation, PadImage):
            return pad_channels(x, (*operation.amount[1:] * 2, *operation.amount[:1] * 2), operation.values)
        if isinstance(operation, Conv):
            weight, bias, multiplier = (getattr(self, f"{name}_{index}") for name in ("weight", "bias", "multiplier"))
            sums = F.conv2d(
                x.to(weight.dtype),
                weight,
                None,
                operation.stride,
                operation.padding,
                operation.dilation,
                operation.groups,
            )
            real = (sums + bias).to(torch.float32) * multiplier
            return real if operation.grid is None else _onto(real, operation.grid)
        if isinstance(operation, Requantize):
            scales = (np.float32(grids[operation.input].scale), np.float32(operation.grid.scale))
            source, target = (x.new_tensor(float(scale)) for scale in scales)
            return _onto(x * source / target, operation.grid)
        if isinstance(operation, Add):
            total = sum(v.to(torch.int32) * m for v, m in zip(inputs, operation.multipliers, strict=True))
            rounded = (torch.as_tensor(total) + (1 << (operation.shift - 1))) >> operation.shift
            return rounded.clamp(operation.grid.quant_min, operation.grid.quant_max).to(x.dtype)
        if isinstance(operation, MaxPool):
            return F.max_pool2d(x, operation.kernel, operation.stride, operation.padding)
        if isinstance(operation, DepthToSpace):
            return F.pixel_shuffle(x, operation.block)
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def _onto(real: Tensor, grid: Grid) -> Tensor:
    return real.round().clamp(grid.quant_min, grid.quant_max)


def pad_channels(x: Tensor, amounts: tuple[int, ...], values: tuple[int, ...]) -> Tensor:
    """Pads ``(N, C, H, W)`` as ``F.pad`` does, each channel with a value of its own."""
    channels = zip(x.split(1, 1), values, strict=True)
    return torch.cat([F.pad(channel, amounts, value=value) for channel, value in channels], 1)


def make_batch(
    batched_inputs: Sequence[Mapping[str, Any]], program: Program, device: torch.device
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Returns images as a program reads them, ``(N, 3, H, W)`` float32, and their sizes without padding."""
    pad = next(operation for operation in program.operations if isinstance(operation, PadImage))
    images = [entry["image"].to(device, torch.float32) for entry in batched_inputs]
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    step = program.size_divisibility
    height, width = (-(-max(edges) // step) * step for edges in zip(*sizes, strict=True))
    padded = [
        pad_channels(image[None], (0, width - w, 0, height - h), pad.values)
        for image, (h, w) in zip(images, sizes, strict=True)
    ]
    return torch.cat(padded), sizes


class AsShipped(nn.Module):
    """A trained detector with its usual inputs and outputs in evaluation, computed in the arithmetic that ships.

    Args:
        model: see :func:`~aqdet.export.extract.extract`; its preprocessing and decoding, Detectron2's, stay.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.network = ProgramNetwork(extract(model)).to(model.device)
        # Not as a submodule: its weights are not of use here, and it stays as it is.
        self.__dict__["model"] = model

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See :meth:`aqdet.modeling.meta_arch.dense.LowPrecisionDense.forward`, in evaluation."""
        model: Any = self.__dict__["model"]
        batch, sizes = make_batch(batched_inputs, self.network.program, model.device)
        predictions = self.network(batch)
        listed = ImageList(batch, sizes)
        results = model.forward_inference(listed, predictions[0], predictions)
        found = []
        for result, entry, size in zip(results, batched_inputs, sizes, strict=True):
            height, width = entry.get("height", size[0]), entry.get("width", size[1])
            found.append({"instances": detector_postprocess(result, height, width)})
        return found
