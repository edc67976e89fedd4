"""Codes of content vectors, against k-means, against exact arithmetic and against finite differences."""

# Shapes: N items, L levels.

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from fullrank.embeddings.semantic_id import (
    RQVAE,
    ItemCodes,
    NotFittedError,
    Quantizer,
    RQKMeans,
    SemanticIDTokenizer,
    VersionMismatchError,
    code_churn,
    load_quantizer,
)
from fullrank.embeddings.semantic_id.rq_kmeans import k_means

SCHEMES: tuple[Any, ...] = ("prefix_ngram", "flat", "all_bigrams", "per_level")


def tuples(*sizes: int) -> Tensor:
    return torch.tensor(list(itertools.product(*(range(size) for size in sizes))))


def vectors(rows: int = 600, width: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, width, generator=generator)
    return centres[torch.arange(rows) % 40] + 0.3 * torch.randn(rows, width, generator=generator)


@pytest.fixture(scope="module")
def fitted() -> RQKMeans:
    return RQKMeans(3, 16).fit(vectors())


# Rows of tuples.


@pytest.mark.parametrize(("size", "levels"), [(2, 4), (3, 3), (4, 2)])
def test_prefixes_count_through_the_table_and_are_shared_by_those_who_have_them(size: int, levels: int) -> None:
    codes = tuples(*[size] * levels)
    tokenizer = SemanticIDTokenizer([size] * levels)
    rows = tokenizer(codes)
    assert sorted(set(rows.flatten().tolist())) == list(range(sum(size**level for level in range(1, levels + 1))))
    for level in range(levels):
        same_row = rows[:, None, level] == rows[None, :, level]
        same_prefix = (codes[:, None, : level + 1] == codes[None, :, : level + 1]).all(2)
        assert torch.equal(same_row, same_prefix)
        assert set(rows[:, level].tolist()) == set(tokenizer.layout()[level].rows)


def test_hash_mod_is_the_papers_formula_in_whole_numbers_of_any_size() -> None:
    size, levels, rows = 2048, 6, 50_000_017
    codes = torch.randint(0, size, (50, levels), generator=torch.Generator().manual_seed(0))
    codes[:, 0] = codes[:, 0] // 2 + size // 2  # so that the numbers of all are beyond 64 bits
    found = SemanticIDTokenizer([size] * levels, num_embeddings=rows, hash="mod")(codes)
    for line, expected in zip(codes.tolist(), found.tolist(), strict=True):
        closed = [sum(size ** (i - t) * (line[t - 1] + 1) for t in range(1, i + 1)) - 1 for i in range(1, levels + 1)]
        assert closed[-1] > 2**63 and [number % rows for number in closed] == expected


def test_the_other_schemes_are_the_papers_formulas() -> None:
    size = 5
    codes = tuples(size, size, size)
    c1, c2, c3 = codes.unbind(1)
    expected = {
        "flat": [size**2 * c1 + size * c2 + c3],
        "all_bigrams": [size * c1 + c2, size**2 + size * c2 + c3],
        "per_level": [c1, size + c2, 2 * size + c3],
    }
    for scheme, rows in expected.items():
        assert torch.equal(SemanticIDTokenizer([size] * 3, scheme)(codes), torch.stack(rows, 1))  # type: ignore[arg-type]


def test_codebooks_of_different_sizes() -> None:
    codes = tuples(2, 5, 3)
    for scheme in SCHEMES:
        tokenizer = SemanticIDTokenizer([2, 5, 3], scheme)
        rows = tokenizer(codes)
        assert set(rows.flatten().tolist()) == set(range(tokenizer.values))
        assert tokenizer.collision_factor(codes) == [1.0] * len(tokenizer)


def test_short_prefixes_stay_exact_and_long_ones_spread_over_the_rest() -> None:
    codes = tuples(8, 8, 8)
    tokenizer = SemanticIDTokenizer([8, 8, 8], num_embeddings=200)
    assert [part.exact for part in tokenizer.layout()] == [True, True, False]
    assert tokenizer.layout()[2].rows == range(72, 200)
    rows = tokenizer(codes)
    factor = tokenizer.collision_factor(codes)
    assert factor[:2] == [1.0, 1.0] and factor[2] == len(codes) / len(rows[:, 2].unique())
    assert int(rows[:, 2].min()) >= 72 and int(rows.max()) < 200
    # 512 values in 128 rows: a hash leaves about 128 e^-4 = 2 of them empty, and no row with many more than 4.
    assert len(rows[:, 2].unique()) > 115 and int(torch.bincount(rows[:, 2]).max()) < 14
    other = SemanticIDTokenizer([8, 8, 8], num_embeddings=200, seed=1)(codes)
    assert torch.equal(rows[:, :2], other[:, :2]) and not torch.equal(rows[:, 2], other[:, 2])


