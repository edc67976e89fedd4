"""A linear layer with layers of rank-one experts, chosen by scores alone so that all of them run at once."""

# Shapes: N inputs (rows, or rows and tokens), I input width, O output width, L layers, K experts.

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Stage = Literal["warm_up", "experts", "joint"]


class HiLoMoELinear(nn.Module):
    """y = W x + b + Σ_l U_lᵀ (s_l ⊙ V_l x), a drop-in for `nn.Linear`.

    Expert k of layer l is the rank-one matrix u vᵀ, and v is also its key: layer l scores its experts by
    a_l = V_l q_l / √I, keeps the `top_k` highest and softmaxes them to s_l. The query starts as x and moves on to
    q_{l+1} = q_l + V_lᵀ s_l: the choice of a layer depends on the *choices* before it, never on outputs, so K^L paths
    cost L·K experts and every product with x is one matrix product. V_m q_l is computed as V_m x plus s · (V V_mᵀ).

    U starts at 0, so a new layer computes what W computes.

    Deviation: the paper has a learned first projection of the query, q_1 = P x; `project` adds it, off by default
    because it costs I² multiplications, more than all experts together.

    Args:
        hierarchical: false leaves the query at x: a flat mixture with L·K experts, for comparison.

    Raises:
        ValueError: if `num_layers` or `num_experts` is below 1, or `top_k` above `num_experts`.

    Source: Hierarchical LoRA Mixture of Experts for CTR, arXiv 2510.10432, 2025, as far as it could be read.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_layers: int = 2,
        num_experts: int = 8,
        top_k: int | None = 2,
        bias: bool = True,
        project: bool = False,
        hierarchical: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 1 or num_experts < 1:
            raise ValueError(f"expected num_layers and num_experts of at least 1, got {num_layers} and {num_experts}")
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ValueError(f"expected top_k between 1 and num_experts = {num_experts}, got {top_k}")
        self.in_features, self.out_features = in_features, out_features
        self.num_layers, self.num_experts = num_layers, num_experts
        self.top_k = num_experts if top_k is None else top_k
        self.hierarchical = hierarchical
        self.shared = nn.Linear(in_features, out_features, bias=bias)
        self.down_KI = nn.ParameterList(torch.empty(num_experts, in_features) for _ in range(num_layers))
        self.up_KO = nn.ParameterList(torch.zeros(num_experts, out_features) for _ in range(num_layers))
        for down in self.down_KI:
            nn.init.xavier_normal_(down)
        self.project = nn.Linear(in_features, in_features, bias=False) if project else None
        if self.project is not None:
            nn.init.eye_(self.project.weight)
        self.stage: Stage = "joint"
        self.losses: dict[str, Tensor] = {}

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: int | bool | None) -> Self:
        """The layer around an existing one, whose weights it takes over: at first it computes exactly the same."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, **options)  # type: ignore[arg-type]
        layer.shared = linear
        return layer

    def experts(self, layer: int) -> list[nn.Parameter]:
        """Keys and outputs of one layer's experts."""
        return [self.down_KI[layer], self.up_KO[layer]]

    def scores(self, x_NI: Tensor) -> Tensor:
        """s of every layer, shape (N, L, K): non-negative, summing to 1 over the experts, `top_k` of them not 0."""
        return self._route(x_NI, x_NI @ torch.cat(list(self.down_KI)).T)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., I) to (..., O). In training `losses` holds `balance` and `z` of this call, summed over layers."""
        base: Tensor = self.shared(x)
        if self.stage == "warm_up":
            self.losses = {}
            return base
        x_NI = x.reshape(-1, self.in_features)
        inner = x_NI @ torch.cat(list(self.down_KI)).T
        scores_NLK, logits_NLK = self._route(x_NI, inner)
        self.losses = self._losses(scores_NLK, logits_NLK) if self.training else {}
        gated = scores_NLK.flatten(1) * inner
        return base + (gated.to(inner.dtype) @ torch.cat(list(self.up_KO)).to(inner.dtype)).view_as(base)

    def _route(self, x_NI: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and the logits a, each (N, L, K), in float32 at least."""
        precise = torch.promote_types(inner.dtype, torch.float32)
        if self.project is not None:
            inner = self.project(x_NI) @ torch.cat(list(self.down_KI)).T
        query_NLK = torch.unflatten(inner.to(precise), 1, (self.num_layers, self.num_experts))
        scores: list[Tensor] = []
        logits: list[Tensor] = []
        for layer in range(self.num_layers):
            a_NK = query_NLK[:, layer]
            for earlier in range(layer if self.hierarchical else 0):
                a_NK = a_NK + scores[earlier] @ (self.down_KI[earlier] @ self.down_KI[layer].T).to(precise)
            a_NK = a_NK * self.in_features**-0.5
            logits.append(a_NK)
            scores.append(torch.softmax(self._best(a_NK), 1))
        return torch.stack(scores, 1), torch.stack(logits, 1)

    def _best(self, a_NK: Tensor) -> Tensor:
        # While experts grow, all of them learn.
        if self.top_k == self.num_experts or self.stage == "experts":
            return a_NK
        kept = torch.topk(a_NK, self.top_k, dim=1).indices
        return torch.full_like(a_NK, -torch.inf).scatter(1, kept, a_NK.gather(1, kept))

    def _losses(self, scores_NLK: Tensor, logits_NLK: Tensor) -> dict[str, Tensor]:
        chosen = min(self.top_k, self.num_experts) if self.stage == "joint" else self.num_experts
        share_LK = (scores_NLK > 0).to(scores_NLK.dtype).mean(0).detach() / chosen
        wanted_LK = torch.softmax(logits_NLK, 2).mean(0)
        return {
            "balance": self.num_experts * (share_LK * wanted_LK).sum(),
            "z": torch.logsumexp(logits_NLK, 2).square().mean(0).sum(),
        }

    def diversity(self) -> Tensor:
        """Σ over layers and pairs of experts of cos²(v_k, v_k')."""
        total: Tensor = self.down_KI[0].new_zeros(())
        for down_KI in self.down_KI:
            unit_KI = F.normalize(down_KI, dim=1)
            cosine_KK = unit_KI @ unit_KI.T
            total = total + (cosine_KK.square().sum() - cosine_KK.diagonal().square().sum()) / 2
        return total

    @torch.no_grad()
    def merge(self, x_NI: Tensor) -> nn.Linear:
        """An ordinary layer with the experts mixed in by their mean scores on reference inputs: no routing to serve."""
        mean_LK = self.scores(x_NI).mean(0)
        merged = nn.Linear(self.in_features, self.out_features, bias=self.shared.bias is not None)
        weight = self.shared.weight.clone()
        for mean_K, up_KO, down_KI in zip(mean_LK, self.up_KO, self.down_KI, strict=True):
            weight += up_KO.T @ (mean_K[:, None] * down_KI)
        merged.weight.copy_(weight)
        if self.shared.bias is not None:
            merged.bias.copy_(self.shared.bias)
        return merged
