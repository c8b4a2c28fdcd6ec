"""A GPU that pretends: tensors that say they are on ``cuda:0`` and count what a GPU would do with them.

Inside :func:`pretending` a training step runs as it would with ``MODEL.DEVICE cuda``, on a machine that has no GPU.
Its tensors wrap others, on the CPU with values or on the meta device without. They refuse to meet tensors of the CPU,
as a GPU's do, and a :class:`Ledger` counts launches, bytes, multiplications, waits and copies. A test that passes on
the CPU so fails where it would on a GPU::

    with pretending() as ledger:
        to_pretended(model)
        losses = model(batch)
        print(ledger.waits)
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from aqdet.quantization.fused.operators import LAUNCHES

DEVICE = torch.device("cuda:0")
_OURS = ("/aqdet/", "/detectron2/", "/fvcore/")
_WAITING = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2", "bincount",
    "unique_consecutive",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_FREE = {
    "alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided",
    "_unsafe_view",
}  # fmt: skip
"""Operations that launch nothing; views do not either."""
_WRITE_ONLY = {"fill_", "zero_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "arange"}
_MAY_MEET_CPU = {"_to_copy", "alias", "copy_", "detach", "lift_fresh", "view"}


class DeviceMismatch(RuntimeError):
    """A tensor of the CPU met one of the pretended GPU."""


@dataclasses.dataclass
class Ledger:
    """The work that a GPU would have done.

    Attributes:
        launches, bytes: kernels and the bytes that they read and write, by operation.
        flops: operations of convolutions and matrix products, two for a multiplication and its addition.
        waits: (operation, place in the source) where the host waits for the GPU.
        copies: (operation, place in the source) of copies from memory that is not pinned.
        collectives: (operation, place in the source) of what all processes do together.
    """

    launches: Counter[str] = dataclasses.field(default_factory=Counter)
    bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    flops: int = 0
    waits: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    copies: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    collectives: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)


_ledger = Ledger()
_inner_device = "cpu"  # of what new tensors stand for
_depth = 0  # of operations on pretended tensors, in which C++ may make others
_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def place() -> str:
    """Returns the innermost place in the source of the detector that is running, or how it is known otherwise."""
    for frame in _frames():
        name = frame.f_code.co_filename
        start = max(name.rfind(part) for part in _OURS)
        if start >= 0:
            return f"{name[start + 1 :]}:{frame.f_lineno}"
        if name.endswith("torch/autograd/graph.py") and frame.f_code.co_name == "_engine_run_backward":
            return "backward"
    return "elsewhere"


def _module() -> str:
    """Returns the name of the innermost module that is running, with a word before it; "" if there is none."""
    for frame in _frames():
        # A kernel that stands for a module's forward has it as its argument "layer".
        for module in (frame.f_locals.get(key) for key in ("self", "layer")):
            if isinstance(module, nn.Module) and _names.get(module):
                return f" in {_names[module]}"
    return ""


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _size(tensor: Tensor) -> int:
    """Returns the bytes that a pass over a tensor moves; one that is expanded is read once."""
    inner = tensor.inner if isinstance(tensor, PretendedTensor) else tensor
    return min(inner.numel() * inner.element_size(), inner.untyped_storage().nbytes())


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _count(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
    inputs, outputs = list({id(t): t for t in _tensors((args, kwargs))}.values()), _tensors(out)
    if name in _FREE or (outputs and _is_view(func)):
        return
    moved = sum(map(_size, inputs)) + sum(map(_size, outputs))
    if name in _WRITE_ONLY:
        moved = sum(map(_size, outputs))
    elif func._schema.is_mutable and not name.endswith("_") and outputs:
        moved -= _size(outputs[0])  # the argument ``out`` is written, not read
    elif name == "copy_":
        moved = _size(args[0]) + _size(args[1])
    _ledger.launches[name] += LAUNCHES.get(name.removeprefix("aqdet::"), 1)
    _ledger.bytes[name] += moved
    if name == "convolution":
        _ledger.flops += 2 * outputs[0].numel() * args[1][0].numel()
    elif name == "convolution_backward":
        _ledger.flops += 2 * args[0].numel() * args[2][0].numel() * sum(args[-1][:2])
    elif name in ("mm", "addmm"):
        a, b = args[-2:]
        _ledger.flops += 2 * a.numel() * b.shape[1]


def _check(name: str, args: Any, kwargs: Any) -> None:
    """Refuses tensors of the CPU, and notes waits and copies; a 0-dim tensor may be on the CPU, as in torch."""
    theirs = [t for t in _tensors((args, kwargs)) if not isinstance(t, PretendedTensor)]
    theirs = [t for t in theirs if t.dim() > 0 and t.numel() > 0]
    indexes = name in _INDEXING and isinstance(args[0], PretendedTensor)
    if theirs and not indexes and name not in _MAY_MEET_CPU:
        shapes = ", ".join(str(tuple(t.shape)) for t in theirs)
        raise DeviceMismatch(f"{name} at {place()}{_module()}: tensors on cuda:0 and, of shape {shapes}, on the CPU")
    if theirs and name == "copy_":
        _ledger.copies["copy_", place()] += 1
    if name in _WAITING:
        _ledger.waits[name, place()] += 1
    if indexes:
        indices = _tensors(args[1])
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _ledger.waits["index by a mask", place()] += 1
        if any(not isinstance(index, PretendedTensor) for index in indices):
            _ledger.copies["index of the CPU", place()] += 1


def _by_channel(x: Tensor, number: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(number))


_SHAPES: dict[str, Callable[..., Any]] = {
    "batch_norm_backward_elemt": lambda grad, x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda grad, x, *_: _by_channel(x, 4),
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_gather_stats_with_counts": lambda x, *_: _by_channel(x, 2),
    "batch_norm_stats": lambda x, *_: _by_channel(x, 2),
    "batch_norm_update_stats": lambda x, *_: _by_channel(x, 2),
}
"""Operations of batch norm without a Meta kernel in torch -> shapes of their results."""


def _run(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    if name in _SHAPES and any(t.is_meta for t in _tensors(args)):
        return _SHAPES[name](*args)
    if name == "batch_norm_update_stats":
        args = (args[0].float(), *args[1:])  # a GPU adds half precision up in float32
    if name == "index" and args[0].is_meta and any(t.dtype == torch.bool for t in _tensors(args[1])):
        return args[0].clone()  # a synchronized norm leaves out processes without images: there are none
    return func(*args, **kwargs)


class PretendedTensor(Tensor):
    """A tensor that says it is on ``cuda:0``.

    Attributes:
        inner: the tensor on the CPU or the meta device that it stands for.
    """

    inner: Tensor  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        result = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device="cpu",  # type: ignore[arg-type]
        )  # fmt: skip
        result.inner = inner
        return result

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.inner})"

    def numpy(self, **_: Any) -> Any:
        """Refuses, as a tensor of a GPU does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        name = func._schema.name.removeprefix("aten::")
        kwargs = kwargs or {}
        _check(name, args, kwargs)
        inner_kwargs = dict(kwargs)
        if inner_kwargs.get("device") is not None:
            # Asked for by C++, which takes these tensors for the CPU's; Python's own moves do not come here.
            inner_kwargs["device"] = args[0].inner.device if isinstance(args[0], PretendedTensor) else _inner_device
        out = _run(func, name, *tree_map(_unwrap, (args, inner_kwargs)))
        _count(func, name, args, kwargs, out)
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrap, out))