def test_a_modulus_that_divides_forgets_the_first_code_and_the_mix_does_not() -> None:
    first, second = torch.tensor([[0, 3, 5]]), torch.tensor([[1, 3, 5]])
    for hash_, forgets in (("mod", True), ("mix", False)):
        tokenizer = SemanticIDTokenizer([16, 16, 16], num_embeddings=256, hash=hash_)  # type: ignore[arg-type]
        assert (int(tokenizer(first)[0, 2]) == int(tokenizer(second)[0, 2])) == forgets


def test_missing_codes_have_no_rows() -> None:
    rows = SemanticIDTokenizer([4, 4])(torch.tensor([[-1, -1], [0, 0]]))
    assert rows.tolist() == [[-1, -1], [0, 4]]


def test_wrong_tuples_and_tables_are_refused() -> None:
    tokenizer = SemanticIDTokenizer([4, 4])
    for codes, message in (
        ([[0, 4]], "row 0 has 4 at level 2, expected 0 to 3, or -1"),
        ([[0, 1], [-2, 0]], "row 1 has -2 at level 1"),
        ([[0, -1]], r"row 0 has some codes and lacks others: \[0, -1\]"),
        ([[0, 1, 2]], r"shape \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer(torch.tensor(codes))
    with pytest.raises(ValueError, match="n is 3, expected 1 to 2: the codes have 2 levels"):
        SemanticIDTokenizer([4, 4], n=3)
    with pytest.raises(ValueError, match="num_embeddings is 3, and there are 4 first codes"):
        SemanticIDTokenizer([4, 4], num_embeddings=3)
    with pytest.raises(ValueError, match='scheme: expected one of prefix_ngram, .*, got "suffix"'):
        SemanticIDTokenizer([4, 4], "suffix")  # type: ignore[arg-type]


# Quantisers.


def test_one_level_is_k_means_and_every_further_one_leaves_less(fitted: RQKMeans) -> None:
    x = vectors()
    book, _ = k_means(x, 16, torch.Generator().manual_seed(0))
    assert torch.equal(RQKMeans(1, 16).fit(x).codebooks[0], book)
    report = fitted.report(x)
    assert report["rel_mse"] == sorted(report["rel_mse"], reverse=True) and report["rel_mse"][2] < 0.2
    # A k-means that has settled: every centroid is the mean of what is nearest to it.
    of = torch.cdist(x, book).argmin(1)
    means = torch.stack([x[of == code].mean(0) for code in range(16)])
    assert float((means - book).abs().max()) < 0.05


def test_k_means_is_lloyds_algorithm_in_a_loop() -> None:
    x = vectors(500)
    start, _ = k_means(x, 12, torch.Generator().manual_seed(1), iterations=0)
    found, inertia = k_means(x, 12, torch.Generator().manual_seed(1), iterations=5)
    points, centres = x.double().numpy(), start.double().numpy()
    for _ in range(5):
        distance = np.square(points[:, None] - centres).sum(2)
        of = distance.argmin(1)
        centres = np.stack([points[of == code].mean(0) for code in range(12)])
    np.testing.assert_allclose(found.numpy(), centres, atol=1e-5)
    assert inertia == pytest.approx(distance.min(1).sum(), rel=1e-5)


def test_as_many_codes_as_vectors_leave_nothing_and_repeated_vectors_do_no_harm() -> None:
    x = vectors(20)
    assert RQKMeans(1, 20).fit(x).report(x)["rel_mse"][0] < 1e-12
    repeated = x[:5].repeat(10, 1)
    report = RQKMeans(2, 8).fit(repeated).report(repeated)
    assert report["rel_mse"][0] < 1e-12 and report["usage"][0] == 5 / 8
    constant = torch.ones(30, 4)
    assert RQKMeans(2, 4).fit(constant).encode(constant).tolist() == [[0, 0]] * 30


def test_a_vector_has_the_same_codes_in_any_company(fitted: RQKMeans) -> None:
    x = vectors(5000, seed=3)
    codes = fitted.encode(x)
    assert torch.equal(codes, fitted.encode(x.numpy()))
    assert torch.equal(codes[:7], torch.cat([fitted.encode(x[row : row + 1]) for row in range(7)]))
    assert torch.equal(codes[100:4300], fitted.encode(x[100:4300]))
    assert torch.equal(fitted.codebooks[0], RQKMeans(3, 16).fit(vectors()).codebooks[0])


def test_a_tie_goes_to_the_first_code() -> None:
    quantizer = RQKMeans(1, 4)
    quantizer.restore({"codebooks.0": torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0], [-1.0, 0]])})
    assert quantizer.encode(torch.tensor([[2.0, 0], [0.0, 0], [0.5, 0.5]])).tolist() == [[0], [0], [0]]


