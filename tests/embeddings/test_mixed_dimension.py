"""Mixed dimensions against the singular value decomposition, and blocks that come from training counts."""

# Shapes: R rows of a table, N ids, D width, W width of a block.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from fullrank.embeddings.mixed_dimension import MixedDimensionTable

Config = MixedDimensionTable.Config


def a_table(rows: int, width: int, config: Config, init_std: float = 1.0) -> tuple[MixedDimensionTable, list[Tensor]]:
    table = MixedDimensionTable(rows, width, init_std, config)
    return table, [torch.randn(part.rows, part.width) * part.init_std for part in table.parts]


def vectors(table: MixedDimensionTable, parts: list[Tensor], ids_N: Tensor) -> Tensor:
    asks = table.asks(ids_N)
    return table.combine(ids_N, asks, [parts[ask.part][ask.rows] for ask in asks]).detach()


@pytest.mark.parametrize(("dims", "shares"), [([3], []), ([8, 5, 1], [0.2, 0.3]), ([8], []), ([8, 6], [0.95])])
def test_from_a_table_no_other_blocks_of_these_ranks_are_nearer(dims: list[int], shares: list[float]) -> None:
    torch.manual_seed(0)
    whole_RD = torch.randn(60, 8, dtype=torch.float64) @ torch.diag(0.7 ** torch.arange(8, dtype=torch.float64))
    table, parts = MixedDimensionTable.from_table(whole_RD, dims, shares)
    table.double()
    blocks = torch.split(whole_RD, [part.rows for part in table.parts])
    best = sum(float(torch.linalg.svdvals(block)[dim:].square().sum()) for block, dim in zip(blocks, dims, strict=True))
    lost = (vectors(table, parts, torch.arange(60)) - whole_RD).square().sum()
    assert float(lost) == pytest.approx(best, rel=1e-5, abs=1e-10)


def test_a_table_of_low_rank_is_reproduced() -> None:
    torch.manual_seed(1)
    popular_MD, rare_MD = torch.randn(10, 6), torch.randn(40, 2) @ torch.randn(2, 6)
    table, parts = MixedDimensionTable.from_table(torch.cat([popular_MD, rare_MD]), [6, 2], [0.2])
    torch.testing.assert_close(vectors(table, parts, torch.arange(50)), torch.cat([popular_MD, rare_MD]))
    assert sum(part.numel() for part in parts) + 2 * 6 == sum(block.parameters for block in table.dimension_report())


def test_pooling_rows_and_then_projecting_is_projecting_and_then_pooling() -> None:
    torch.manual_seed(2)
    table, parts = a_table(50, 8, Config(dim=3))
    ids_N, offsets, weights_N = torch.randint(0, 50, (40,)), torch.tensor([0, 3, 3, 17]), torch.rand(40)
    pooled = F.embedding_bag(ids_N, parts[0], offsets, mode="sum", per_sample_weights=weights_N)
    projected = vectors(table, parts, ids_N) * weights_N[:, None]
    expected = torch.stack([part.sum(0) for part in torch.tensor_split(projected, offsets[1:])])
    torch.testing.assert_close(pooled @ table.projections["block0"], expected)
    assert not expected[1].any()


def test_full_width_is_a_plain_table() -> None:
    table, parts = a_table(20, 4, Config(dims=(4, 4), shares=(0.5,)))
    assert not list(table.parameters())
    assert torch.equal(vectors(table, parts, torch.arange(20)), torch.cat(parts))


def test_popularity_makes_blocks_of_equal_counts_and_their_widths() -> None:
    counts = np.r_[0, 0, (1000 / np.arange(1, 499) ** 1.2).astype(np.int64)]
    asked = Config(temperature=0.5, num_blocks=3)
    config = asked.fitted(counts)
    assert config.blocks is not None and config.fitted(counts[:100]) is config  # it is written down once
    assert sum(ids for ids, _ in config.blocks) == 500 and sum(count for _, count in config.blocks) == counts.sum()
    table, parts = a_table(500, 16, config)
    report = table.dimension_report()
    popularity = np.array([count / ids for ids, count in config.blocks])
    expected = np.rint(16 * (popularity / popularity.max()) ** 0.5).clip(1)
    assert [block.dim for block in report] == expected.tolist()
    assert [block.ids for block in report] == [ids for ids, _ in config.blocks]
    assert report[0].dim == 16 and not report[0].projected and report[-1].projected
    first = report[0].ids
    assert torch.equal(vectors(table, parts, torch.arange(first)), parts[0])
    stored = sum(part.numel() for part in parts) + sum(p.numel() for p in table.parameters())
    assert sum(block.parameters for block in report) == stored
    again = Config.model_validate(config.model_dump(mode="json"))
    assert again == config
    with pytest.raises(ValueError, match="blocks .* have 500 ids, and the table 501"):
        MixedDimensionTable(501, 16, 1.0, config)
    with pytest.raises(ValueError, match="come from the training counts"):
        MixedDimensionTable(500, 16, 1.0, asked)
    with pytest.raises(ValueError, match="no id was ever counted"):
        asked.fitted(np.zeros(5, np.int64))


def test_temperature_0_is_a_plain_table() -> None:
    table, _ = a_table(30, 8, Config(temperature=0, blocks=((10, 90), (20, 10))))
    assert [part.width for part in table.parts] == [8, 8] and not list(table.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dims": [4], "temperature": 0.3}, "dims and temperature each say how wide the blocks are"),
        ({"dim": 4, "dims": [4]}, "dim and dims each say"),
        ({"dims": [8, 4]}, "expected 1 shares for 2 dims"),
        ({"shares": [0.5]}, "expected 0 shares for 1 dims"),
        ({"temperature": 0.3, "shares": [0.5]}, "expected 0 shares"),
        ({"dims": [8, 4, 2], "shares": [0.5, 0.5]}, "whose sum is below 1"),
        ({"temperature": 1.2}, "less than or equal to 1"),
        ({"blocks": [[1, 1]]}, "there is none"),
        ({"dim": 0}, "greater than 0"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(values)