def _copy(tensor: Tensor) -> PretendedTensor:
    """Returns a copy of a tensor of the CPU on the pretended GPU."""
    tensor = tensor.detach()
    return PretendedTensor(torch.empty_like(tensor, device="meta") if _inner_device == "meta" else tensor.clone())


def _wrap(value: Any) -> Any:
    return PretendedTensor(value) if isinstance(value, Tensor) and not isinstance(value, PretendedTensor) else value


def _unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, PretendedTensor) else value


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


class _Factories(TorchDispatchMode):
    """Has what C++ makes beside a pretended tensor on its device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not _depth or _tensors((args, kwargs)):
            return out
        return tree_map(lambda t: _copy(t) if isinstance(t, Tensor) else t, out)


class _Functions(TorchFunctionMode):
    """Has factories and moves to ``cuda`` make pretended tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        global _depth
        kwargs = dict(kwargs or {})
        if func is Tensor.backward:
            if "gradient" in kwargs:
                kwargs["grad_tensors"] = kwargs.pop("gradient")
            _depth += 1
            try:
                with self:  # else the mode is off in what backward calls
                    return torch.autograd.backward(*args, **kwargs)
            finally:
                _depth -= 1
        if func is torch.Tensor.cpu:
            return _move(args[0], torch.device("cpu"))
        if func is torch.Tensor.tolist:
            return _move(args[0], torch.device("cpu")).tolist()
        if func is torch.Tensor.cuda:
            return _move(args[0], DEVICE)
        if func is torch.Tensor.to:
            device = kwargs.pop("device", None)
            flags = [value for value in args[1:] if isinstance(value, bool)]
            kwargs.update(zip(("non_blocking", "copy"), flags, strict=False))
            for value in args[1:]:
                if isinstance(value, Tensor):
                    device, kwargs["dtype"] = value.device, value.dtype
                elif isinstance(value, str | torch.device):
                    device = value
                elif isinstance(value, torch.dtype):
                    kwargs["dtype"] = value
            out = func(args[0], **kwargs) if kwargs else args[0]
            return out if device is None else _move(out, torch.device(device))
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _inner_device
            if func in (torch.tensor, torch.as_tensor):
                _ledger.copies[func.__name__, place()] += 1
            return _wrap(func(*args, **kwargs))
        ours = any(isinstance(t, PretendedTensor) for t in _tensors((args, kwargs)))
        _depth += ours
        try:
            return func(*args, **kwargs)
        finally:
            _depth -= ours


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not isinstance(tensor, PretendedTensor):
        _ledger.copies["to cuda", place()] += 1
        return _copy(tensor)
    if device.type == "cpu" and isinstance(tensor, PretendedTensor):
        _ledger.waits["to the CPU", place()] += 1
        return tensor.inner.detach().clone()
    return tensor


