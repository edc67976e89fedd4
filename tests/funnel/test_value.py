"""Facts about the value formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fullrank.funnel.value import ValueFormula

KNOWN = ("bid", "click", "hide")
number = st.floats(0.01, 10)


def expressions() -> st.SearchStrategy[str]:
    atom = st.sampled_from(KNOWN) | st.floats(0.1, 9, allow_nan=False).map(repr)
    return st.recursive(
        atom,
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
            inner.map(lambda text: f"-{text}"),
            st.tuples(st.sampled_from(("min", "max")), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
        ),
        max_leaves=8,
    )


@given(expressions(), number, number, number)
def test_it_computes_what_python_would(text: str, bid: float, click: float, hide: float) -> None:
    columns = {"bid": bid, "click": click, "hide": hide}
    if not any(name in text for name in KNOWN):
        text += " + 0 * bid"
    try:
        expected = eval(text, {"__builtins__": {}, "min": min, "max": max}, columns)
    except ZeroDivisionError:
        return
    found = ValueFormula(text, KNOWN)(
        {name: torch.tensor(value, dtype=torch.float64) for name, value in columns.items()}
    )
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_powers_and_log1p() -> None:
    columns = {"bid": torch.tensor([2.0, 3.0]), "click": torch.tensor([0.5, 0.1]), "hide": torch.zeros(2)}
    found = ValueFormula("bid ** 2 * log1p(click) - -hide", KNOWN)(columns)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([4 * math.log1p(0.5), 9 * math.log1p(0.1)])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("bid * clik", 'character 7: unknown name "clik"; allowed are bid, click, hide'),
        ("__import__('os')", 'function "__import__" is not allowed'),
        ("bid.real", "Attribute is not allowed"),
        ("[bid][0]", "Subscript is not allowed"),
        ("(lambda: bid)()", "Call is not allowed"),
        ("bid if click else hide", "IfExp is not allowed"),
        ("bid // click", "operator FloorDiv is not allowed"),
        ("bid @ click", "operator MatMult is not allowed"),
        ("not bid", "operator Not is not allowed"),
        ("bid * 'x'", "'x' is not a number"),
        ("bid * True", "True is not a number"),
        ("bid * 1e99", "a number is too large"),
        ("min(bid)", "min takes 2 arguments, got 1"),
        ("max(bid, *click)", "Starred is not allowed"),
        ("max(a=bid, b=1)", "Call is not allowed"),
        ("bid *", "cannot be read"),
        ("", "cannot be read"),
        ("2 + 2", "is a constant"),
        ("(" * 400 + "bid" + ")" * 400, "cannot be read"),
        ("bid + " * 200 + "bid", "at most 1000 are allowed"),
        ("bid; click", "cannot be read"),
        ("(x := bid)", "NamedExpr is not allowed"),
        ("lambda: bid", "Lambda is not allowed"),
        ("[bid for bid in click]", "ListComp is not allowed"),
        ("min(bid for _ in click)", "min takes 2 arguments, got 1"),
        ("bid.__class__.__bases__", "Attribute is not allowed"),
        ("min.__globals__(bid, click)", "Call is not allowed"),
        ("f'{bid}'", "JoinedStr is not allowed"),
        ("await bid", "Await is not allowed"),
        ("bid * \u0441lick", 'unknown name "\u0441lick"'),  # a Cyrillic letter
        ("b\u200bid", "cannot be read"),
        ("bid\x00", "cannot be read"),
        ("bid * 9" + "0" * 900, "a number is too large"),
        ("bid * 1j", "1j is not a number"),
        ("-" * 300 + "bid", "more than 200 operations"),
        ("**".join(["2"] * 220) + "**bid", "more than 200 operations"),
        ("bid\n+ click", "cannot be read"),
        ("bid * \ud800", "cannot be read"),
        ("bid * \0", "cannot be read"),
        ("-" * 900 + "bid", "more than 200 operations"),
        ("max(" * 201 + "bid" + ", click)" * 201, "at most 1000"),
        ("bid * " + "9" * 900, "a number is too large"),
        ("bid * ...", "Ellipsis is not a number"),
        ("bid * b'x'", "b'x' is not a number"),
        ("bid * None", "None is not a number"),
        ("bid.__class__.__mro__", "Attribute is not allowed"),
        ("max.__globals__", "Attribute is not allowed"),
        ("getattr(bid, 'data')", 'function "getattr" is not allowed'),
        ("max(bid, click, hide)", "max takes 2 arguments, got 3"),
        ("max(bid, click, **hide)", "Call is not allowed"),
        ("bid < click", "Compare is not allowed"),
        ("bid and click", "BoolOp is not allowed"),
        ("yield bid", "cannot be read"),
        ("import os", "cannot be read"),
    ],
)
def test_all_but_arithmetic_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="value formula") as caught:
        ValueFormula(text, KNOWN)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).encode()  # it can be printed


def test_what_no_number_holds_is_infinite_at_once() -> None:
    """Powers of powers are floats, not whole numbers of millions of digits."""
    columns = {"bid": torch.tensor([0.0, 2.0]), "click": torch.tensor([0.0, 0.5]), "hide": torch.zeros(2)}
    for text in (
        "bid + 9 ** 9 ** 9 ** 9",
        "click + (9 ** 9) ** (9 ** 9)",
        "bid / hide",
        "(bid - 5) / 0",
        "bid * 0 / 0",
    ):
        assert not torch.isfinite(ValueFormula(text, KNOWN)(columns)).any()


@pytest.mark.parametrize(
    ("text", "affine"),
    [
        ("bid * click - 3.0 * hide", True),
        ("-(bid / 2 - hide) * -log1p(click)", True),
        ("click ** 2 * bid + min(click, hide)", True),
        ("hide", True),
        ("bid * bid", False),
        ("click / bid", False),
        ("max(bid, 1) * click", False),
        ("bid ** 1", False),
        ("2 ** bid", False),
        ("log1p(bid)", False),
    ],
)
def test_what_is_affine_in_the_bid_is_so_in_numbers(text: str, affine: bool) -> None:
    formula = ValueFormula(text, KNOWN)
    assert formula.is_affine("bid") == affine
    columns = {"click": torch.tensor(0.3).double(), "hide": torch.tensor(0.2).double()}
    at = [float(formula({**columns, "bid": torch.tensor(bid).double()})) for bid in (1.0, 3.0, 5.0)]
    if affine:
        assert at[2] - at[1] == pytest.approx(at[1] - at[0])


def test_what_overflows_gives_no_number_and_ends() -> None:
    columns = {"bid": torch.tensor([2.0]), "click": torch.tensor([0.5]), "hide": torch.zeros(1)}
    assert torch.isinf(ValueFormula("bid ** 9 ** 9 ** 9", KNOWN)(columns)).all()
    assert torch.isinf(ValueFormula("click / hide", KNOWN)(columns)).all()
    assert torch.isnan(ValueFormula("hide / hide", KNOWN)(columns)).all()
    assert torch.isnan(ValueFormula("log1p(-bid)", KNOWN)(columns)).all()
