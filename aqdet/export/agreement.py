"""Layer by layer comparison of the codes of the trained model, the integer reference and ONNX Runtime.

Each execution is compared with the reference twice:

- *local*: the reference runs each operation on the codes that the execution itself had there. A difference is then
  caused by this operation;
- *whole*: both run from the image. A code that differs early changes later ones.

ONNX Runtime with its optimizations, as it ships, must have the reference's codes and predictions to the bit; no
difference is allowed. An execution in float32, such as ONNX Runtime's without optimizations, may differ where the value
before rounding lies within float32's error of a tie. The trained model may also differ within half a unit of a
convolution's sum, since it does not round biases to int32, and within the change that the scales of sums got. A copy of
it with the constants that ship (:func:`~aqdet.export.rounded.with_rounded_constants`) shows the differences without
these two causes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..layers import QuantAdd, QuantConv2d, QuantConvTranspose2d, QuantLinear, StreamQuantizer
from ..modeling import QuantGeneralizedRCNN
from ..modeling.blocks import QuantStem
from ..quantization import Quantizer
from .onnx_graph import build_onnx
from .program import (
    IMAGE,
    Add,
    Conv,
    DepthToSpace,
    Grid,
    Operation,
    PadImage,
    Program,
    Requantize,
    inputs_of,
    largest_code,
)
from .reference import accumulate, conv_unit, execute, run, space_to_depth
from .rounded import with_rounded_constants
from .sums import largest_move
from .tensorrt_graph import build_tensorrt

TRAINED, ROUNDED, PLAIN, OPTIMIZED, TENSORRT = EXECUTIONS = (
    "trained",
    "trained, constants rounded",
    "ONNX Runtime, plain",
    "ONNX Runtime, optimized",
    "TensorRT's graph in ONNX Runtime, plain",
)
EXACT = (OPTIMIZED,)
Values = dict[str, NDArray[Any]]
_FLOAT32_SLACK = 2.0**-21


@dataclasses.dataclass(frozen=True)
class Difference:
    """The comparison of one value of one execution with the reference.

    Attributes:
        value: The name of the value.
        execution: One of :data:`EXECUTIONS`.
        is_prediction: Whether the value is a float32 output, which has no codes and is not counted.
        count: The number of codes.
        local, whole: How many codes differ, see the module.
        largest: The largest local difference in codes; for a prediction, in its own units.
        unexplained: The number of local differences that are not allowed, see the module.
    """

    value: str
    execution: str
    is_prediction: bool
    count: int
    local: int
    whole: int
    largest: float
    unexplained: int


def compare(
    model: nn.Module,
    program: Program,
    images: Sequence[NDArray[np.uint8]],
    progress: Callable[[str], object] = lambda _: None,
    *,
    tensorrt: bool = False,
) -> list[Difference]:
    """Runs every execution on some images and compares it with the reference.

    Args:
        model: The detector that ``program`` was extracted from.
        program: The integer program.
        images: Images ``(3, H, W)``, whose sides are multiples of ``program.size_divisibility``.
        progress: A function that is called with a line of text from time to time.
        tensorrt: Whether to run TensorRT's graph, too, see :mod:`~aqdet.export.tensorrt_graph`.

    Returns:
        A difference for each value that an execution computes, summed over the images, in the order of the program.
    """
    sessions = {
        PLAIN: runtime_session(build_onnx(program, extra_outputs=True), optimize=False),
        OPTIMIZED: runtime_session(build_onnx(program, extra_outputs=True), optimize=True),
    }
    if tensorrt:
        sessions[TENSORRT] = runtime_session(build_tensorrt(program, extra_outputs=True), optimize=False)
    rounded = with_rounded_constants(model)
    found: dict[tuple[str, str], Difference] = {}
    for number, image in enumerate(images, 1):
        batch = np.ascontiguousarray(image)[None]
        progress(f"agreement on image {number} of {len(images)}: integer reference")
        reference: Values = run(program, batch)
        progress(f"agreement on image {number} of {len(images)}: trained model, ONNX Runtime")
        executions = {
            TRAINED: trained_values(model, program, batch),
            ROUNDED: trained_values(rounded, program, batch),
        }
        for name, session in sessions.items():
            executions[name] = runtime_values(session, program, batch)
        for name, values in executions.items():
            for difference in _differences(program, values, reference, name):
                key = (difference.value, name)
                found[key] = _summed(found[key], difference) if key in found else difference
    order = {operation.output: index for index, operation in enumerate(program.operations)}
    return sorted(found.values(), key=lambda difference: order[difference.value])


def _summed(a: Difference, b: Difference) -> Difference:
    return Difference(
        a.value,
        a.execution,
        a.is_prediction,
        a.count + b.count,
        a.local + b.local,
        a.whole + b.whole,
        max(a.largest, b.largest),
        a.unexplained + b.unexplained,
    )


def _differences(program: Program, values: Values, reference: Values, execution: str) -> Iterator[Difference]:
    grids = program.grids()
    filled: Values = {IMAGE: reference[IMAGE], **values}
    for operation in program.operations:
        inputs = [filled[name].astype(np.int64) for name in inputs_of(operation)]
        expected: NDArray[Any] = execute(operation, inputs, grids)
        own = filled.setdefault(operation.output, expected)
        if own.shape != expected.shape:  # a fully connected layer's values, as a convolution has them
            own = filled[operation.output] = own.reshape(expected.shape)
        if operation.output not in values:
            continue
        whole = reference[operation.output]
        if own.dtype == np.float32:
            largest = float(np.abs(own - expected).max(initial=0))
            unexplained = int((own != expected).sum()) if execution in EXACT else 0
            yield Difference(operation.output, execution, True, own.size, 0, 0, largest, unexplained)
            continue
        wrong = own != expected
        largest = float(np.abs(own.astype(np.int64) - expected).max(initial=0))
        unexplained = 0
        if wrong.any():
            unexplained = _unexplained(program, operation, inputs, own, expected, grids, execution)
        yield Difference(
            operation.output,
            execution,
            False,
            own.size,
            int(wrong.sum()),
            int((own != whole).sum()),
            largest,
            unexplained,
        )


def _unexplained(
    program: Program,
    operation: Operation,
    inputs: list[NDArray[np.int64]],
    own: NDArray[Any],
    expected: NDArray[Any],
    grids: Mapping[str, Grid],
    execution: str,
) -> int:
    """Returns the number of differing codes whose value before rounding is too far from the tie between them."""
    wrong = own != expected
    if execution in EXACT:
        return int(wrong.sum())
    exact, tolerance = _before_rounding(operation, inputs, grids)
    if isinstance(operation, Conv) and execution in (TRAINED, ROUNDED):
        assert operation.grid is not None
        unit = conv_unit(operation, grids[operation.input].scale) / operation.grid.scale
        slack = 0.5 * unit if execution == TRAINED else 0 * unit
        for source in program.operations:
            if isinstance(source, PadImage) and source.output == operation.input:
                rounded = np.abs(np.array(source.values) - np.array(source.mean)).reshape(1, -1, 1, 1)
                slack = slack + (np.abs(operation.integer_weight) * rounded).sum((1, 2, 3)) * unit
        tolerance = tolerance + slack.reshape(1, -1, 1, 1)
    if isinstance(operation, Add) and execution == TRAINED:
        tolerance = tolerance + largest_move(operation, grids)
    tie = (own.astype(np.float64) + expected) / 2
    close = (np.abs(own.astype(np.int64) - expected) == 1) & (np.abs(exact - tie) <= tolerance)
    return int((wrong & ~close).sum())


def _before_rounding(
    operation: Operation, inputs: list[NDArray[np.int64]], grids: Mapping[str, Grid]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the real number, in output codes, that is rounded to a code, and float32's error in computing it."""
    if isinstance(operation, Conv):
        assert operation.grid is not None
        source = grids[operation.input]
        unit = (conv_unit(operation, source.scale).astype(np.float64) / operation.grid.scale).reshape(1, -1, 1, 1)
        total = np.abs(operation.integer_weight).sum((1, 2, 3)).reshape(1, -1, 1, 1)
        reach = (total * largest_code(source) + np.abs(operation.bias.astype(np.int64)).reshape(1, -1, 1, 1)) * unit
        return accumulate(operation, inputs[0]) * unit, reach * _FLOAT32_SLACK
    assert isinstance(operation, Requantize | Add), operation
    if isinstance(operation, Add):
        ratios = [multiplier / 2**operation.shift for multiplier in operation.multipliers]
    else:
        ratios = [grids[operation.input].scale / operation.grid.scale]
    terms = [value * ratio for value, ratio in zip(inputs, ratios, strict=True)]
    return np.sum(terms, 0), (np.sum(np.abs(terms), 0) + 1) * _FLOAT32_SLACK


