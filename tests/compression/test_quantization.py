"""Facts about tables in fewer bits, against PyTorch's and FBGEMM's operators and plain loops."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fullrank.compression import CodebookTable, QuantizedTable, quantize_table
from fullrank.compression.packing import fbgemm_pack, pack_here
from fullrank.compression.quantization import RANGE_METHODS, Method
from fullrank.compression.ranges import RANGES, Search
from fullrank.embeddings.packed import Packing

# Two ranges on this row's way cost the same if the errors are summed in another order than PyTorch's.
TIE = torch.frombuffer(
    bytearray.fromhex(
        "556b153c3266bebbe0aa72bb0e81b5bb8778d3bbd632acbc82ea693bf3823cbca646b9b992efc3bba2f0d93b8c5565bb"
        "89c7eb3b0cd2763c24ce423ccd8db8bbdd9ac1bc60c9283b603bf6ba56980e3c80adfb3be7cc9d3c5cdc45bc00443d3c"
        "3407c33b5e648e3b19ea18bc152f42bbb9c8c43c9c03183c9e2d98b9ef4ad93c1720523c"
    ),
    dtype=torch.float32,
)[None]
GOLDEN = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0]])


def rows(width: int, count: int = 500, seed: int = 0, *, heavy: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed + width)
    weight_RD = torch.randn(count, width, generator=generator)
    return weight_RD / torch.rand(count, 1, generator=generator) * 0.01 if heavy else weight_RD


def packed(weight_RD: Tensor, *arguments: Any, **options: Any) -> QuantizedTable:
    table = quantize_table(weight_RD, *arguments, **options)
    assert isinstance(table, QuantizedTable)
    return table


def losses(weight_RD: Tensor, method: Method, bits: Any = 4, **options: Any) -> Tensor:
    table = quantize_table(weight_RD, bits, method, **options)
    return (table.dequantize() - weight_RD).double().square().sum(1)


@pytest.mark.parametrize(("method", "row"), [("minmax", "306598fa663200bc"), ("greedy", "206597fa4e32a4bb")])
def test_the_bytes_of_a_row_are_known(method: Method, row: str) -> None:
    assert packed(GOLDEN, method=method).packed.numpy().tobytes().hex() == row


@pytest.mark.parametrize(("width", "plain", "searched"), [(32, 0.00209103, 0.00186306), (64, 0.00242887, 0.00202741)])
def test_the_error_of_a_known_row_is_known(width: int, plain: float, searched: float) -> None:
    j = torch.arange(width, dtype=torch.float64)
    row = ((1.7 * j).sin() + 0.3 * (0.9 * j).cos() + 0.002 * j).float()[None]
    assert float(losses(row, "minmax")) / width == pytest.approx(plain, rel=1e-5)
    assert float(losses(row, "greedy")) / width == pytest.approx(searched, rel=1e-5)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("width", [2, 6, 16, 64, 128])
def test_the_bytes_are_those_of_pytorch(width: int, heavy: bool) -> None:
    weight_RD = rows(width, 2000, heavy=heavy)
    prepack = torch.ops.quantized.embedding_bag_4bit_prepack
    assert packed(weight_RD, method="minmax").packed.equal(prepack(weight_RD, False, 200, 0.16))
    assert packed(weight_RD).packed.equal(prepack(weight_RD, True, 200, 0.16))
    other = packed(weight_RD, nbins=50, ratio=0.3).packed
    assert other.equal(prepack(weight_RD, True, 50, 0.3))
    if width % 4 == 0:
        assert packed(weight_RD, 2, "minmax").packed.equal(torch.ops.quantized.embedding_bag_2bit_prepack(weight_RD))


@pytest.mark.parametrize("width", [1, 16, 33, 128])
def test_the_compiled_search_finds_the_same_ranges(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    weight_RD = torch.cat([rows(width), rows(width, heavy=True), torch.ones(3, width)])
    for bits in (2, 4, 8):
        plain = packed(weight_RD, bits)
        monkeypatch.setattr("fullrank.compression.greedy.WORTH_NUMBA", 0)
        monkeypatch.setattr("fullrank.compression.greedy._fast_loss", None)
        assert packed(weight_RD, bits).packed.equal(plain.packed)
        monkeypatch.undo()


def test_where_both_ends_cost_the_same_nearly_all_rows_are_decided_as_pytorch_decides() -> None:
    """Every row is symmetric: the losses to choose between differ by rounding alone."""
    half_RD = rows(8, 2000)
    weight_RD = torch.cat([half_RD, -half_RD], 1)
    ours, theirs = packed(weight_RD).packed, torch.ops.quantized.embedding_bag_4bit_prepack(weight_RD, True, 200, 0.16)
    assert (ours != theirs).any(1).float().mean() < 0.005


def test_a_tie_of_the_fast_pass_is_searched_again() -> None:
    low_R, high_R = RANGES["greedy"](TIE, Packing(33, 2), Search())
    assert (float(low_R), float(high_R)) == pytest.approx((-0.0204, 0.0230), abs=5e-5)


def test_a_step_that_rounding_loses_ends_the_search() -> None:
    """PyTorch's own never ends on this row."""
    row = torch.tensor([[1.0, 1.0 + 4 * 2**-23]])
    assert packed(row).dequantize().sub(row).abs().max() < 1e-6


