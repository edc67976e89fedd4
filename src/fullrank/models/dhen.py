"""DHEN: layers in which different interaction modules see the same tokens, and the next layer crosses their outputs."""

# Shapes: B rows, M tokens of a layer, L tokens of one module, Y output tokens, D width, I = M·D flat input.

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.layers.attention import MultiHeadAttention
from fullrank.layers.mlp import MLP
from fullrank.layers.token_pairs import TokenPairs
from fullrank.layers.token_projection import FlatToTokens, TokenProjection
from fullrank.layers.tokens import FeatureTokens
from fullrank.models.base import BatchNorm, Dropout, Hidden, InitStd, Ranker, RankerOutput
from fullrank.models.wukong import FactorizationMachineBlock
from fullrank.registry import Registry
from fullrank.schema import Schema

Ensemble = Literal["concat", "sum", "weighted_sum"]
Norm = Literal["layernorm"]


class AdvancedDLRM(nn.Module):
    """Dot products of all pairs of tokens and a compressed copy of the tokens, through an MLP.

    The source gives pair products beside the tokens, an MLP and a projection; the compression, the pairs (i <= j) and
    the sizes are our reading.

    Args:
        compressed_tokens: tokens of the copy; default `num_out_tokens`.
        hidden: widths of the MLP.
    """

    def __init__(
        self,
        num_tokens: int,
        num_out_tokens: int,
        width: int,
        *,
        compressed_tokens: int | None = None,
        hidden: Sequence[int] = (128,),
    ) -> None:
        super().__init__()
        self.compress = TokenProjection(num_tokens, compressed_tokens or num_out_tokens)
        self.pairs = TokenPairs(num_tokens)
        flat = self.pairs.out_features + (compressed_tokens or num_out_tokens) * width
        self.mlp = MLP(flat, hidden)
        self.out = FlatToTokens(self.mlp.out_features, num_out_tokens, width)

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        flat = torch.cat([self.pairs(tokens_BMD), self.compress(tokens_BMD).flatten(1)], 1)
        return self.out(self.mlp(flat))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """A Transformer encoder layer (attention, then a feed-forward network, each added and normalised), projected.

    Args:
        num_heads: must divide the width.
        feed_forward: hidden width of the feed-forward network as a multiple of the tokens' width.
    """

    def __init__(
        self, num_tokens: int, num_out_tokens: int, width: int, *, num_heads: int = 2, feed_forward: int = 4
    ) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(width, num_heads)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, (feed_forward * width,))
        self.mlp_out = nn.Linear(feed_forward * width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.out = TokenProjection(num_tokens, num_out_tokens)

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        x_BMD = self.attention_norm(tokens_BMD + self.attention(tokens_BMD, tokens_BMD))
        x_BMD = self.mlp_norm(x_BMD + self.mlp_out(self.mlp(x_BMD)))
        return self.out(x_BMD)  # type: ignore[no-any-return]


class Convolution(nn.Module):
    """3 x 3 filters over the plane of tokens and channels, ReLU, a 1 x 1 filter back to one plane, projected.

    The source says "Conv2d"; filter sizes, the ReLU (without it two filters are one) and the 1 x 1 filter are our
    reading. Unlike the other modules it depends on the order of tokens.
    """

    def __init__(self, num_tokens: int, num_out_tokens: int, width: int, *, channels: int = 4) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, channels, 3, padding=1)
        self.merge = nn.Conv2d(channels, 1, 1)
        self.out = TokenProjection(num_tokens, num_out_tokens)

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        plane = self.merge(F.relu(self.filters(tokens_BMD[:, None])))
        return self.out(plane.squeeze(1))  # type: ignore[no-any-return]


class FlatCross(nn.Module):
    """x ⊙ (W x + b) on the tokens side by side, projected. DCN-V2's own skip is left to the layer's shortcut.

    Deviation: the printed equation crosses pairs of tokens (`OuterCross`) where the text names DCN; this is DCN's
    cross, with a full W or, if `rank` is not 0, W = U V.
    """

    def __init__(self, num_tokens: int, num_out_tokens: int, width: int, *, rank: int = 0) -> None:
        super().__init__()
        flat = num_tokens * width
        self.cross: nn.Module = nn.Linear(flat, flat)
        if rank:
            self.cross = nn.Sequential(nn.Linear(flat, rank, bias=False), nn.Linear(rank, flat))
        for layer in self.cross.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.out = FlatToTokens(flat, num_out_tokens, width)

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        x_BI = tokens_BMD.flatten(1)
        return self.out(x_BI * self.cross(x_BI))  # type: ignore[no-any-return]


