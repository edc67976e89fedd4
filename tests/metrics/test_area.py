"""Facts about AUC and GAUC, against scikit-learn, exact arithmetic and a loop over users."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fullrank.metrics import auc, gauc

# Equal, next to each other in float32, beyond the exponents that sums survive, and both zeros.
SCORES = [0.0, -0.0, 1.0, 1.0 + 2**-23, -1.0, -1.0 - 2**-23, 1e-45, -1e-45, 3.4e38, -3.4e38, 0.1, 88.0, -88.0]
LABELS = [0.0, 1.0, 0.25]
WEIGHTS = [0.0, 1.0, 2.0, 0.3, 1e-200, 1e200]


def _rows(labels: list[float], weights: list[float]) -> st.SearchStrategy[list[tuple[float, float, float, int]]]:
    row = st.tuples(st.sampled_from(SCORES), st.sampled_from(labels), st.sampled_from(weights), st.integers(0, 3))
    return st.lists(row, min_size=1, max_size=25).filter(lambda rows: any(w for _, _, w, _ in rows))


def _columns(rows: list[tuple[float, float, float, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s, y, w, g = zip(*rows, strict=True)
    return torch.tensor(s), torch.tensor(y), torch.tensor(w, dtype=torch.float64), torch.tensor(g)


def _exact(rows: list[tuple[float, float, float, int]]) -> tuple[float, Fraction, Fraction]:
    """AUC by all pairs in rational numbers, and the weights of all rows and of the positive ones."""
    won = pairs = Fraction(0)
    for s, y, w, _ in rows:
        for t, x, v, _ in rows:
            pair = Fraction(w) * Fraction(y) * Fraction(v) * (1 - Fraction(x))
            pairs += pair
            won += pair * (Fraction(1) if s > t else Fraction(1, 2) if s == t else 0)
    mass = sum((Fraction(w) for _, _, w, _ in rows), Fraction(0))
    positive = sum((Fraction(w) * Fraction(y) for _, y, w, _ in rows), Fraction(0))
    return (float(won / pairs) if pairs else math.nan), mass, positive


def _data(n: int, seed: int, ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, generator=generator) * 2
    if ties:
        logits = (logits * 2).round() / 2
    labels = (torch.rand(n, generator=generator) < torch.sigmoid(logits)).float()
    return logits, labels, torch.rand(n, generator=generator)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_auc_equals_scikit_learn(seed: int, ties: bool) -> None:
    logits, labels, weights = _data(997, seed, ties)
    for weight in (None, weights):
        expected = roc_auc_score(labels, logits, sample_weight=weight)
        assert auc(logits, labels, weight) == pytest.approx(expected, abs=1e-13)
        assert auc(logits.double(), labels, weight) == pytest.approx(expected, abs=1e-13)


@pytest.mark.filterwarnings("ignore:AUC is undefined")
@given(_rows(LABELS, WEIGHTS))
def test_auc_is_the_share_of_pairs_in_exact_arithmetic(rows: list[tuple[float, float, float, int]]) -> None:
    s, y, w, _ = _columns(rows)
    # What float32 makes of the scores is what is ranked.
    exact = _exact([(float(a), b, c, d) for a, (_, b, c, d) in zip(s, rows, strict=True)])[0]
    assert auc(s, y, w) == pytest.approx(exact, rel=1e-12, nan_ok=True)


@pytest.mark.filterwarnings("ignore:AUC is undefined")
@given(_rows([0.0, 1.0], [1.0]))
def test_unweighted_rows_of_two_classes_take_another_path_to_the_same_value(
    rows: list[tuple[float, float, float, int]],
) -> None:
    s, y, w, _ = _columns(rows)
    exact = _exact([(float(a), b, c, d) for a, (_, b, c, d) in zip(s, rows, strict=True)])[0]
    assert auc(s, y) == pytest.approx(exact, rel=1e-14, nan_ok=True)
    assert auc(s, y, w) == pytest.approx(exact, rel=1e-14, nan_ok=True)
    assert auc(s, y.long()) == pytest.approx(exact, rel=1e-14, nan_ok=True)


@pytest.mark.filterwarnings("ignore:AUC is undefined")
@given(
    st.lists(st.tuples(st.integers(-40, 40), st.sampled_from([0.0, 1.0])), min_size=1, max_size=50),
    st.randoms(use_true_random=False),
)
def test_order_of_rows_increasing_transforms_and_types_change_nothing(
    rows: list[tuple[int, float]], random: object
) -> None:
    s, y = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    expected = pytest.approx(auc(s, y), abs=0, nan_ok=True)
    for scores in (s.half(), s.bfloat16(), s.float() ** 3, (s.double() / 8).exp(), s.float() * 1e36, s + (1 << 60)):
        assert auc(scores, y) == expected
    random.shuffle(order := list(range(len(rows))))  # type: ignore[attr-defined]
    assert auc(s[order].float(), y[order]) == expected
    # Turned round, every pair is won by the other side.
    assert auc(-s, y) == pytest.approx(1 - auc(s, y), abs=1e-15, nan_ok=True)
    assert auc(s, 1 - y) == pytest.approx(1 - auc(s, y), abs=1e-15, nan_ok=True)


def test_neighbouring_doubles_are_told_apart_and_integers_beyond_float32_too() -> None:
    labels = torch.tensor([0.0, 1.0])
    for scores in (torch.tensor([1.0, 1.0 + 2**-52], dtype=torch.float64), torch.tensor([1 << 40, (1 << 40) + 1])):
        assert auc(scores, labels) == 1.0
        assert auc(scores.float(), labels) == 0.5


def test_a_soft_label_is_a_row_split_in_two() -> None:
    logits, _, weights = _data(300, 4, True)
    soft = torch.rand(300, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mass = torch.cat([weights * soft, weights * (1 - soft)])
    split = roc_auc_score([1] * 300 + [0] * 300, torch.cat([logits, logits]), sample_weight=mass)
    assert auc(logits, soft, weights) == pytest.approx(split, abs=1e-13)


def test_undefined_values_are_nan_with_a_warning() -> None:
    for scores, labels in ((torch.zeros(1), torch.ones(1)), (torch.randn(5), torch.zeros(5))):
        with pytest.warns(UserWarning, match="one class is absent"):
            assert math.isnan(auc(scores, labels))
        with pytest.warns(UserWarning, match="no group has both classes"):
            result = gauc(scores, labels, torch.zeros(len(labels), dtype=torch.int64))
        assert math.isnan(result.value) and result[1:] == (0, 1)
    with pytest.warns(UserWarning, match="no group has both classes"):
        assert gauc(torch.zeros(4), torch.tensor([0.0, 0, 1, 1]), torch.tensor([1, 1, 2, 2])).groups == 2
    # All positive rows weigh nothing.
    with pytest.warns(UserWarning, match="one class is absent"):
        assert math.isnan(auc(torch.randn(2), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])))


@pytest.mark.parametrize("weighting", ["impressions", "clicks", "uniform"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gauc_equals_a_loop_over_users(weighting: str, weighted: bool) -> None:
    logits, labels, weights = _data(2000, 1, True)
    users = torch.randint(0, 150, (2000,), generator=torch.Generator().manual_seed(2))
    users[users < 5] = 0
    labels[users == 7] = 1.0
    users[0], labels[0] = 1000, 1.0
    w = weights if weighted else torch.ones(2000)
    total, mass, used = 0.0, 0.0, 0
    for user in users.unique():
        rows = users == user
        if labels[rows].min() == labels[rows].max():
            continue
        clicks = float((w * labels)[rows].sum())
        weight = {"impressions": float(w[rows].sum()), "clicks": clicks, "uniform": 1.0}[weighting]
        total += weight * roc_auc_score(labels[rows], logits[rows], sample_weight=w[rows])
        mass += weight
        used += 1
    result = gauc(logits, labels, users, weights if weighted else None, weighting=weighting)  # type: ignore[arg-type]
    assert result.value == pytest.approx(total / mass, abs=1e-7 if weighted else 1e-13)
    assert (result.groups_used, result.groups) == (used, users.unique().numel())
    assert used < result.groups


@pytest.mark.filterwarnings("ignore:GAUC is undefined")
@given(_rows(LABELS, WEIGHTS), st.sampled_from(["impressions", "clicks", "uniform"]))
def test_gauc_is_the_mean_of_exact_aucs_however_unequal_the_weights(
    rows: list[tuple[float, float, float, int]], weighting: str
) -> None:
    s, y, w, g = _columns(rows)
    exact = [(float(a), b, c, d) for a, (_, b, c, d) in zip(s, rows, strict=True)]
    parts = [_exact([row for row in exact if row[3] == group]) for group in sorted({d for *_, d in rows})]
    used = [(Fraction(a), m, p) for a, m, p in parts if not math.isnan(a)]
    shares = [{"impressions": m, "clicks": p, "uniform": Fraction(1)}[weighting] for _, m, p in used]
    expected = math.nan
    if used:
        expected = float(sum(a * share for (a, _, _), share in zip(used, shares, strict=True)) / sum(shares))
    result = gauc(s, y, g, w, weighting=weighting)  # type: ignore[arg-type]
    assert result.value == pytest.approx(expected, rel=1e-11, abs=1e-13, nan_ok=True)
    assert (result.groups_used, result.groups) == (len(used), len(parts))


def test_one_group_is_auc_and_names_of_groups_do_not_matter() -> None:
    logits, labels, weights = _data(500, 6, True)
    one = torch.full((500,), -7)
    assert gauc(logits, labels, one).value == auc(logits, labels)
    assert gauc(logits, labels, one, weights).value == pytest.approx(auc(logits, labels, weights), abs=1e-14)
    users = torch.randint(0, 30, (500,), generator=torch.Generator().manual_seed(7))
    expected = gauc(logits, labels, users)
    hashes = torch.randint(-(1 << 63), (1 << 63) - 1, (30,), generator=torch.Generator().manual_seed(8))
    for names in (users.to(torch.uint8), users + (1 << 40), users - 15, users.int() + (1 << 30)):
        assert gauc(logits, labels, names) == expected
    # Random names permute the groups: the same mean up to the order of its sum.
    assert gauc(logits, labels, hashes[users]).value == pytest.approx(expected.value, abs=1e-14)


def test_a_score_that_is_constant_inside_users_has_gauc_one_half_whatever_its_auc() -> None:
    users = torch.arange(400) % 20
    labels = (torch.rand(400, generator=torch.Generator().manual_seed(9)) < (users + 1) / 22).float()
    popularity = users.float()
    assert auc(popularity, labels) > 0.7
    assert gauc(popularity, labels, users).value == 0.5
    # A shift of a user's scores moves AUC, not GAUC.
    noise = torch.randn(400, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    assert gauc(noise, labels, users) == gauc(noise + 64 * popularity, labels, users)


@pytest.mark.parametrize(
    ("groups", "message"),
    [(torch.zeros(3, dtype=torch.int64), r"groups have shape \(3,\)"), (torch.zeros(2), "groups must be integers")],
)
def test_wrong_groups_are_refused(groups: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gauc(torch.zeros(2), torch.tensor([0.0, 1.0]), groups)


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(ValueError, match='"rows", expected one of impressions, clicks, uniform'):
        gauc(torch.zeros(2), torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.int64), weighting="rows")  # type: ignore[arg-type]