# --- the trained model ---


def trained_values(model: Any, program: Program, image: NDArray[np.uint8]) -> Values:
    """Returns the codes of the fake-quantized model's values, and its predictions as they are."""
    recorded: dict[str, list[NDArray[np.int16]]] = {}
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _recording(model, recorded):
            predictions = _predictions(model, program, torch.from_numpy(image).to(model.device).float())
    finally:
        model.train(training)
    values: Values = {}
    for name, calls in recorded.items():
        if len(calls) == 1:
            values[name] = calls[0]
        else:
            for output, codes in zip(program.outputs, calls, strict=True):
                values[f"{name}@{output.level}"] = codes
    for output, *of_level in zip(program.outputs, *predictions, strict=True):
        for name, prediction in zip(output.names, of_level, strict=True):
            values[name] = prediction.cpu().numpy()
    for operation in program.operations:
        if isinstance(operation, DepthToSpace) and operation.output in values:
            values[operation.input] = space_to_depth(values[operation.output], operation.block)
    return values


def _predictions(model: Any, program: Program, x: Tensor) -> Sequence[Sequence[Tensor]]:
    """Returns the predictions of the modules that a program stands for, by kind and level.

    Args:
        model: the detector. program: of it, or of one of its heads for regions.
        x: pixels; of a head for regions, codes as they are stored.
    """
    if not isinstance(model, QuantGeneralizedRCNN):
        features = model.backbone((x - model.pixel_mean) / model.pixel_std)
        return model.head([features[name] for name in model.head_in_features])
    if program.pyramid:
        features = model.backbone((x - model.pixel_mean) / model.pixel_std)
        rpn = model.proposal_generator
        return rpn.rpn_head([features[name] for name in rpn.in_features])
    regions = (x - program.image.zero_point) * program.image.scale
    heads = model.roi_heads
    if program.outputs[0].deltas:
        return [[prediction] for prediction in heads.box_predictor(heads.box_head(regions))]
    return [[heads.mask_head.layers(regions)]]


