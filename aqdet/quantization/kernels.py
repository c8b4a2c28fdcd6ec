"""Operations that can be computed in more than one way, and the choice between the ways.

A quantized network is written with plain operations, which say what is computed. One that is marked with
:func:`replaceable` can have another implementation, a *kernel*, which computes the same values and gradients for less
memory or time. Kernels come in named sets: ``"plain"`` is empty, ``"lean"`` (:mod:`.lean`) is in use by default, and
``"fused"`` (:mod:`.fused`) is where there are a CUDA device and Triton. A
kernel takes the arguments of its operation and calls :func:`plain` with them where it has nothing better, so that a set
may be for some devices, methods or layers alone::

    register_kernels("mine", {**KERNELS["lean"], "fake_quantize": my_fake_quantize})
    with use_kernels("mine"):
        losses = model(batch)

Operations: ``fake_quantize``, ``dorefa_weight``, ``conv2d`` (quantized convolution with its norm and activation),
``chain`` (a sequence of layers), ``chains`` (the same for several tensors), ``stream`` (ReLU and quantization of a
tensor that several layers read), ``relu_before`` (ReLU of a tensor that a quantizer reads), ``adapt`` (an adaptor of
the auxiliary path), ``max_pool2d`` and ``shared_weights`` (quantized weights of a layer's calls on several tensors).
The element-wise arithmetic of the lean kernels is replaceable too: ``fake_quantized``, ``recipe_quantized``,
``recipe_codes``, ``region_quantized`` and their gradients (``scale_gradients``, ``recipe_gradients``,
``region_gradients``), and that of batch norms: ``batch_moments``, ``normalized``, ``norm_gradients``,
``quantized_norm_gradients``, ``norm_sums`` and ``norm_input``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch

from . import functional

Operation = TypeVar("Operation", bound=Callable[..., Any])

KERNELS: dict[str, Mapping[str, Callable[..., Any]]] = {"plain": {}}
"""Name of a set -> name of an operation -> kernel."""

_plain: dict[str, Callable[..., Any]] = {}
_in_use: Mapping[str, Callable[..., Any]] = KERNELS["plain"]
_in_use_name = "plain"


def replaceable(name: str) -> Callable[[Operation], Operation]:
    """Returns a decorator that makes a function or method the plain form of an operation."""

    def decorate(operation: Operation) -> Operation:
        _plain[name] = operation

        @functools.wraps(operation)
        def call(*args: Any, **kwargs: Any) -> Any:
            # A trace is of the operations that it consists of; a compiler fuses them and recomputes what is cheap.
            if torch.jit.is_tracing() or torch.compiler.is_compiling():
                return operation(*args, **kwargs)
            return _in_use.get(name, operation)(*args, **kwargs)

        return cast(Operation, call)

    return decorate


def plain(name: str) -> Callable[..., Any]:
    """Returns the plain form of an operation, which a kernel falls back to."""
    return _plain[name]


def register_kernels(name: str, kernels: Mapping[str, Callable[..., Any]]) -> None:
    """Adds a set of kernels: name of an operation -> function that takes the arguments of its plain form."""
    KERNELS[name] = kernels


def set_kernels(name: str) -> None:
    """Computes with a set of kernels from now on.

    Raises:
        ValueError: if there is no such set; lists those that there are.
    """
    global _in_use, _in_use_name
    if name not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {name!r}")
    _in_use, _in_use_name = KERNELS[name], name


@contextlib.contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Computes with a set of kernels inside the context; a backward belongs to the forward that it follows.

    Raises:
        ValueError: see :func:`set_kernels`.
    """
    before = _in_use_name
    set_kernels(name)
    try:
        yield
    finally:
        set_kernels(before)


_free_norms = False


@contextlib.contextmanager
def free_norms() -> Iterator[None]:
    """Lets kernels compute the batch norms of float layers, too, inside the context.

    They are Detectron2's but for rounding, where contracts ask for Detectron2's values to the bit elsewhere.
    """
    global _free_norms
    before, _free_norms = _free_norms, True
    try:
        yield
    finally:
        _free_norms = before


def has_free_norms() -> bool:
    """Returns whether this runs inside :func:`free_norms`."""
    return _free_norms


_keeps_less = False


@contextlib.contextmanager
def keeping_less() -> Iterator[None]:
    """Lets kernels keep less for backward, for more time, inside the context: where others need the memory."""
    global _keeps_less
    before, _keeps_less = _keeps_less, True
    try:
        yield
    finally:
        _keeps_less = before


def keeps_less() -> bool:
    """Returns whether this runs inside :func:`keeping_less`."""
    return _keeps_less


fake_quantize = replaceable("fake_quantize")(functional.fake_quantize)
