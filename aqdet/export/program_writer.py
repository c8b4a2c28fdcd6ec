"""The base of the forms of ONNX that a program is written in: nodes, constants, and an order of operations."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .. import __version__
from .program import Add, Conv, DepthToSpace, MaxPool, PadImage, Program, Requantize


class ProgramWriter(abc.ABC):
    """Writes a program node by node. A form of its own overrides the methods of the operations.

    Args:
        program: the program to write.

    Attributes:
        grids: the grids of the integer values, by name.
        nodes: the nodes written so far, in order.
        initializers: the constants, by name.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.grids = program, program.grids()
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._by_content: dict[bytes, str] = {}

    def write_operations(self) -> None:
        """Writes every operation of the program, in its order."""
        for operation in self.program.operations:
            if isinstance(operation, PadImage):
                self.pad_image(operation)
            elif isinstance(operation, Conv):
                if operation.grid is None:
                    self.predict(operation)
                else:
                    self.conv(operation)
            elif isinstance(operation, Requantize):
                self.requantize(operation)
            elif isinstance(operation, Add):
                self.add(operation)
            elif isinstance(operation, MaxPool):
                self.max_pool(operation)
            elif isinstance(operation, DepthToSpace):
                self.depth_to_space(operation)
            else:
                self.upsample(operation.input, operation.output)

    # --- parts ---

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Adds a node that is named after its one output, and returns that name."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """Adds an initializer, shared with any other of the same content, and returns its name."""
        return self.initializer(numpy_helper.from_array(np.array(value, dtype, order="C"), name))

    def initializer(self, tensor: TensorProto) -> str:
        """Adds a tensor as :meth:`constant` does an array."""
        content = f"{tensor.data_type} {list(tensor.dims)} ".encode() + tensor.raw_data
        digest = hashlib.sha256(content).digest()
        if digest not in self._by_content:
            while tensor.name in self.initializers:  # of other content, as a level's own weights would be
                tensor.name += "_"
            self._by_content[digest] = tensor.name
            self.initializers[tensor.name] = tensor
        return self._by_content[digest]

    def pool_node(self, operation: MaxPool, source: str, output: str) -> str:
        """Adds the MaxPool node of :meth:`max_pool` between two names."""
        window: dict[str, Any] = {"kernel_shape": [operation.kernel] * 2, "strides": [operation.stride] * 2}
        return self.node("MaxPool", [source], output, pads=[operation.padding] * 4, **window)

    def resize_node(self, source: str, output: str) -> str:
        """Adds the Resize node of :meth:`upsample` between two names."""
        scales = self.constant("upsample_scales", [1, 1, 2, 2])
        attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.node("Resize", [source, self.no_region(), scales], output, **attributes)

    def no_region(self) -> str:
        """Returns the name of the Resize's region of interest, of which there is none."""
        return ""

    # --- operations ---

    @abc.abstractmethod
    def pad_image(self, operation: PadImage) -> None:
        """Adds the image's padding: each channel by the code of its mean."""

    @abc.abstractmethod
    def conv(self, operation: Conv) -> None:
        """Adds a convolution whose output is quantized."""

    @abc.abstractmethod
    def predict(self, operation: Conv) -> None:
        """Adds a prediction layer, whose integer sums are scaled to real values."""

    @abc.abstractmethod
    def requantize(self, operation: Requantize) -> None:
        """Adds the step from one grid to another."""

    @abc.abstractmethod
    def add(self, operation: Add) -> None:
        """Adds the sum of two tensors, on a grid of its own."""

    def max_pool(self, operation: MaxPool) -> None:
        """Adds a maximum over windows, which stays on its input's grid."""
        self.pool_node(operation, operation.input, operation.output)

    def depth_to_space(self, operation: DepthToSpace) -> None:
        """Adds the spreading of channels over squares, which stays on its input's grid."""
        self.node("DepthToSpace", [operation.input], operation.output, blocksize=operation.block, mode="CRD")

    def upsample(self, source: str, output: str) -> None:
        """Adds the repetition of every value twice in height and width."""
        self.resize_node(source, output)

    def make_model(
        self,
        inputs: list[onnx.ValueInfoProto],
        outputs: list[onnx.ValueInfoProto],
        opsets: Mapping[str, int],
        ir_version: int,
        description: str = "",
    ) -> onnx.ModelProto:
        """Returns the model of what is written.

        Args:
            inputs, outputs: values that the graph reads and gives.
            opsets: versions of operators by domain.
            ir_version: version of ONNX's file format.
            description: text for graph and model.
        """
        graph = helper.make_graph(
            self.nodes, "aqdet", inputs, outputs, list(self.initializers.values()), doc_string=description or None
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
            ir_version=ir_version,
            producer_name="aqdet",
            producer_version=__version__,
            doc_string=description,
        )


def geometry(operation: Conv) -> dict[str, Any]:
    """Returns the attributes of a convolution's node: kernel, stride, padding, dilation and groups."""
    return {
        "kernel_shape": list(operation.weight.shape[2:]),
        "strides": list(operation.stride),
        "pads": [*operation.padding, *operation.padding],
        "dilations": list(operation.dilation),
        "group": operation.groups,
    }
