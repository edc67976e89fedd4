"""What the parameters of estimators and functions may be, and one line that names one that is something else."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from fullrank.randomized.blocks import Array


@dataclass(frozen=True)
class Rule:
    """What a parameter may be.

    Attributes:
        expected: in words, for the error.
        holds: whether a value, of any type, is right.
    """

    expected: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self.expected} or {other.expected}", lambda value: self.holds(value) or other.holds(value))


NONE = Rule("None", lambda value: value is None)
FLAG = Rule("True or False", lambda value: isinstance(value, (bool, np.bool_)))


def one_of(*choices: str | None) -> Rule:
    """One of some words, or None if that is among them."""
    words = ", ".join(str(choice) for choice in choices) if len(choices) > 1 else f'"{choices[0]}"'
    expected = f"one of {words}" if len(choices) > 1 else words
    return Rule(expected, lambda value: (value is None or isinstance(value, str)) and value in choices)


def integer(least: int) -> Rule:
    """An integer >= `least`."""
    return Rule(f"an integer >= {least}", lambda value: _is_a(value, Integral) and value >= least)


def number(
    *, above: float | None = None, least: float | None = None, below: float = np.inf, most: float = np.inf
) -> Rule:
    """A finite number > `above` or >= `least`, and < `below` and <= `most`."""
    low = least if above is None else above
    assert low is not None
    left = "[" if above is None else "("
    if np.isfinite(below) or np.isfinite(most):
        expected = f"a number in {left}{low:g}, {f'{below:g})' if np.isfinite(below) else f'{most:g}]'}"
    else:
        expected = f"a number {'>=' if above is None else '>'} {low:g}"

    def holds(value: Any) -> bool:
        if not _is_a(value, Real) or not np.isfinite(value):
            return False
        return bool((value >= low if above is None else value > low) and value < below and value <= most)

    return Rule(expected, holds)


def numbers(expected: str, holds: Callable[[Array], bool]) -> Rule:
    """A number or several, as an array of no or one dimension for which `holds` is true."""

    def are(value: Any) -> bool:
        try:
            values = np.asarray(value)
        except ValueError:  # a ragged list
            return False
        return values.ndim <= 1 and values.dtype.kind in "iuf" and holds(values.astype(np.float64))

    return Rule(expected, are)


POSITIVE = numbers("positive, finite numbers", lambda values: bool((np.isfinite(values) & (values > 0)).all()))


def _is_a(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check(name: str, value: Any, rule: Rule) -> None:
    """Raises ValueError, in one line that names the parameter, unless the rule holds."""
    if not rule.holds(value):
        raise wrong(name, value, rule.expected)


def check_parameters(model: Any, rules: Mapping[str, Rule]) -> None:
    """Check attributes of an estimator; raises ValueError at the first that breaks its rule."""
    for name, rule in rules.items():
        check(name, getattr(model, name), rule)


def wrong(name: str, value: Any, expected: str) -> ValueError:
    """The error for a parameter, in one line."""
    value = value.item() if isinstance(value, np.generic) else value
    shown = f'"{value}"' if isinstance(value, str) else textwrap.shorten(repr(value), 80, placeholder=" ...")
    return ValueError(f"{name} is {shown}, expected {expected}")


def per_column(name: str, value: Any, d: int) -> Array:
    """A positive number, shape (), or one for each column, shape (d,).

    Raises:
        ValueError: another shape, or numbers that are not positive and finite.
    """
    check(name, value, POSITIVE)
    values = np.asarray(value, dtype=np.float64)
    if values.ndim and len(values) != d:
        raise ValueError(f"{name} has shape {values.shape}, expected a number or one for each of {d} columns")
    return values


def random_generator(random_state: Any) -> np.random.RandomState:
    """scikit-learn's `check_random_state`, with an error that names the parameter."""
    try:
        return check_random_state(random_state)  # type: ignore[no-any-return]
    except (TypeError, ValueError):
        expected = "None, an integer in [0, 2**32) or a numpy.random.RandomState"
        raise wrong("random_state", random_state, expected) from None


def random_seed(random_state: Any) -> int:
    """A seed for what draws row by row."""
    return int(random_generator(random_state).randint(2**31))