class OuterCross(nn.Module):
    """W (X Xᵀ) + b, the equation as printed. X Xᵀ is symmetric, so W acts on its upper triangle."""

    def __init__(self, num_tokens: int, num_out_tokens: int, width: int) -> None:
        super().__init__()
        self.pairs = TokenPairs(num_tokens)
        self.out = FlatToTokens(self.pairs.out_features, num_out_tokens, width)

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        return self.out(self.pairs(tokens_BMD))  # type: ignore[no-any-return]


class WukongInteraction(nn.Module):
    """Wukong's two blocks side by side, half of the output tokens each; residual and norm are left to the layer."""

    def __init__(
        self, num_tokens: int, num_out_tokens: int, width: int, *, rank: int = 8, hidden: Sequence[int] = (128,)
    ) -> None:
        super().__init__()
        linear = num_out_tokens // 2
        self.fm = FactorizationMachineBlock(num_tokens, num_out_tokens - linear, width, rank, hidden)
        self.linear = TokenProjection(num_tokens, linear) if linear else None

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        fm_BLD: Tensor = self.fm(tokens_BMD)
        return fm_BLD if self.linear is None else torch.cat([fm_BLD, self.linear(tokens_BMD)], 1)


def linear_interaction(num_tokens: int, num_out_tokens: int, width: int) -> TokenProjection:
    """A linear map over the token axis."""
    return TokenProjection(num_tokens, num_out_tokens)


# A factory is called as factory(num_tokens=M, num_out_tokens=L, width=D, **options) and gives (B, M, D) -> (B, L, D).
INTERACTIONS: Registry[Callable[..., nn.Module]] = Registry(
    "interaction",
    "fullrank.interactions",
    {
        "dlrm": f"{__name__}:AdvancedDLRM",
        "attention": f"{__name__}:SelfAttention",
        "convolution": f"{__name__}:Convolution",
        "linear": f"{__name__}:linear_interaction",
        "dcn": f"{__name__}:FlatCross",
        "outer": f"{__name__}:OuterCross",
        "wukong": f"{__name__}:WukongInteraction",
    },
)


def register_interaction(name: str, factory: Callable[..., nn.Module]) -> None:
    """Make an interaction module usable by name in `DHENLayer` and recipes.

    Args:
        factory: called as `factory(num_tokens=M, num_out_tokens=L, width=D)`, and with what a recipe's
            `options: {name: {...}}` gives; returns a module from (B, M, D) to (B, L, D).

    Raises:
        ValueError: if the name is taken.
    """
    INTERACTIONS.register(name, factory)


def build_interaction(name: str, num_tokens: int, num_out_tokens: int, width: int, **options: Any) -> nn.Module:
    """The module that `name` stands for.

    Raises:
        ValueError: if the name or an option is unknown, or a number is below 1.
    """
    factory = INTERACTIONS.find(name)
    for what, value in (("num_tokens", num_tokens), ("num_out_tokens", num_out_tokens), ("width", width)):
        if value < 1:
            raise ValueError(f'interaction "{name}": {what} must be at least 1, got {value}')
    sizes = {"num_tokens": num_tokens, "num_out_tokens": num_out_tokens, "width": width}
    try:
        inspect.signature(factory).bind(**sizes, **options)
    except TypeError as error:
        raise ValueError(f'options of interaction "{name}": {error}') from None
    return factory(**sizes, **options)


