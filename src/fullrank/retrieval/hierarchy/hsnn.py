"""HSNN: large networks score the nodes of a learnt index, a small one the items under the best of them."""

# Shapes: B users, I items, K results, E width of an item, S numbers stored of an item, N levels, A allowed items,
# T tasks.

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, Self

import polars as pl
import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from fullrank.batch import Batch, RowGather
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.loader import batch_from_frame, partial_batch
from fullrank.embeddings import Tables
from fullrank.retrieval.base import Items, Progress, Retriever, SearchResult, check_k, item_keys
from fullrank.retrieval.hierarchy.index import HierarchicalIndex
from fullrank.retrieval.hierarchy.learning_to_index import LearningToIndex
from fullrank.retrieval.hierarchy.monn import MoNN
from fullrank.retrieval.hierarchy.network import HierarchicalNetwork, Users
from fullrank.retrieval.hierarchy.scorer import Scorer
from fullrank.retrieval.hierarchy.training import HierarchicalTrainer, Training, TrainingData
from fullrank.retrieval.two_tower import positive_rows
from fullrank.schema import Schema


class MoNNRetriever(Retriever):
    """A MoNN, whose every item is scored: exact, and the reference that an index of it is held against.

    Score = the logit of the first binary label, or a weighted sum of logits by `value`.
    """

    class Config(Retriever.Config):
        """Hyper-parameters.

        Attributes:
            embedding_dim: width of every table that the schema does not size itself.
            embedding_init: standard deviation that tables start with.
            items: sizes of the network that scores items.
            value: weight of each label's logit in the score; the first binary label alone if empty.
            training: what is learnt from, and how long.
        """

        embedding_dim: int = Field(default=16, ge=1)
        embedding_init: float = Field(default=0.05, gt=0)
        items: MoNN.Config = MoNN.Config()
        value: dict[str, float] = Field(default_factory=dict)
        training: Training = Training()

    name = "monn"
    filters = True
    config: Config

    def __init__(self, schema: Schema, config: Config | None = None) -> None:
        super().__init__(schema, config)
        labels = [label.name for label in schema.labels]
        for label in self.config.value:
            if label not in labels:
                raise ValueError(f'value: there is no label "{label}"; the schema has {", ".join(labels) or "none"}')
        with torch.random.fork_rng():
            torch.manual_seed(self.config.training.seed)
            self.network = self._network().eval()
        self.version = ""
        self.hierarchy: HierarchicalIndex | None = None

    def _network(self) -> HierarchicalNetwork:
        return HierarchicalNetwork(self.schema, self._tables, self.config.items)

    @property
    def _tables(self) -> Tables:
        return Tables(embedding_dim=self.config.embedding_dim, init_std=self.config.embedding_init)

    def fit(self, log: Dataset, *, progress: Progress | None = None) -> Self:
        """Learn from the training part of a log. What was indexed has to be indexed again.

        Raises:
            ValueError: if the log names no item_id, has no binary label or no positive row, or fewer items than a level
                of the index has nodes.
        """
        data = training_data(log, every_row=self.config.training.impressions > 0)
        HierarchicalTrainer(self.network, data, self.schema, self.config.training).fit(progress)
        self.trained()
        return self

    def trained(self) -> None:
        """Note that vectors of items or nodes have changed: an index of the earlier ones is refused from now on."""
        self.network.eval()
        self.network.inputs.ids.check_ids = False
        self.version = _digest(self.network)

    @property
    def scorer(self) -> NetworkScorer:
        """What the index asks for scores."""
        return NetworkScorer(self.network, self._weights(), self.version)

    def _weights(self) -> Tensor:
        """Weight of each task's logit in the score, (T,)."""
        labels = self.schema.labels
        binary = [label.name for label in labels if label.kind == "binary"]
        value = self.config.value or dict.fromkeys(binary[:1], 1.0)
        return torch.tensor([value.get(label.name, 0.0) for label in labels] or [1.0])

    def codes(self, stored_IS: Tensor) -> Tensor:
        """Leaves of items, (I, N)."""
        return torch.zeros((len(stored_IS), 1), dtype=torch.int64)

    def _empty(self, keys_I: Tensor, stored_IS: Tensor, codes_IN: Tensor) -> HierarchicalIndex:
        """An index without items, for these."""
        return HierarchicalIndex((1,), [torch.zeros(1, 1)], self.network.stored_width, version=self.version)

    @torch.no_grad()
    def index(self, items: Items) -> None:
        self._index(items.keys_I, self.network.stored(items.features))

    def _index(self, keys_I: Tensor, stored_IS: Tensor) -> None:
        codes_IN = self.codes(stored_IS)
        fresh = self._empty(keys_I, stored_IS, codes_IN)
        fresh.add(keys_I, stored_IS, codes_IN)
        self.hierarchy = fresh

    @torch.no_grad()
    def add(self, items: Items) -> None:
        if self.hierarchy is None:
            self.index(items)
            return
        stored_IS = self.network.stored(items.features)
        self.hierarchy.add(items.keys_I, stored_IS, self.codes(stored_IS))

    def remove(self, keys: Tensor) -> None:
        if self.hierarchy is None:
            if len(keys):
                raise KeyError(f"item {int(keys[0])} is not in the index")
            return
        self.hierarchy.remove(keys)

    @torch.no_grad()
    def search(self, users: Batch, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        """As every retriever.

        Raises:
            ValueError: if k is below 1.
            StaleIndexError: if the network has learnt since the items were indexed.
        """
        check_k(k)
        if self.hierarchy is None or not len(self.hierarchy):
            none = torch.zeros((len(users), 0))
            return SearchResult(none.long(), none, torch.zeros(len(users), dtype=torch.int64))
        found = self._search(self.hierarchy, self.network.encode_users(users), k, allowed)
        return SearchResult(found.item_keys_BK, found.scores_BK, found.cost_B)

    def _search(self, hierarchy: HierarchicalIndex, users: Users, k: int, allowed: Tensor | None) -> SearchResult:
        return hierarchy.search_exact(self.scorer, users, k, allowed=allowed)

    def cost(self) -> int:
        return 0 if self.hierarchy is None else len(self.hierarchy)

    def state(self) -> dict[str, Tensor]:
        state = {f"network.{name}": value.contiguous() for name, value in self.network.state_dict().items()}
        if self.hierarchy is None:
            state["index.keys"] = torch.zeros(0, dtype=torch.int64)
            state["index.stored"] = torch.zeros(0, self.network.stored_width)
        else:
            held = self.hierarchy.state()
            state["index.keys"], state["index.stored"] = held["keys"], held["vectors"]
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        network = {name.removeprefix("network."): value for name, value in state.items() if name[:8] == "network."}
        self.network.load_state_dict(network)
        self.trained()
        self._index(state["index.keys"], state["index.stored"])


class HSNN(MoNNRetriever):
    """A network for each level of a learnt index, and one for items, searched by a beam.

    A node stands for the items whose codes begin with its own. The large networks score nodes, the small one all items
    of the leaves that the beam keeps (with `linear_ensemble` all do): nothing but the beam is approximate.
    A new item belongs to its nearest nodes and is found by the next search.

    Source: Hierarchical Structured Neural Network (arXiv 2408.06653); Efficient Retrieval Scaling with Hierarchical
    Indexing (arXiv 2604.12965). Both leave open much that is said where it is decided: `MoNN`, `LearningToIndex`,
    `HierarchicalNetwork`, `Training`.
    """

    class Config(MoNNRetriever.Config):
        """Hyper-parameters.

        Attributes:
            nodes: sizes of the networks of nodes: one for each level, or one for all.
            tree: the index and how it learns; its `num_nodes` are the levels.
            beam: nodes that a search keeps at each level.
            node_vectors: what stands for a node in a search: its `codebook` vector, the `mean` of its items, or the
                vector of the item nearest to it when items were indexed (`representative`), as in the source.
            linear_ensemble: score by all levels down to a node or item, as in the source, not by its own network alone.
                A step then scores every pair by all networks, which takes several times as long.
            exact_below: catalogues of at most so many items are scored whole.
        """

        nodes: tuple[MoNN.Config, ...] = (MoNN.Config(user_vectors=16, hidden=(128,), over_arch_hidden=(64, 32)),)
        tree: LearningToIndex.Config = LearningToIndex.Config(num_nodes=(128,))
        beam: tuple[PositiveInt, ...] = (16,)
        node_vectors: Literal["codebook", "mean", "representative"] = "codebook"
        linear_ensemble: bool = False
        exact_below: int = Field(default=2048, ge=0)

        @model_validator(mode="after")
        def _levels_agree(self) -> Self:
            levels = len(self.tree.num_nodes)
            if len(self.beam) != levels:
                raise ValueError(f"beam is {self.beam}, expected a width for each of the {levels} levels of num_nodes")
            if len(self.nodes) not in (1, levels):
                raise ValueError(f"nodes has {len(self.nodes)} networks, expected 1 or {levels}, one for each level")
            return self

    name = "hsnn"
    config: Config

    def _network(self) -> HierarchicalNetwork:
        config = self.config
        levels = len(config.tree.num_nodes)
        return HierarchicalNetwork(
            self.schema,
            self._tables,
            config.items,
            config.nodes * levels if len(config.nodes) == 1 else config.nodes,
            config.tree,
            mode=config.training.mode,
            linear_ensemble=config.linear_ensemble,
        )

    @property
    def nodes(self) -> LearningToIndex:
        """The learnt index."""
        assert self.network.index is not None
        return self.network.index

    def codes(self, stored_IS: Tensor) -> Tensor:
        return self.nodes.assign(stored_IS[:, : self.nodes.dim])

    def _empty(self, keys_I: Tensor, stored_IS: Tensor, codes_IN: Tensor) -> HierarchicalIndex:
        if self.config.node_vectors == "mean":
            return self._with_nodes(None)
        vectors = [book.detach() for book in self.nodes.codebooks]
        if self.config.node_vectors == "representative":
            vectors = representatives(self.nodes, stored_IS[:, : self.nodes.dim], codes_IN)
        return self._with_nodes(vectors)

    def _with_nodes(self, vectors: Sequence[Tensor] | None) -> HierarchicalIndex:
        sizes = self.config.tree.num_nodes
        return HierarchicalIndex(sizes, vectors, self.network.stored_width, version=self.version)

    def _search(self, hierarchy: HierarchicalIndex, users: Users, k: int, allowed: Tensor | None) -> SearchResult:
        if len(hierarchy) <= self.config.exact_below:
            return hierarchy.search_exact(self.scorer, users, k, allowed=allowed)
        return hierarchy.search(self.scorer, users, k, self.config.beam, allowed=allowed)

    def cost(self) -> int:
        if self.hierarchy is None or len(self.hierarchy) <= self.config.exact_below:
            return super().cost()
        kept = min(1.0, self.config.beam[-1] / max(1, self.hierarchy.occupied[-1]))
        return round(kept * len(self.hierarchy))

    def state(self) -> dict[str, Tensor]:
        state, sizes = super().state(), self.config.tree.num_nodes
        held = {} if self.hierarchy is None else self.hierarchy.state()
        if self.config.node_vectors == "representative":
            for level in range(len(sizes)):
                state[f"index.nodes.{level}"] = held.get(f"nodes.{level}", torch.zeros(0, self.nodes.dim))
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        vectors = [state[name] for name in sorted(state) if name.startswith("index.nodes.")]
        super().restore(state)
        if vectors and len(vectors[0]):
            index = self._with_nodes(vectors)
            index.add(state["index.keys"], state["index.stored"], self.codes(state["index.stored"]))
            self.hierarchy = index


class NetworkScorer(Scorer):
    """Scores of a `HierarchicalNetwork`.

    Args:
        weights_T: of each task's logit in the score.
        version: of item and node vectors.
    """

    def __init__(self, network: HierarchicalNetwork, weights_T: Tensor, version: str | None) -> None:
        self.network, self.weights_T, self.version = network, weights_T, version
        self.ensembles = network.num_levels > 0 and network.ensemble.linear  # type: ignore[misc]

    def node_scores(self, level: int, users: Users, nodes_MV: Tensor) -> Tensor:
        nodes_ME = nodes_MV[:, : self.network.item_network.config.item_dim]  # a mean is one of all that is stored
        return self.network.node_logits(level, users, nodes_ME) @ self.weights_T

    def item_scores(self, users: Users, vectors_ID: Tensor) -> Tensor:
        return self.network.stored_logits(users, vectors_ID) @ self.weights_T

    def combined(self, level: int, scores_BIN: Tensor) -> Tensor:
        return self.network.ensemble.of_scores(level, scores_BIN, self.weights_T)

    def take(self, users: Users, rows_U: Tensor) -> Users:
        return users.take(rows_U)

    def count(self, users: Users) -> int:
        return len(users.lists_BCL)

    def flops(self, level: int | None) -> int | None:
        return self.network.flops_per_pair(level)


def representatives(index: LearningToIndex, vectors_IE: Tensor, codes_IN: Tensor) -> list[Tensor]:
    """Of each level, for every prefix of codes, the vector of the item under it that is nearest to its node, or the
    node's own where there is none."""
    found, number_I, size = [], torch.zeros(len(codes_IN), dtype=torch.int64), 1
    for level, codes in enumerate(index.config.num_nodes):
        prefixes = torch.cartesian_prod(*(torch.arange(k) for k in index.config.num_nodes[: level + 1]))
        number_I, size = number_I * codes + codes_IN[:, level], size * codes
        nodes = index.node_vectors(prefixes.view(size, level + 1))
        far_I = (vectors_IE - nodes[number_I]).square().sum(1)
        order_I = far_I.argsort(descending=True, stable=True)
        nearest = torch.full((size,), -1)
        nearest[number_I[order_I]] = order_I  # the last one written is the nearest
        nodes[nearest >= 0] = vectors_IE[nearest[nearest >= 0]]
        found.append(nodes)
    return found


def training_data(log: Dataset, *, every_row: bool) -> TrainingData:
    """Rows of the training part and its catalogue, in memory.

    Args:
        every_row: clicked or not; else the positive rows.

    Raises:
        ValueError: if the log names no item_id, has no binary label or no positive row.
    """
    rows, keys_P = positive_rows(log)
    if every_row:
        frame = log.scan("train").filter(pl.col(KEY_COLUMNS["item_id"]).is_not_null()).collect()
        rows, keys_P = batch_from_frame(frame, log.schema), item_keys(frame[KEY_COLUMNS["item_id"]])
    catalogue = log.catalogue("item")
    keys_I, order_I = item_keys(catalogue[KEY_COLUMNS["item_id"]]).sort()
    item_P = order_I[torch.searchsorted(keys_I, keys_P)]
    return TrainingData(RowGather(rows), item_P, RowGather(partial_batch(catalogue, log.schema)))


def _digest(network: HierarchicalNetwork) -> str:
    """Of all that vectors of items and nodes depend on."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if name.startswith(("inputs.", "item_network.item_tower.", "index.codebooks.")):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
