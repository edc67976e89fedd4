from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fullrank.embeddings.padding import Padding
from fullrank.layers.encoder import EncoderLayer, LengthGroups

LENGTHS = torch.tensor([3, 0, 5, 1])
WIDTH, HEADS, INNER = 6, 2, 9


def layer() -> EncoderLayer:
    torch.manual_seed(0)
    made = EncoderLayer(WIDTH, HEADS, INNER, nn.ReLU()).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def grouped(lengths: Tensor, groups: int) -> LengthGroups:
    rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    slots = torch.cat([torch.arange(length) for length in lengths.tolist()])
    return LengthGroups.of(lengths, rows, slots, groups=groups)


def encode(layer: EncoderLayer, tokens: Tensor, lengths: Tensor, groups: int = 1) -> Tensor:
    made = grouped(lengths, groups)
    output: Tensor = layer(tokens[made.order_E], made)[made.place_E]
    return output


def test_each_row_equals_pytorchs_layer() -> None:
    ours = layer()
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dropout=0.0, batch_first=True, dtype=torch.float64)
    pairs = {
        "self_attn.in_proj_": ours.query_key_value,
        "self_attn.out_proj.": ours.out,
        "linear1.": ours.inner,
        "linear2.": ours.outer,
        "norm1.": ours.attention_norm,
        "norm2.": ours.norm,
    }
    theirs.load_state_dict({f"{k}{part}": getattr(v, part) for k, v in pairs.items() for part in ("weight", "bias")})
    tokens = torch.randn(int(LENGTHS.sum()), WIDTH, dtype=torch.float64)
    output = encode(ours, tokens, LENGTHS)
    for part, expected in zip(output.split(LENGTHS.tolist()), tokens.split(LENGTHS.tolist()), strict=True):
        if len(part):
            torch.testing.assert_close(part, theirs(expected[None])[0])


@pytest.mark.parametrize("groups", [2, 3, 4, 7])
def test_groups_change_nothing(groups: int) -> None:
    lengths = torch.tensor([3, 0, 5, 1, 2, 0, 9])
    tokens = torch.randn(int(lengths.sum()), WIDTH, dtype=torch.float64)
    torch.testing.assert_close(encode(layer(), tokens, lengths, groups), encode(layer(), tokens, lengths))


def test_groups_take_tokens_in_any_order() -> None:
    tokens = torch.randn(9, WIDTH, dtype=torch.float64)
    shuffle = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(4).repeat_interleave(LENGTHS)
    slots = torch.cat([torch.arange(length) for length in LENGTHS.tolist()])
    groups = LengthGroups.of(LENGTHS, rows[shuffle], slots[shuffle], groups=2)
    output = layer()(tokens[shuffle][groups.order_E], groups)[groups.place_E]
    torch.testing.assert_close(output, encode(layer(), tokens, LENGTHS)[shuffle])


def test_padding_goes_back_and_forth() -> None:
    padding = Padding.of(LENGTHS)
    tokens = torch.randn(int(LENGTHS.sum()), WIDTH)
    padded = padding.pad(tokens)
    assert padded.shape == (4, 5, WIDTH) and not padded[~padding.mask_BL].any()
    assert torch.equal(padding.unpad(padded), tokens)
    assert Padding.of(torch.zeros(2, dtype=torch.int64)).pad(torch.zeros(0, 3)).shape == (2, 1, 3)


@pytest.mark.parametrize(("groups", "pairs"), [(1, 10 * 40 * 40), (2, 5 + 5 * 40 * 40), (10, 9 + 40 * 40)])
def test_only_attention_pays_for_padding_and_less_in_groups(groups: int, pairs: int) -> None:
    lengths = torch.tensor([1] * 9 + [40])[torch.randperm(10, generator=torch.Generator().manual_seed(0))]
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        encode(layer(), torch.randn(49, WIDTH, dtype=torch.float64), lengths, groups)
    per_token = 2 * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER)
    assert counter.get_total_flops() == 49 * per_token + 2 * 2 * pairs * WIDTH
