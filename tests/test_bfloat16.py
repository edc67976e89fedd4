"""The number format against its definition, bit by bit, and PyTorch's own conversion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fullrank.bfloat16 import join_fp32, split_fp32, stochastic_round, to_bf16


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).long() & (
        0xFFFFFFFF if x.dtype == torch.float32 else 0xFFFF
    )


def numbers(patterns: Tensor) -> Tensor:
    """float32 of unsigned patterns."""
    return torch.where(patterns >= 1 << 31, patterns - (1 << 32), patterns).to(torch.int32).view(torch.float32)


@pytest.fixture(scope="module")
def interesting() -> Tensor:
    """All upper halves (signs, zeros, subnormals, infinities, NaNs) with lower ones around 0, the tie and the next."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return numbers(((torch.arange(1 << 16) << 16)[:, None] + low).flatten())


def test_nearest_is_the_definition_and_pytorchs(interesting: Tensor) -> None:
    rounded = to_bf16(interesting)
    assert torch.equal(rounded.isnan(), interesting.isnan())
    known = ~interesting.isnan()
    u = bits(interesting[known])
    assert torch.equal(bits(rounded[known]), (u + 0x7FFF + ((u >> 16) & 1)) >> 16)
    assert torch.equal(bits(rounded[known]), bits(interesting[known].bfloat16()))
    assert torch.equal(bits(to_bf16(rounded[known].float())), bits(rounded[known]))  # twice is once
    assert torch.equal(to_bf16(-interesting[known]), -rounded[known])
    rising = to_bf16(interesting[known].sort().values)
    assert bool((rising[1:] >= rising[:-1]).all())
    edge = to_bf16(torch.tensor([3.3961775e38, 3.396e38]))
    assert edge[0] == torch.inf and edge[1] == torch.finfo(torch.bfloat16).max


def test_truncation_is_the_upper_half(interesting: Tensor) -> None:
    cut = to_bf16(interesting, "trunc")
    assert torch.equal(cut.isnan(), interesting.isnan())
    known = ~interesting.isnan()
    assert torch.equal(bits(cut[known]), bits(interesting[known]) >> 16)


def test_errors_are_within_half_a_unit_and_a_unit() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-30, 30, 100_000)
    for rounding, bound in (("rne", 2.0**-8), ("trunc", 2.0**-7), ("sr", 2.0**-7)):
        error = ((to_bf16(x, rounding).double() - x.double()) / x.double()).abs()  # type: ignore[arg-type]
        assert bound / 2 < float(error.max()) <= bound


def test_stochastic_rounding_gives_a_neighbour_and_leaves_what_is_exact(interesting: Tensor) -> None:
    drawn = stochastic_round(interesting, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.isnan(), interesting.isnan())
    exact = (bits(interesting) & 0xFFFF == 0) & ~interesting.isnan()
    assert torch.equal(bits(drawn[exact]), bits(interesting[exact]) >> 16)
    finite = interesting.isfinite()
    assert bool(drawn[finite].isfinite().all())
    step = bits(drawn[finite]) - (bits(interesting[finite]) >> 16)
    assert set(step.tolist()) == {0, 1}
    assert torch.equal(bits(drawn[interesting.isinf()]), bits(interesting[interesting.isinf()]) >> 16)


def test_stochastic_rounding_has_the_right_mean_and_independent_draws() -> None:
    count, fraction = 400_000, 0.3
    x = torch.full((count,), 1 + fraction * 2.0**-7)
    drawn = stochastic_round(x, torch.Generator().manual_seed(1))
    up = (drawn > 1).double()
    error = (fraction * (1 - fraction) / count) ** 0.5
    assert abs(float(up.mean()) - fraction) < 4 * error
    for lag in (1, 2, 3, 4):
        left, right = up[:-lag] - up.mean(), up[lag:] - up.mean()
        assert abs(float((left * right).mean() / up.var())) < 4 / count**0.5
    assert torch.equal(drawn, stochastic_round(x, torch.Generator().manual_seed(1)))
    assert not torch.equal(drawn, stochastic_round(x, torch.Generator().manual_seed(2)))


def test_halves_of_ulp_are_lost_kept_on_average_or_kept() -> None:
    """A thousand steps of 1/1000 down from 1; below 1 a unit is 2^-8, so that a step is a quarter of one."""
    generator = torch.Generator().manual_seed(0)
    nearest, drawn = torch.ones(1).bfloat16(), torch.ones(10_000).bfloat16()
    high, low = split_fp32(torch.ones(1), "nearest")
    for _ in range(1000):
        nearest = to_bf16(nearest.float() - 1e-3)
        drawn = stochastic_round(drawn.float() - 1e-3, generator)
        high, low = split_fp32(join_fp32(high, low, "nearest") - 1e-3, "nearest")
    assert float(nearest) == 1.0
    assert abs(float(drawn.float().mean())) < 2e-3 and 0.02 < float(drawn.float().std()) < 0.06
    assert abs(float(join_fp32(high, low, "nearest"))) < 1e-4


@pytest.mark.parametrize("rounding", ["trunc", "nearest"])
def test_two_planes_hold_every_bit(rounding: str, interesting: Tensor) -> None:
    random = torch.randint(0, 1 << 32, (1 << 20,), generator=torch.Generator().manual_seed(0))
    for x in (interesting, numbers(random)):
        high, low = split_fp32(x, rounding)  # type: ignore[arg-type]
        assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
        assert high.nbytes + low.nbytes == x.nbytes
        assert torch.equal(bits(join_fp32(high, low, rounding)), bits(x))  # type: ignore[arg-type]
        known = x.isfinite()
        if rounding == "trunc":
            assert torch.equal(bits(high[known]), bits(x[known]) >> 16)
        else:  # to nearest, ties away from zero
            tie = (bits(x) & 0xFFFF) == 0x8000
            assert torch.equal(bits(high[known & ~tie]), bits(x[known & ~tie].bfloat16()))
            assert torch.equal(bits(high[known & tie]), (bits(x[known & tie]) >> 16) + 1)
    assert bool(split_fp32(torch.tensor([torch.nan, -torch.nan]), rounding)[0].isnan().all())  # type: ignore[arg-type]


def test_shapes_stay_and_other_types_are_refused() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).t()
    for rounding in ("rne", "trunc", "sr"):
        assert torch.allclose(to_bf16(x, rounding).float(), x, rtol=2**-7)  # type: ignore[arg-type]
        assert to_bf16(torch.zeros(0, 5), rounding).shape == (0, 5)  # type: ignore[arg-type]
    for wrong in (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64), torch.zeros(2).double()):
        with pytest.raises(ValueError, match="expected float32 to round to bfloat16, got"):
            to_bf16(wrong)
    with pytest.raises(ValueError, match="choose one of rne, trunc, sr"):
        to_bf16(torch.zeros(2), "up")  # type: ignore[arg-type]