@contextlib.contextmanager
def _recording(model: nn.Module, recorded: dict[str, list[NDArray[np.int16]]]) -> Iterator[None]:
    """Records the codes at every call of every activation quantizer, under the names of the program."""
    handles = []

    def note(name: str, quantizer: Quantizer | None, x: Tensor) -> None:
        if quantizer is not None:
            integers = quantizer.to_integer(x)
            codes = (integers.codes - integers.zero_point).cpu().numpy().astype(np.int16)
            recorded.setdefault(name, []).append(codes)

    for name, module in model.named_modules():
        if name.startswith("auxiliary."):
            continue
        if isinstance(module, QuantConv2d | QuantConvTranspose2d | QuantLinear):
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, inputs, name=name: note(f"{name}.input_quantizer", m.input_quantizer, inputs[0])
                )
            )
        elif isinstance(module, QuantAdd):

            def note_operands(m: Any, inputs: Any, name: str = name) -> None:
                note(f"{name}.x_quantizer", m.x_quantizer, inputs[0])
                note(f"{name}.y_quantizer", m.y_quantizer, inputs[1])

            handles.append(module.register_forward_pre_hook(note_operands))
        elif isinstance(module, QuantStem):
            # The stem's stream is quantized after the pooling; the output before it has a name of its own.
            stream = module.output_stream
            handles.append(
                module.conv1.register_forward_hook(
                    lambda _, __, output, name=name, stream=stream: note(
                        f"{name}.conv1.output", stream.quantizer, output
                    )
                )
            )
        elif isinstance(module, StreamQuantizer):
            handles.append(
                module.register_forward_hook(
                    lambda m, _, output, name=name: note(f"{name}.quantizer", m.quantizer, output)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- ONNX Runtime ---


def runtime_session(model: Any, *, optimize: bool, optimized_path: str | None = None) -> onnxruntime.InferenceSession:
    """Creates a session on one thread of the CPU.

    Args:
        model: An ``onnx.ModelProto``.
        optimize: Whether to use all of ONNX Runtime's optimizations, or none.
        optimized_path: The file to write the graph to that is really executed.
    """
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # Writing the optimized graph warns that it is for this machine.
    options.log_severity_level = 3
    if optimized_path is not None:
        options.optimized_model_filepath = optimized_path
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def runtime_values(session: onnxruntime.InferenceSession, program: Program, image: NDArray[np.uint8]) -> Values:
    """Returns codes and predictions of a session whose graph has ``extra_outputs``."""
    grids = program.grids()
    names = [output.name for output in session.get_outputs()]
    values = dict(zip(names, session.run(names, {IMAGE: image}), strict=True))
    for name, value in values.items():
        if value.dtype != np.float32:
            stored_zero = grids[name].zero_point if value.dtype == np.uint8 else 0
            values[name] = value.astype(np.int16) - stored_zero
    return values
