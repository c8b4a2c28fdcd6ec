"""Evaluation of arithmetic in Python's syntax by its syntax tree; no code is executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 4096
MAX_STEPS = 10_000
"""Limit of the computed nodes of the syntax tree, counted at each repetition, and of elements of repeated lists."""
MAX_INTEGER = 10**300
"""Largest magnitude of an integer, about that of the largest float."""

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}


def evaluate(text: str) -> Any:
    """Returns the value of an arithmetic expression, equal to that of ``eval``.

    It may have numbers, lists and tuples of them, ``+ - * / **``, and comprehensions of one ``for`` over a list, such
    as ``[[x, x * 2**(1.0/3)] for x in [32, 64]]`` in Detectron2's ``Base-RetinaNet.yaml``. The length of the text, the
    size of integers and the work are bounded.

    Raises:
        ValueError: In one line, for anything else, for a value beyond the bounds, or for one that does not exist, such
            as a division by zero.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the expression has {len(text)} characters, more than {MAX_CHARACTERS}")
    try:
        return _Evaluator().value(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r:.80} is not an arithmetic expression") from error
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"{text!r:.80} has no value: {error}") from error


class _Evaluator:
    def __init__(self) -> None:
        self._steps = 0

    def value(self, node: ast.expr, variables: dict[str, Any]) -> Any:
        self._take(1)
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return _bounded(value)
            case ast.Name(id=name) if name in variables:
                return variables[name]
            case ast.List(elts=elements):
                return [self.value(element, variables) for element in elements]
            case ast.Tuple(elts=elements):
                return tuple(self.value(element, variables) for element in elements)
            case ast.UnaryOp(op=op) if type(op) in _UNARY:
                return _UNARY[type(op)](self._number(node.operand, variables))
            case ast.BinOp(op=op) if type(op) in _BINARY:
                return self._binary(node, variables)
            case ast.ListComp(generators=[ast.comprehension(target=ast.Name(id=name), ifs=[], is_async=0) as loop]):
                items = self.value(loop.iter, variables)
                if not isinstance(items, list | tuple):
                    raise ValueError(f"a comprehension needs a list, got {items!r:.80}")
                return [self.value(node.elt, {**variables, name: item}) for item in items]
        raise ValueError(f"{ast.unparse(node)!r:.80} ({type(node).__name__}) is not arithmetic")

    def _take(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise ValueError(f"the expression takes more than {MAX_STEPS} steps")

    def _number(self, node: ast.expr, variables: dict[str, Any]) -> int | float:
        value = self.value(node, variables)
        if not isinstance(value, int | float):
            raise ValueError(f"{ast.unparse(node)!r:.80} is no number")
        return value

    def _binary(self, node: ast.BinOp, variables: dict[str, Any]) -> Any:
        left, right = self.value(node.left, variables), self.value(node.right, variables)
        if isinstance(left, list | tuple) or isinstance(right, list | tuple):
            return self._of_lists(node, left, right)
        of_integers = isinstance(left, int) and isinstance(right, int) and right > 0
        if isinstance(node.op, ast.Pow) and of_integers and left.bit_length() * right > 4 * MAX_INTEGER.bit_length():
            raise ValueError(f"{left} ** {right} is too large")
        result = _BINARY[type(node.op)](left, right)
        if isinstance(result, complex):
            raise ValueError(f"{left} ** {right} is not a real number")
        return _bounded(result)

    def _of_lists(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        """Returns the sum of two lists, or the product of a list and an integer."""
        sizes = [len(value) if isinstance(value, list | tuple) else value for value in (left, right)]
        if isinstance(node.op, ast.Add) and type(left) is type(right):
            self._take(sum(sizes))
        elif isinstance(node.op, ast.Mult) and all(isinstance(size, int) for size in sizes):
            self._take(max(sizes[0] * sizes[1], 0))
        return _BINARY[type(node.op)](left, right)


def _bounded(value: int | float) -> int | float:
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError("an integer is too large")
    return value
