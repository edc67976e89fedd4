"""A codebook that follows a stream of items, as in Streaming VQ."""

# Shapes: I items, D width, K clusters.

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.embeddings.semantic_id.quantizer import assigned, squared_distances
from fullrank.retrieval.hierarchy.coded import CodedIndex, clustered
from fullrank.retrieval.hierarchy.index import HierarchicalIndex
from fullrank.retrieval.hierarchy.storage import checked_items

# Distances held at once.
DISTANCES_AT_ONCE = 1 << 22


class StreamingVQ(CodedIndex):
    """One level of clusters whose centres are moving averages of the items that a stream shows, each assigned anew when
    it is shown.

    An item goes to argmin_k r_k ‖e_k - v‖², where r_k < 1 draws items to a cluster that has fewer than its share. A
    centre is m_k / n_k, with n_k the moving average of weights of the items that came, m_k of weight times vector. An
    item shown x times as often as another has the weight x^-discount each time, so that the popular do not own the
    codebook.

    Deviation: the paper trains the vectors by the same codebook, and serves by merging lists of node score plus item
    bias; here vectors come from any model, and all items of the kept clusters are scored.

    Source: Real-time Indexing for Large-scale Recommendation by Streaming Vector Quantization Retriever, 2025
    (arXiv 2501.08695); what its abstract does not say, r_k = min(1, K n_k / Σn)^balance and the decay among it, is our
    choice.

    Args:
        decay: of the moving averages, per call of `observe`.
        discount: 0 weighs every showing alike.
        balance: 0 is the nearest centre.
    """

    def __init__(
        self,
        index: HierarchicalIndex,
        centres_KD: Tensor,
        *,
        decay: float = 0.99,
        discount: float = 0.5,
        balance: float = 0.25,
    ) -> None:
        if not 0 < decay < 1 or discount < 0 or balance < 0:
            raise ValueError(
                f"decay is {decay}, discount {discount} and balance {balance}, expected between 0 and 1, and at least 0"
            )
        self.index, self.centres_KD = index, centres_KD
        self.decay, self.discount, self.balance = decay, discount, balance
        _, code_I1 = index.lookup(index.keys)
        count_K = torch.bincount(code_I1[:, 0], minlength=len(centres_KD)).float()
        self.weight_K = (count_K / count_K.sum().clamp_min(1)).clamp_min(1e-6)
        self.sum_KD = self.weight_K[:, None] * centres_KD
        self._next = 0

    @classmethod
    def build(
        cls, keys_I: Tensor, vectors_ID: Tensor, clusters: int, *, seed: int = 0, **options: float
    ) -> StreamingVQ:
        """Starts from k-means.

        Raises:
            ValueError: as `HierarchicalIndex.build`, or if an option is out of its range.
        """
        vectors_ID = checked_items(keys_I, vectors_ID, vectors_ID.shape[-1])
        centres_KD = clustered(vectors_ID, clusters, seed)
        index = HierarchicalIndex.build(
            keys_I,
            vectors_ID,
            assigned(vectors_ID, centres_KD)[1][:, None],
            num_nodes=(clusters,),
            node_vectors=[centres_KD],
        )
        return cls(index, centres_KD, **options)

    def codes(self, vectors_ID: Tensor) -> Tensor:
        share_K = self.weight_K / self.weight_K.sum() * len(self.weight_K)
        factor_K = share_K.clamp(1e-3, 1) ** self.balance
        found = []
        for rows in torch.split(vectors_ID, max(1, DISTANCES_AT_ONCE // len(factor_K))):
            distance = squared_distances(rows, self.centres_KD) + rows.square().sum(1, keepdim=True)
            found.append((distance.clamp_min(0) * factor_K).argmin(1))
        return torch.cat([torch.zeros(0, dtype=torch.int64), *found])[:, None]

    def observe(self, keys_I: Tensor, vectors_ID: Tensor, popularity_I: Tensor | None = None) -> None:
        """Items that the stream shows, with the vectors that they have now: assign them, then move the centres.

        Args:
            popularity_I: how often each is shown, on any scale; alike when omitted.

        Raises:
            ValueError: as `add`, but that keys may be there already.
        """
        vectors_ID = checked_items(keys_I, vectors_ID, self.index.width)
        codes_I1 = self.codes(vectors_ID)
        weight_I = torch.ones(len(keys_I))
        if popularity_I is not None:
            weight_I = popularity_I.float().clamp_min(1e-12) ** -self.discount
        if len(weight_I):
            weight_I = weight_I / weight_I.sum()
            code_I = codes_I1[:, 0]
            self.weight_K = (self.decay * self.weight_K).index_add(0, code_I, (1 - self.decay) * weight_I)
            fresh_ID = (1 - self.decay) * weight_I[:, None] * vectors_ID
            self.sum_KD = (self.decay * self.sum_KD).index_add(0, code_I, fresh_ID)
            self.centres_KD = self.sum_KD / self.weight_K.clamp_min(1e-30)[:, None]
        self.index.update(keys_I, vectors_ID, codes_I1)
        self.index.move_nodes([self.centres_KD])

    def reassign(self, count: int) -> int:
        """Assign the next items, in turn, that the stream may not show; how many of them moved.

        Raises:
            ValueError: if count is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        keys = self.index.keys
        if not keys.numel():
            return 0
        places = (self._next + torch.arange(min(count, keys.numel()))) % keys.numel()
        self._next = (int(places[-1]) + 1) % keys.numel()
        vectors_ID, before = self.index.lookup(keys[places])
        after = self.codes(vectors_ID)
        moved = (before != after)[:, 0]
        self.index.update(keys[places[moved]], vectors_ID[moved], after[moved])
        return int(moved.sum())