def to_pretended(model: nn.Module) -> nn.Module:
    """Moves the parameters and buffers of a model to the pretended GPU, in place; returns the model."""
    for name, module in model.named_modules():
        _names[module] = name
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                moved: Tensor = _copy(tensor)
                if isinstance(tensor, nn.Parameter):
                    moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
                tensors[key] = moved  # type: ignore[assignment]
    return model


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Returns the memory behind a tensor."""
    inner: Tensor = _unwrap(tensor)
    return inner.untyped_storage()


class _Autocast(torch.autocast):
    """Mixed precision for tensors that pretend: torch takes them for the CPU's."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


_group_tensors = torch._C._group_tensors_by_device_and_dtype


def _group_pretended(lists: Any, with_indices: bool = False) -> Any:
    """Has C++, which takes pretended tensors for the CPU's, group them under the device that they say."""
    groups = _group_tensors(lists, with_indices)
    ours = any(isinstance(t, PretendedTensor) for t in _tensors(lists))
    return {(DEVICE if ours else device, dtype): values for (device, dtype), values in groups.items()}


def ledger_in_use() -> Ledger:
    """Returns the ledger that is written now."""
    return _ledger


@contextlib.contextmanager
def counting() -> Iterator[Ledger]:
    """Counts what is done inside the context, in a ledger of its own, which it returns."""
    global _ledger
    before, _ledger = _ledger, Ledger()
    try:
        yield _ledger
    finally:
        _ledger = before


@contextlib.contextmanager
def pretending(*, meta: bool = False) -> Iterator[Ledger]:
    """Has tensors that are made on ``cuda`` pretend, inside the context; returns the ledger of :func:`counting`.

    Args:
        meta: whether to compute only shapes, in no time and memory; what depends on values cannot run then.
    """
    global _inner_device
    is_enabled, get_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    translate = {"cuda": "cpu"}
    with (
        mock.patch.object(torch, "autocast", _Autocast),
        mock.patch.object(torch, "is_autocast_enabled", lambda *a: is_enabled(*(translate.get(x, x) for x in a))),
        mock.patch.object(torch, "get_autocast_dtype", lambda x: get_dtype(translate.get(x, x))),  # type: ignore[arg-type]
        mock.patch.object(torch.cuda, "Stream", lambda *_: None),
        mock.patch.object(torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _group_pretended),
        _Factories(),
        _Functions(),
        counting() as ledger,
    ):
        before, _inner_device = _inner_device, "meta" if meta else "cpu"
        try:
            yield ledger
        finally:
            _inner_device = before
