"""What an impression is worth: a formula over predicted probabilities and the bid."""

from __future__ import annotations

import ast
import keyword
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fullrank.schema import Schema

MAX_LENGTH = 1000
# Operations inside one another; a formula is walked recursively.
MAX_DEPTH = 200
_BINARY: dict[type[ast.operator], Callable[[Tensor, Tensor], Tensor]] = {
    ast.Add: torch.add,
    ast.Sub: torch.sub,
    ast.Mult: torch.mul,
    ast.Div: torch.div,
    ast.Pow: torch.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Tensor], Tensor]] = {ast.USub: torch.neg, ast.UAdd: torch.positive}
_FUNCTIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "min": (2, torch.minimum),
    "max": (2, torch.maximum),
    "log1p": (1, torch.log1p),
}


class ValueFormula:
    """A formula such as `bid * click - 3.0 * hide`.

    Made of names, numbers, + - * / **, parentheses, `min(a, b)`, `max(a, b)` and `log1p(x)`. It is parsed, checked
    against that list and then walked; it is never run as Python, so a formula from an untrusted bundle can do nothing
    but arithmetic.

    Args:
        text: the formula.
        known: names that it may use: tasks and columns.

    Raises:
        ValueError: if it uses anything else, or no name at all.
    """

    def __init__(self, text: str, known: Iterable[str]) -> None:
        self.text = text
        self.known = tuple(known)
        if len(text) > MAX_LENGTH:
            raise ValueError(f"the value formula has {len(text)} characters, at most {MAX_LENGTH} are allowed")
        try:
            # A name alone may be any, such as that of a label "is clicked".
            self._root = ast.Name(text) if text in self.known else ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise ValueError(f'value formula "{_shown(text)}" cannot be read: {reason}') from None
        names: list[str] = []
        self._check(self._root, names, 0)
        if not names:
            raise ValueError(
                f'value formula "{_shown(text)}" is a constant; use at least one of {", ".join(self.known)}'
            )
        self.names = tuple(dict.fromkeys(names))

    def __call__(self, columns: Mapping[str, Tensor]) -> Tensor:
        """The value of each row; every column has the same shape.

        Raises:
            KeyError: if a name of the formula is not among the columns.
        """
        return self._evaluate(self._root, columns)

    def is_affine(self, name: str) -> bool:
        """Whether it is written as a + b * name, with a and b that do not depend on the name."""
        return self._degree(self._root, name) <= 1

    def _degree(self, node: ast.expr, name: str) -> int:
        """0 where a part does not depend on a name, 1 where it is affine in it, 2 otherwise."""
        match node:
            case ast.Name(id=own):
                return int(own == name)
            case ast.UnaryOp(operand=operand):
                return self._degree(operand, name)
            case ast.BinOp(left=left, op=operator, right=right):
                degrees = self._degree(left, name), self._degree(right, name)
                match operator:
                    case ast.Add() | ast.Sub():
                        return max(degrees)
                    case ast.Mult():
                        return min(2, sum(degrees))
                    case ast.Div():
                        return 2 if degrees[1] else degrees[0]
                return 2 if any(degrees) else 0
            case ast.Call(args=arguments):
                return 2 if any(self._degree(argument, name) for argument in arguments) else 0
        return 0

    def _refuse(self, node: ast.AST, what: str) -> ValueError:
        place = getattr(node, "col_offset", 0) + 1
        return ValueError(
            f'value formula "{_shown(self.text)}" character {place}: {what}; allowed are {", ".join(self.known)}, '
            "numbers, + - * / **, min(a, b), max(a, b), log1p(x)"
        )

    def _check(self, node: ast.expr, names: list[str], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"the value formula has more than {MAX_DEPTH} operations inside one another")
        match node:
            case ast.BinOp(left=left, op=operator, right=right):
                if type(operator) not in _BINARY:
                    raise self._refuse(node, f"operator {type(operator).__name__} is not allowed")
                self._check(left, names, depth + 1)
                self._check(right, names, depth + 1)
            case ast.UnaryOp(op=sign, operand=operand):
                if type(sign) not in _UNARY:
                    raise self._refuse(node, f"operator {type(sign).__name__} is not allowed")
                self._check(operand, names, depth + 1)
            case ast.Constant(value=value):
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise self._refuse(node, f"{value!r} is not a number")
                if abs(value) > 1e30 or not math.isfinite(value):
                    raise self._refuse(node, "a number is too large")
            case ast.Name(id=name):
                if name not in self.known:
                    raise self._refuse(node, f'unknown name "{name}"')
                names.append(name)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                if name not in _FUNCTIONS:
                    raise self._refuse(node, f'function "{name}" is not allowed')
                if len(arguments) != _FUNCTIONS[name][0]:
                    raise self._refuse(node, f"{name} takes {_FUNCTIONS[name][0]} arguments, got {len(arguments)}")
                for argument in arguments:
                    self._check(argument, names, depth + 1)
            case _:
                raise self._refuse(node, f"{type(node).__name__} is not allowed")

    def _evaluate(self, node: ast.expr, columns: Mapping[str, Tensor]) -> Tensor:
        match node:
            case ast.BinOp(left=left, op=operator, right=right):
                return _BINARY[type(operator)](self._evaluate(left, columns), self._evaluate(right, columns))
            case ast.UnaryOp(op=sign, operand=operand):
                return _UNARY[type(sign)](self._evaluate(operand, columns))
            case ast.Constant(value=value):
                # Without dimensions it does not widen float32 columns.
                return torch.tensor(float(value), dtype=torch.float64)  # type: ignore[arg-type]
            case ast.Name(id=name):
                return columns[name]
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return _FUNCTIONS[name][1](*(self._evaluate(argument, columns) for argument in arguments))
            case _:
                raise AssertionError("checked at construction")


def _shown(text: str) -> str:
    """In one line that can be printed, whatever is in the text."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def formula_names(schema: Schema) -> list[str]:
    """What a value formula may use: the tasks, and `bid` where the log has one."""
    return [label.name for label in schema.labels] + (["bid"] if schema.keys.bid is not None else [])


def default_formula(schema: Schema) -> str:
    """`bid * <first task>`; the first task alone where there is no bid, or its name cannot stand in a formula."""
    name = schema.labels[0].name
    writable = name.isidentifier() and not keyword.iskeyword(name)
    return f"bid * {name}" if schema.keys.bid is not None and writable else name