def test_codes_come_back_from_what_they_stand_for(fitted: RQKMeans) -> None:
    level_1 = torch.arange(16)[:, None]
    assert torch.equal(fitted.encode(fitted.decode(level_1))[:, :1], level_1)


def test_content_that_is_missing_has_no_codes(fitted: RQKMeans) -> None:
    x = vectors(3)
    x[1] = torch.nan
    codes = fitted.encode(x)
    assert codes[1].tolist() == [-1, -1, -1] and int(codes[[0, 2]].min()) >= 0


def test_wrong_content_is_refused(fitted: RQKMeans) -> None:
    x = vectors(50)
    x[7, 2] = torch.inf
    for broken in (lambda: fitted.encode(x), lambda: RQKMeans(1, 4).fit(x)):
        with pytest.raises(ValueError, match="row 7 has a number that is not finite"):
            broken()
    with pytest.raises(ValueError, match="width 3, and the quantiser was fitted to 8"):
        fitted.encode(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="10 content vectors are too few for 16 codes a level: .* at most 10"):
        RQKMeans(2, 16).fit(vectors(10))
    with pytest.raises(TypeError, match="are torch.int64, expected floating-point"):
        fitted.encode(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(NotFittedError, match="this RQKMeans is not fitted"):
        RQKMeans(2, 4).encode(vectors(3))
    with pytest.raises(NotFittedError, match="this RQVAE is not fitted"):
        RQVAE(8).version  # noqa: B018


def small_vae(**options: Any) -> RQVAE:
    defaults: dict[str, Any] = {"latent_dim": 3, "hidden": (6,), "kmeans_init": False, "reseed": 0}
    return RQVAE(5, 3, 4, **{**defaults, **options}).double()


def test_gradients_of_the_loss_are_those_of_its_definition() -> None:
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vae = small_vae().eval()

    def loss() -> Tensor:
        """By the definition, with what is detached held at its value now."""
        z = vae.encoder(x)
        rest, fixed_rest, total, chosen = z, held["z"], z.new_zeros(()), []
        for book, fixed_book, code in zip(vae.books, held["books"], held["codes"], strict=True):
            total = total + 0.5 * (rest - fixed_book[code]).square().sum(1).mean()
            total = total + (fixed_rest - book[code]).square().sum(1).mean()
            rest, fixed_rest = rest - fixed_book[code], fixed_rest - fixed_book[code]
            chosen.append(fixed_book[code])
        found = vae.decoder(z + torch.stack(chosen).sum(0) - held["z"])
        return total + (x - found).square().sum(1).mean()

    held: dict[str, Any] = {"z": vae.encoder(x).detach(), "books": [book.detach().clone() for book in vae.books]}
    held["codes"], rest = [], held["z"].clone()
    for book in held["books"]:
        held["codes"].append(torch.cdist(rest, book).argmin(1))
        rest = rest - book[held["codes"][-1]]
    losses = vae.training_step(x)
    torch.testing.assert_close(losses.total, loss())
    losses.total.backward()
    step = 1e-6
    for parameter in vae.parameters():
        flat = parameter.data.view(-1)
        for place in range(0, len(flat), 7):
            values = []
            for sign in (1, -1):
                flat[place] += sign * step
                values.append(float(loss().detach()))
                flat[place] -= sign * step
            slope = (values[0] - values[1]) / (2 * step)
            assert float(parameter.grad.view(-1)[place]) == pytest.approx(slope, abs=1e-6)  # type: ignore[union-attr]
    rest = held["z"]
    for book, code in zip(vae.books, held["codes"], strict=True):
        members = torch.nn.functional.one_hot(code, 4).double()
        pull = 2 * (members.sum(0)[:, None] * book - members.T @ rest) / len(x)
        torch.testing.assert_close(book.grad, pull)
        rest = rest - book.detach()[code]


def test_the_encoder_hears_the_commitment_of_every_level() -> None:
    """It does not where residuals are those of straight-through outputs: they are 0 in z."""
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vae = small_vae().eval()
    z = vae.encoder(x)
    rest = z
    for book in vae.books:
        code = torch.cdist(rest.detach(), book.detach()).argmin(1)
        (gradient,) = torch.autograd.grad((rest - book[code].detach()).square().sum(), z, retain_graph=True)
        assert float(gradient.abs().mean()) > 0.1
        rest = rest - book[code].detach()
    without = small_vae(beta=0.0).eval().training_step(x)
    with_ = vae.training_step(x)
    assert float(without.commitment.detach()) == 0 and float(with_.commitment.detach()) > 0
    torch.testing.assert_close(without.total, with_.total - with_.commitment)


@pytest.mark.parametrize("options", [{}, {"ema": 0.95}, {"sinkhorn": True}], ids=["loss", "ema", "sinkhorn"])
def test_an_rq_vae_uses_its_codes_and_lowers_its_error(options: dict[str, Any], tmp_path: Path) -> None:
    x = vectors(1500, 8) * torch.arange(1, 9)
    vae = RQVAE(8, 2, 16, 6, (32,), **options)
    seen: list[float] = []
    vae.fit(
        x, steps=200, batch_size=256, progress=lambda step, steps, losses: seen.append(float(losses.reconstruction))
    )
    assert np.mean(seen[-20:]) < 0.6 * np.mean(seen[:20])
    report = vae.report(x)
    assert min(report["usage"]) >= 0.8 and report["rel_mse"][1] < report["rel_mse"][0] < 1
    vae.save(tmp_path)
    assert torch.equal(load_quantizer(tmp_path).encode(x), vae.encode(x))


def test_codes_without_use_move_to_where_vectors_are() -> None:
    x = vectors(800, 8)
    used = {}
    for reseed in (0, 20):
        vae = RQVAE(8, 1, 64, 6, (32,), kmeans_init=False, reseed=reseed)
        vae.fit(x, steps=300, batch_size=128, learning_rate=0.0)  # nothing moves but codes without use
        used[reseed] = vae.report(x)["usage"][0]
    assert used[0] < 0.4 and used[20] > used[0] + 0.2


# Versions, files, and codes that change.


def test_a_quantiser_comes_back_from_its_files_and_a_damaged_one_does_not(fitted: RQKMeans, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    again = load_quantizer(tmp_path)
    assert again.version == fitted.version and torch.equal(again.encode(vectors()), fitted.encode(vectors()))
    RQKMeans(3, 16, seed=1).fit(vectors()).save(tmp_path / "other")
    (tmp_path / "quantizer.safetensors").write_bytes((tmp_path / "other" / "quantizer.safetensors").read_bytes())
    with pytest.raises(VersionMismatchError, match="quantizer.safetensors is of version"):
        load_quantizer(tmp_path)
    (tmp_path / "quantizer.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged"):
        load_quantizer(tmp_path)
    with pytest.raises(ValueError, match="holds no quantiser"):
        load_quantizer(tmp_path / "nowhere")


def test_codes_of_items_come_back_by_the_items_names(fitted: RQKMeans, tmp_path: Path) -> None:
    codes = ItemCodes.of(pl.Series("movie", [3.0, 1.0, 7.0]), fitted.encode(vectors(3)), fitted)
    codes.write(tmp_path / "codes.parquet")
    again = ItemCodes.read(tmp_path)
    assert again.header.version == fitted.version and again.values.to_list() == ["3", "1", "7"]
    found = again.of_values(pl.Series(["7", "2", "3"]))
    assert torch.equal(found[[0, 2]], codes.codes_IL[[2, 0]]) and found[1].tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match='column "movie" has "3" more than once'):
        ItemCodes.of(pl.Series("movie", [3, 3]), codes.codes_IL[:2], fitted)
    (tmp_path / "codes.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds no codes"):
        ItemCodes.read(tmp_path)


def shuffled(quantizer: Quantizer, seed: int) -> RQKMeans:
    """The same quantiser with its codes renamed and its centroids moved a little."""
    generator = torch.Generator().manual_seed(seed)
    found = RQKMeans(**quantizer.config)
    books = [book[torch.randperm(len(book), generator=generator)] for book in quantizer.codebooks]
    found.restore({f"codebooks.{level}": book + 1e-3 for level, book in enumerate(books)})
    return found


def test_codes_of_a_new_quantiser_are_renamed_to_the_old_ones_that_they_took_over(fitted: RQKMeans) -> None:
    x = vectors()
    old, new = fitted.encode(x), shuffled(fitted, 1)
    assert min(code_churn(old, new.encode(x))["level"]) > 0.5
    assert max(code_churn(old, new.encode(x), remap=True)["level"]) < 0.05
    aligned = new.aligned_to(fitted)
    churn = code_churn(old, aligned.encode(x))
    assert max(churn["level"]) < 0.05 and churn["prefix"] == sorted(churn["prefix"])
    assert aligned.continues == (fitted.version,) and aligned.version != fitted.version
    far = RQKMeans(3, 16).fit(vectors(seed=9) + 100)
    assert min(code_churn(old, far.aligned_to(fitted).encode(vectors(seed=9)))["prefix"][1:]) > 0.5
