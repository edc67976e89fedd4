from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fullrank.layers.encoder import EncoderLayer, Padding

LENGTHS = torch.tensor([3, 0, 5, 1])
WIDTH, HEADS, INNER = 6, 2, 9


def layer() -> EncoderLayer:
    torch.manual_seed(0)
    made = EncoderLayer(WIDTH, HEADS, INNER, nn.ReLU()).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


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
    output = ours(tokens, Padding.of(LENGTHS))
    for part, expected in zip(output.split(LENGTHS.tolist()), tokens.split(LENGTHS.tolist()), strict=True):
        if len(part):
            torch.testing.assert_close(part, theirs(expected[None])[0])


def test_padding_goes_back_and_forth() -> None:
    padding = Padding.of(LENGTHS)
    tokens = torch.randn(int(LENGTHS.sum()), WIDTH)
    padded = padding.pad(tokens)
    assert padded.shape == (4, 5, WIDTH) and not padded[~padding.mask_BL].any()
    assert torch.equal(padding.unpad(padded), tokens)
    assert Padding.of(torch.zeros(2, dtype=torch.int64)).pad(torch.zeros(0, 3)).shape == (2, 1, 3)


def test_only_attention_pays_for_padding() -> None:
    lengths = torch.tensor([1] * 9 + [40])
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        layer()(torch.randn(49, WIDTH, dtype=torch.float64), Padding.of(lengths))
    per_token = 2 * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER)
    assert counter.get_total_flops() == 49 * per_token + 10 * 2 * 2 * 40 * 40 * WIDTH