@pytest.mark.parametrize("bits", [2, 4])
def test_the_bytes_are_those_of_fbgemm_and_its_kernels_read_them(bits: Any) -> None:
    pytest.importorskip("fbgemm_gpu")
    weight_RD, packing = rows(16, 300), Packing(16, bits)
    low_R, high_R = RANGES["greedy"](weight_RD, packing, Search())
    ours = pack_here(weight_RD, packing, low_R, high_R)
    pack = fbgemm_pack()
    assert pack is not None and ours.equal(pack(weight_RD, bits, torch.stack([low_R, high_R], 1)))
    read = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(ours, bits)
    torch.testing.assert_close(packing.unpack(ours), read, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alignment", [1, 16])
def test_tables_are_served_by_the_table_batched_kernel(alignment: int) -> None:
    pytest.importorskip("fbgemm_gpu")
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    table = packed(rows(16, 50))
    kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t", 50, 16, SparseType.INT4, EmbeddingLocation.HOST)],
        device="cpu",
        row_alignment=alignment,
        output_dtype=SparseType.FP32,
    )
    kernel.initialize_weights()
    kernel.split_embedding_weights(split_scale_shifts=False)[0][0].copy_(table.to_tbe(alignment))
    found = kernel(torch.arange(50).int(), torch.arange(51).int())
    torch.testing.assert_close(found, table.dequantize(), rtol=0, atol=1e-6)


def test_each_search_loses_no_more_than_what_it_starts_from() -> None:
    for width in (8, 33, 64):
        weight_RD = rows(width)
        plain_R, greedy_R, fitted_R = (losses(weight_RD, m) for m in ("minmax", "greedy", "least_squares"))
        slack = 1 + 1e-5
        assert bool((greedy_R <= plain_R * slack).all()) and bool((fitted_R <= greedy_R * slack).all())
        assert bool((losses(weight_RD, "least_squares", starts=16) <= fitted_R * slack).all())
        assert bool((losses(weight_RD, "golden_section") <= losses(weight_RD, "symmetric") * slack).all())
        totals = [float(losses(weight_RD, method).sum()) for method in ("least_squares", "greedy", "minmax", "table")]
        assert (
            totals == sorted(totals) and totals[0] < 0.995 * totals[1] and totals[1] < 0.9 * totals[2] < 0.5 * totals[3]
        )


def test_all_pairs_of_bins_are_no_worse_than_the_pairs_on_a_way() -> None:
    weight_RD = rows(16, 300)
    brute, way = (float(losses(weight_RD, m).sum()) for m in ("histogram_brute", "histogram_approximate"))
    assert brute < 1.01 * way < 0.9 * float(losses(weight_RD, "minmax").sum())


def test_all_pairs_of_bins_find_the_best_range_of_a_row_with_an_outlier() -> None:
    row = torch.cat([torch.linspace(0, 1, 2000), torch.tensor([1.6])])[None]
    best = min(
        float((row - row.clamp(0, high).mul(15 / high).round().mul(high / 15)).square().sum())
        for high in torch.linspace(0.5, 1.6, 300).tolist()
    )
    assert float(losses(row, "histogram_brute")) < 1.05 * best < 0.8 * float(losses(row, "minmax"))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_error_is_half_a_step_at_most(bits: Any) -> None:
    weight_RD = rows(32)
    table = packed(weight_RD, bits, "minmax")
    _, scale_R, bias_R = table.packing.split(table.packed)
    rounding_R = 2**-10 * (bias_R.abs() + scale_R * table.packing.levels)
    assert bool(((table.dequantize() - weight_RD).abs() <= (scale_R / 2 + rounding_R)[:, None]).all())


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_constant_rows_are_kept(method: Method) -> None:
    weight_RD = torch.tensor([0.0, 1.5, -2.0, 2**-20, 1e-30])[:, None].expand(5, 6).contiguous()
    if method == "table":
        weight_RD = weight_RD[:1]
    if method in ("symmetric", "golden_section"):
        weight_RD = weight_RD[[0]]
    assert packed(weight_RD, method=method).dequantize().sub(weight_RD).abs().max() <= 1e-7


@pytest.mark.parametrize("method", ["minmax", "greedy", "least_squares", "symmetric", "golden_section"])
def test_codes_do_not_change_when_all_is_doubled(method: Method) -> None:
    weight_RD = rows(12)
    codes, doubled = (packed(weight, method=method).packed[:, :6] for weight in (weight_RD, 8 * weight_RD))
    assert codes.equal(doubled)


