"""Facts about gains: in a world of a few states they are the mutual informations that they stand for."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from fullrank.transfer.gain import Compared, transfer_ratio

# A world: x, the raw history h of two events, what only the foundation model sees e, and a click.


def world() -> dict[tuple[int, ...], int]:
    """Rows of each state (x, h_1, h_2, e, y)."""
    rng, found = np.random.default_rng(0), {}
    for x, h_1, h_2, e in itertools.product((0, 1), repeat=4):
        rows = int(rng.integers(500, 3000))
        clicked = round(rows / (1 + math.exp(1.5 - x - 1.2 * h_1 - 0.6 * h_2 * (1 + e) - e)))
        found[x, h_1, h_2, e, 0], found[x, h_1, h_2, e, 1] = rows - clicked, clicked
    return found


WORLD = world()


def best(seen: object) -> tuple[torch.Tensor, float]:
    """Log-odds of each row by a model that knows P(y | what it sees), and the conditional entropy."""
    counts: dict[object, list[int]] = defaultdict(lambda: [0, 0])
    for state, rows in WORLD.items():
        counts[seen(*state[:4])][state[4]] += rows  # type: ignore[operator]
    logits, entropy, total = [], 0.0, sum(WORLD.values())
    for state, rows in WORLD.items():
        no, yes = counts[seen(*state[:4])]  # type: ignore[operator]
        logits.append(torch.full((rows,), math.log(yes / no), dtype=torch.float64))
        entropy -= rows / total * math.log((no, yes)[state[4]] / (no + yes))
    return torch.cat(logits), entropy


LABELS = torch.cat([torch.full((rows,), float(state[4])) for state, rows in WORLD.items()])
SEEN = {
    "x": lambda x, h_1, h_2, e: x,
    "xh": lambda x, h_1, h_2, e: (x, h_1, h_2),
    "xs": lambda x, h_1, h_2, e: (x, 2 * e + h_1),  # a code that has e, and half of the history
    "xhs": lambda x, h_1, h_2, e: (x, h_1, h_2, e),
    "xs1": lambda x, h_1, h_2, e: (x, e),
    "compressed": lambda x, h_1, h_2, e: (x, max(e, h_1)),
}


@pytest.fixture(scope="module")
def compared() -> Compared:
    return Compared({name: best(seen)[0] for name, seen in SEEN.items()}, LABELS, replicates=20)


def test_terms_are_mutual_informations_and_add_up(compared: Compared) -> None:
    entropy = {name: best(seen)[1] for name, seen in SEEN.items()}
    nats = {term: v["nats"].value for term, v in compared.gain_report("x", "xh", "xs", "xhs").items()}
    expected = {
        "temporal": entropy["x"] - entropy["xh"],
        "cross": entropy["xh"] - entropy["xhs"],
        "residual": entropy["xs"] - entropy["xhs"],
        "total": entropy["x"] - entropy["xs"],
    }
    for term, value in expected.items():
        assert nats[term] == pytest.approx(value, abs=1e-7) and value > 0.001, term
    assert nats["total"] == pytest.approx(nats["temporal"] + nats["cross"] - nats["residual"], abs=1e-12)


def test_a_longer_sequence_says_no_less_and_a_compressor_no_more(compared: Compared) -> None:
    loss = {name: compared.metric(name, "logloss").value for name in SEEN}
    assert loss["x"] > loss["xs1"] > loss["xs"] > loss["xhs"]
    assert loss["compressed"] > loss["xs"]


def test_the_ratio_is_of_two_gains_and_needs_one() -> None:
    assert transfer_ratio(0.9725, 0.9627, 0.9725, 0.8523) == pytest.approx(0.0098 / 0.1202)
    with pytest.raises(ValueError, match="gained nothing"):
        transfer_ratio(0.9, 0.8, 0.85, 0.85)
    with pytest.raises(ValueError, match="NaN or infinity"):
        transfer_ratio(0.9, math.nan, 0.9, 0.8)


def test_a_ratio_has_an_interval_unless_the_gain_is_noise() -> None:
    torch.manual_seed(0)
    n = 6000
    truth, users = torch.randn(n), torch.arange(n) // 20
    labels = torch.bernoulli(torch.sigmoid(truth))
    logits = {"vm": 0.2 * truth, "after": 0.5 * truth, "fm": truth, "worse": -0.2 * truth}
    compared = Compared(logits, labels, users)
    ratio = compared.transfer_ratio("vm", "after", "fm")
    ne = {name: compared.metric(name, "ne").value for name in logits}
    assert ratio.value == pytest.approx((ne["vm"] - ne["after"]) / (ne["vm"] - ne["fm"]))
    assert 0.4 < ratio.low < ratio.value < ratio.high < 1
    assert compared.transfer_ratio("vm", "fm", "fm") == pytest.approx((1, 1, 1))
    for no_better in ("vm", "worse"):
        with pytest.raises(ValueError, match="within noise or a loss"):
            compared.transfer_ratio("vm", "after", no_better)