class DHENLayer(nn.Module):
    """norm(ensemble of interactions(X) + shortcut(X)): (B, num_tokens, D) to (B, out_tokens, D).

    The shortcut is the identity where the number of tokens stays, else a linear map over the token axis.

    Args:
        modules: names in `INTERACTIONS`, one per parallel module; a name may come twice.
        num_out_tokens: tokens of each module: one number for all, or one per module.
        ensemble: `concat` puts the modules' tokens one after another; `sum` adds them; `weighted_sum` adds them with
            a learned number each, which starts at 1.
        norm: `layernorm` over the width, or None.
        options: further arguments of modules, by name.

    Raises:
        ValueError: if a name or option is unknown, or a sum is asked of different numbers of tokens.
    """

    def __init__(
        self,
        num_tokens: int,
        width: int,
        modules: Sequence[str],
        num_out_tokens: int | Sequence[int],
        ensemble: Ensemble = "concat",
        norm: Norm | None = "layernorm",
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if not modules:
            raise ValueError("a DHEN layer needs at least one interaction module")
        if ensemble not in ("concat", "sum", "weighted_sum"):
            raise ValueError(f'ensemble "{ensemble}" is unknown; choose one of concat, sum, weighted_sum')
        if norm not in ("layernorm", None):
            raise ValueError(f'norm "{norm}" is unknown; choose layernorm or None')
        counts = [num_out_tokens] * len(modules) if isinstance(num_out_tokens, int) else list(num_out_tokens)
        if len(counts) != len(modules):
            raise ValueError(f"num_out_tokens has {len(counts)} numbers for {len(modules)} modules")
        if ensemble != "concat" and len(set(counts)) > 1:
            raise ValueError(f'ensemble "{ensemble}" needs equal num_out_tokens of all modules, got {counts}')
        self.names, self.counts, self.ensemble = tuple(modules), counts, ensemble
        self.out_tokens = sum(counts) if ensemble == "concat" else counts[0]
        self.interactions = nn.ModuleList(
            build_interaction(name, num_tokens, count, width, **(options or {}).get(name, {}))
            for name, count in zip(modules, counts, strict=True)
        )
        self.scale = nn.Parameter(torch.ones(len(counts))) if ensemble == "weighted_sum" else None
        same = num_tokens == self.out_tokens
        self.shortcut: nn.Module = nn.Identity() if same else TokenProjection(num_tokens, self.out_tokens)
        self.norm: nn.Module = nn.Identity() if norm is None else nn.LayerNorm(width)

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        outputs = []
        for name, count, interaction in zip(self.names, self.counts, self.interactions, strict=True):
            output_BLD: Tensor = interaction(tokens_BMD)
            expected = (tokens_BMD.shape[0], count, tokens_BMD.shape[2])
            if output_BLD.shape != expected:
                raise ValueError(f'interaction "{name}" gave shape {tuple(output_BLD.shape)}, expected {expected}')
            outputs.append(output_BLD)
        if self.scale is not None:
            outputs = [output * scale for output, scale in zip(outputs, self.scale, strict=True)]
        shortcut_BYD: Tensor = self.shortcut(tokens_BMD)
        if self.ensemble == "concat":
            mixed_BYD = torch.cat(outputs, 1) + shortcut_BYD
        else:
            mixed_BYD = shortcut_BYD
            for output in outputs:
                mixed_BYD = mixed_BYD + output
        return self.norm(mixed_BYD)  # type: ignore[no-any-return]


class DHEN(Ranker):
    """Deep and hierarchical ensemble network: a stack of `DHENLayer`s on feature tokens, then an MLP."""

    name = "dhen"
    source = "Zhang et al., DHEN: A Deep and Hierarchical Ensemble Network for Large-Scale CTR Prediction, 2022"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            layers: names of the interaction modules of each layer.
            num_out_tokens: tokens that each module gives.
            ensemble: how a layer's modules join: `concat`, `sum` or `weighted_sum`.
            norm: `layernorm` or nothing.
            options: further arguments of interaction modules, by name: `{attention: {num_heads: 4}}`.
            number_tokens: tokens that all numbers together give through an MLP; 0 for a token x·v per number.
            number_hidden: hidden widths of that MLP.
            hidden: widths of the MLP above the stack.
        """

        embedding_init: InitStd = 0.001
        layers: tuple[tuple[str, ...], ...] = Field(default=(("dlrm", "linear"),) * 3, min_length=1)
        num_out_tokens: int = Field(default=16, ge=1)
        ensemble: Ensemble = "concat"
        norm: Norm | None = "layernorm"
        options: dict[str, dict[str, Any]] = Field(default_factory=dict)
        number_tokens: int = Field(default=1, ge=0)
        number_hidden: Hidden = (128,)
        hidden: Hidden = (256, 128, 64)
        batch_norm: BatchNorm = False
        dropout: Dropout = 0.0

        @model_validator(mode="after")
        def _modules_are_known(self) -> Self:
            used = {name for layer in self.layers for name in layer}
            for place, layer in enumerate(self.layers):
                if not layer:
                    raise ValueError(f"layers[{place}] has no interaction module")
            for name in sorted({*used, *self.options}):
                INTERACTIONS.find(name)
            for name in sorted(set(self.options) - used):
                raise ValueError(f'options are given for "{name}", which no layer has')
            return self

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.tokens = FeatureTokens(
            schema,
            config.embeddings,
            number_tokens=config.number_tokens,
            number_hidden=config.number_hidden,
        )
        tokens, layers = self.tokens.num_tokens, []
        for modules in config.layers:
            layer = DHENLayer(
                tokens,
                config.embedding_dim,
                modules,
                config.num_out_tokens,
                config.ensemble,
                config.norm,
                options=config.options,
            )
            layers.append(layer)
            tokens = layer.out_tokens
        self.layers = nn.Sequential(*layers)
        self.head = MLP(
            tokens * config.embedding_dim,
            config.hidden,
            self.num_tasks,
            batch_norm=config.batch_norm,
            dropout=config.dropout,
            normalized=config.norm is not None,
        )

    def output_biases(self) -> list[Tensor]:
        return [self.head.output_bias]

    def forward(self, batch: Batch) -> RankerOutput:
        return RankerOutput(self.head(self.layers(self.tokens(batch)).flatten(1)))