@pytest.mark.parametrize("scale_dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [1, 7, 8, 72])
def test_a_row_has_the_bytes_that_the_formula_says(width: int, bits: Any, scale_dtype: Any) -> None:
    table = packed(rows(width, 10), bits, scale_dtype=scale_dtype)
    assert table.nbytes == 10 * (-(-width * bits // 8) + (4 if scale_dtype == "fp16" else 8))
    assert table.dequantize().shape == (10, width)
    if width == 72 and bits == 4 and scale_dtype == "fp16":
        assert round(table.nbytes / (10 * 4 * 72), 4) == 0.1389
    if width == 7 and bits == 4:
        assert int(table.packed[:, 3].max()) <= 15  # nothing in the last half byte


def test_eight_bits_lose_a_seventeenth_of_four() -> None:
    weight_RD = rows(64)
    ratio = packed(weight_RD, 8, "minmax", scale_dtype="fp32").normalized_l2(weight_RD) / packed(
        weight_RD, 4, "minmax"
    ).normalized_l2(weight_RD)
    assert ratio == pytest.approx(1 / 17, rel=0.02)


def test_sixteen_different_numbers_are_a_codebook() -> None:
    generator = torch.Generator().manual_seed(0)
    values_R16 = torch.randn(40, 16, generator=generator).half().float()
    weight_RD = values_R16.gather(1, torch.randint(0, 16, (40, 48), generator=generator))
    table = quantize_table(weight_RD, method="row_codebook")
    assert isinstance(table, CodebookTable)
    assert table.dequantize().equal(weight_RD) and table.nbytes == 40 * (24 + 32)


def test_groups_of_equal_rows_are_a_codebook_each() -> None:
    values_K4 = torch.tensor([[-1.0, 0.0, 0.5, 1.0], [5.0, 6.0, 7.0, 9.0], [-90.0, -8.0, 40.0, 70.0]])
    pick_RD = torch.arange(96 * 8).view(96, 8) % 4
    weight_RD = values_K4.repeat(32, 1).gather(1, pick_RD)
    table = quantize_table(weight_RD, method="two_tier_codebook")
    assert isinstance(table, CodebookTable)
    assert table.dequantize().equal(weight_RD) and table.dequantize(torch.tensor([5, 1])).equal(weight_RD[[5, 1]])
    assert table.nbytes == 96 * (4 + 2) + 6 * 32


@pytest.mark.parametrize("width", [16, 7])
def test_bags_are_sums_or_means_of_the_rows(width: int) -> None:
    table = packed(rows(width, 30))
    ids_N, offsets_B = torch.tensor([3, 3, 29, 0, 7]), torch.tensor([0, 2, 2, 4])
    weights_N = torch.tensor([0.5, 2.0, 1.0, -1.0, 3.0])
    for mode in ("sum", "mean"):
        expected = torch.nn.functional.embedding_bag(ids_N, table.dequantize(), offsets_B, mode=mode)
        torch.testing.assert_close(table.pool(ids_N, offsets_B, mode=mode), expected, rtol=1e-5, atol=1e-6)
    weighted = torch.nn.functional.embedding_bag(
        ids_N, table.dequantize(), offsets_B, mode="sum", per_sample_weights=weights_N
    )
    torch.testing.assert_close(table.pool(ids_N, offsets_B, weights_N), weighted, rtol=1e-5, atol=1e-6)
    assert table.pool(ids_N[:0], torch.tensor([0, 0])).equal(torch.zeros(2, width))


def test_numbers_beyond_fp16_fit_a_wider_scale() -> None:
    weight_RD = torch.tensor([[1.0, 2.0], [1e6, -1e6]])
    with pytest.raises(ValueError, match=r'users: row 1 has 1e\+06, beyond the 65504 of fp16.*scale_dtype="fp32"'):
        quantize_table(weight_RD, name="users")
    assert packed(weight_RD, scale_dtype="fp32").normalized_l2(weight_RD) < 1e-6


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.tensor([[1.0, 2.0], [1.0, torch.nan]]), {}, "users: row 1 has a NaN or infinite number"),
        (torch.tensor([[-torch.inf, 2.0]]), {}, "users: row 0 has a NaN or infinite number"),
        (torch.zeros(0, 4), {}, r"users: expected rows and columns, got shape \(0, 4\)"),
        (torch.zeros(4), {}, r"users: expected rows and columns, got shape \(4,\)"),
        (torch.zeros(2, 4, dtype=torch.int64), {}, "users: expected floating-point numbers, got torch.int64"),
        (GOLDEN, {"bits": 3}, "bits is 3, expected 2, 4 or 8"),
        (GOLDEN, {"ratio": 1.0}, "ratio is 1.0, expected a share between 0 and 1"),
        (GOLDEN, {"nbins": 1}, "nbins is 1, expected at least 2"),
        (GOLDEN, {"method": "best"}, "method is 'best', expected one of minmax, "),
        (GOLDEN, {"scale_dtype": "bf16"}, "scale_dtype is 'bf16', expected one of fp16, fp32"),
        (GOLDEN, {"bits": 8, "method": "row_codebook"}, "a codebook of 8 bits is larger"),
    ],
)
def test_what_cannot_be_quantised_is_refused(weight: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_table(weight, name="users", **options)


def test_the_weights_stay_as_they_are() -> None:
    weight_RD = rows(8, 20)
    before = weight_RD.clone()
    for method in get_args(Method):
        quantize_table(weight_RD, 4, method)
    assert weight_RD.equal(before)
