"""A hierarchical index: nodes that are prefixes of items' codes, searched by any scorer."""

# Shapes: I items, D width of item vectors, V width of node vectors, N levels, K_n codes of level n, A keys.

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fullrank.retrieval.base import check_k
from fullrank.retrieval.hierarchy.balancing import nearest_leaves, reassigned, rebalanced
from fullrank.retrieval.hierarchy.certified import certified_search
from fullrank.retrieval.hierarchy.files import read, write
from fullrank.retrieval.hierarchy.health import Audit, Health, audit, health
from fullrank.retrieval.hierarchy.nodes import Codes
from fullrank.retrieval.hierarchy.scorer import DotProduct, Scorer
from fullrank.retrieval.hierarchy.searching import IndexResult, search_snapshot
from fullrank.retrieval.hierarchy.snapshot import ENCODED_AT_ONCE, Encode, Selection, Snapshot, StaleIndexError
from fullrank.retrieval.hierarchy.storage import Segment, checked_items


class HierarchicalIndex:
    """Items in the leaves of a tree, where the node of an item at level n is the prefix of its first n codes.

    The index knows no model. It stores what an item tower gave and the vectors of nodes, finds which rows a search
    has to score, and asks a `Scorer` for the scores. Only nodes that have items exist, and the members of a leaf lie
    behind one another, so that a leaf is scored as one slice.

    Items may be added, removed and updated at any time: the next search sees it. Changes wait for one another; searches
    wait for nothing, in any thread, and each sees one state of the index, which its result names.
    """

    def __init__(
        self,
        num_nodes: Sequence[int],
        node_vectors: Sequence[Tensor] | None,
        width: int,
        *,
        version: str | None = None,
    ) -> None:
        """An index of no items.

        Args:
            num_nodes: K_1 .. K_N.
            node_vectors: of each level, (K_n, V): vectors of codes, of which a node has the sum along its prefix. Or
                (K_1 ·· K_n, V): a vector of each prefix, in the order of its codes. None: a node has the mean of its
                items, which follows every change.
            width: D.
            version: of the model that the vectors come from.

        Raises:
            ValueError: if node vectors do not fit `num_nodes` or are not finite.
        """
        self._start(Snapshot.empty(Codes.of(num_nodes, node_vectors, width), width, version))

    def _start(self, snapshot: Snapshot) -> None:
        self._now = snapshot
        # Of the version before the last refresh, for searches that began with its scorer.
        self._previous: Snapshot | None = None
        # Held by changes, one at a time, and by a refresh from its beginning to its end.
        self._lock, self._refreshing = threading.RLock(), threading.Lock()
        # Keys that changed since a refresh began; None without one.
        self._changed: list[Tensor] | None = None

    @classmethod
    def build(
        cls,
        keys_I: Tensor,
        vectors_ID: Tensor,
        codes_IN: Tensor,
        *,
        num_nodes: Sequence[int],
        node_vectors: Sequence[Tensor] | None,
        version: str | None = None,
    ) -> HierarchicalIndex:
        """An index of items.

        Args:
            keys_I: int64, distinct.
            vectors_ID: what the scorer scores of an item.
            codes_IN: int64, code n below K_n.

        Raises:
            ValueError: as `add` and the constructor, or if a level has more codes than there are items.
        """
        if len(num_nodes) and keys_I.numel() < max(num_nodes):
            raise ValueError(f"num_nodes is {tuple(num_nodes)}, more than there are items ({keys_I.numel()})")
        if vectors_ID.ndim != 2:
            raise ValueError(f"item vectors have shape {tuple(vectors_ID.shape)}, expected (items, width)")
        index = cls(num_nodes, node_vectors, vectors_ID.shape[1], version=version)
        index.add(keys_I, vectors_ID, codes_IN)
        index._now = index._now.as_built()
        return index

    def __len__(self) -> int:
        return len(self._now)

    @property
    def width(self) -> int:
        """D."""
        return self._now.width

    @property
    def version(self) -> str | None:
        """Of the model."""
        return self._now.model_version

    @property
    def index_version(self) -> int:
        """Counts every change."""
        return self._now.index_version

    @property
    def num_nodes(self) -> tuple[int, ...]:
        """K_1 .. K_N."""
        return self._now.tree.codes.num_nodes

    @property
    def occupied(self) -> tuple[int, ...]:
        """Nodes of each level that have items."""
        return tuple(len(level) for level in self._now.tree.levels)

    def search(
        self,
        scorer: Scorer,
        users: Any,
        k: int,
        beam: Sequence[int],
        *,
        allowed: Tensor | Selection | None = None,
        max_items: int | None = None,
    ) -> IndexResult:
        """The k best items of each user that a beam reaches.

        At each level the beam keeps the best children of the nodes that it kept above; all items of the leaves that it
        keeps at last are scored. A beam whose leaves hold fewer than k items is doubled until they do, so that k items
        are returned whenever there are as many.

        Args:
            scorer: of the version of the index, or of none.
            users: as the scorer takes them.
            beam: nodes kept at each level.
            allowed: keys of the items that may be returned, to all users (A,) or to each its own (B, A), `NO_ITEM`
                behind the last; or a `Selection`. Keys that are not indexed are ignored. Nodes without such an item are
                not entered; where few items are allowed all of them are scored.
            max_items: leaves are kept, best first, only as long as they hold no more items than this, and the best one
                always; then fewer than k may be found.

        Raises:
            ValueError: if k, a width of the beam or max_items is below 1, or there is not one width for each level.
            StaleIndexError: if the scorer is of another version.
        """
        return search_snapshot(self._snapshot_for(scorer), scorer, users, k, beam, allowed, max_items)

    def search_exact(
        self, scorer: Scorer, users: Any, k: int, *, allowed: Tensor | Selection | None = None, scan: bool = False
    ) -> IndexResult:
        """The k best items of each user among all.

        For a `DotProduct` only what cannot be ruled out is scored, see `certified_search`; `cost_B` says how much that
        is. All items are for any other scorer, and for `scan`.

        Args:
            scan: score all items in any case: faster unless items lie in tight clusters.

        Raises:
            ValueError: if k is below 1.
            StaleIndexError: if the scorer is of another version.
        """
        check_k(k)
        snapshot = self._snapshot_for(scorer)
        if type(scorer) is DotProduct and not scan and allowed is None:
            return certified_search(snapshot, users, k)
        return search_snapshot(snapshot, scorer, users, k, None, allowed, None)

    def add(self, keys_I: Tensor, vectors_ID: Tensor, codes_IN: Tensor, *, version: str | None = None) -> None:
        """Make more items searchable.

        Args:
            version: of the model that encoded them, which may have been replaced meanwhile; not compared if omitted.

        Raises:
            StaleIndexError: if the index is of another version.
            ValueError: if a key is there already, given twice or that of no item, shapes differ, a number is not finite
                or a code is outside its level.
        """
        with self._lock:
            fresh = self._fresh(keys_I, vectors_ID, codes_IN, version)
            known_I = self._now.found(keys_I)
            if bool(known_I.any()):
                raise ValueError(f"item {int(keys_I[known_I][0])} is in the index already")
            self._put(self._now.with_items(fresh), keys_I)

    def update(self, keys_I: Tensor, vectors_ID: Tensor, codes_IN: Tensor, *, version: str | None = None) -> None:
        """Give items new vectors and codes; those that are not there are added. No search sees an item twice or not at
        all meanwhile.

        Raises:
            ValueError, StaleIndexError: as `add`, but that keys may be there already.
        """
        with self._lock:
            fresh = self._fresh(keys_I, vectors_ID, codes_IN, version)
            self._put(self._now.without(keys_I).with_items(fresh), keys_I)

    def _fresh(self, keys_I: Tensor, vectors_ID: Tensor, codes_IN: Tensor, version: str | None) -> Segment:
        if version is not None and version != self.version:
            raise StaleIndexError(f'the index is of version "{self.version}" of the model, the items of "{version}"')
        return self._now.segment(keys_I, vectors_ID, codes_IN)

    def remove(self, keys_A: Tensor, missing: Literal["error", "ignore"] = "error") -> None:
        """Forget items; no later search returns them.

        Raises:
            KeyError: if a key is not there, unless those are ignored.
        """
        with self._lock:
            if missing == "error":
                self._now.require(keys_A)
            self._put(self._now.without(keys_A), keys_A)
            if self._previous is not None:
                self._previous = self._previous.without(keys_A)

    def lookup(self, keys_A: Tensor) -> tuple[Tensor, Tensor]:
        """Stored vectors (A, D) and codes (A, N) of items.

        Raises:
            KeyError: if a key is not there.
        """
        return self._now.lookup(keys_A)

    @property
    def keys(self) -> Tensor:
        """Of all items, int64, ascending."""
        return self._now.items().keys_I.sort().values

    def refresh(
        self,
        encode: Encode,
        *,
        node_vectors: Sequence[Tensor] | None,
        num_nodes: Sequence[int] | None = None,
        version: str | None = None,
    ) -> None:
        """Move all items to another version of the model.

        The new state is built beside the old one, which searches and changes go on with; what changed meanwhile is
        encoded again; then the next search sees the new state. A search whose scorer is of the old version still finds
        the old state, until `release`.

        Args:
            encode: vectors (I, D) and codes (I, N) of items by their keys (I,), under the new version.
            node_vectors: see the constructor.
            num_nodes: K_1 .. K_N; as before when omitted.
            version: of the model.

        Raises:
            ValueError: as the constructor and `add`; the old state stays.
            RuntimeError: if another refresh goes on.
        """
        if not self._refreshing.acquire(blocking=False):
            raise RuntimeError("another refresh of the index goes on")
        try:
            codes = Codes.of(num_nodes or self.num_nodes, node_vectors, self.width)
            with self._lock:
                self._changed, fresh = [], Snapshot.empty(codes, self.width, version)
                keys = self._now.items().keys_I
            fresh = fresh.encoded(keys, encode)
            while True:
                with self._lock:
                    changed = torch.unique(torch.cat([keys[:0], *self._changed]))
                    self._changed = []
                    keys = changed[self._now.found(changed)]
                    last = changed.numel() <= ENCODED_AT_ONCE
                    if last:
                        fresh = fresh.without(changed).encoded(keys, encode)
                        self._previous = self._now
                        self._put(fresh.as_built(), None)
                        return
                fresh = fresh.without(changed).encoded(keys, encode)
        finally:
            self._changed = None
            self._refreshing.release()

    def rebalance(self, max_leaf: int, *, seed: int = 0) -> None:
        """Split leaves with more than `max_leaf` items, see `rebalanced`.

        Raises:
            ValueError: if max_leaf is below 1, or node vectors have not the items' width.
        """
        with self._lock:
            self._put(rebalanced(self._now, max_leaf, seed), None)

    def nearest(self, vectors_ID: Tensor) -> Tensor:
        """Codes (I, N) of the occupied leaves that vectors are nearest to: where to put items that no model gave codes.

        Raises:
            ValueError: if there are no items, node vectors have not the items' width, or a number is not finite.
        """
        now = self._now
        vectors_ID = checked_items(torch.arange(len(vectors_ID)), vectors_ID, now.width)
        return now.tree.codes.codes(nearest_leaves(now, vectors_ID))

    def reassign(self) -> None:
        """Put each item into the nearest leaf, see `reassigned`. Where nodes have the mean of their items this undoes
        what a week of changes did, see `benchmarks.retrieval.churn`.

        Raises:
            ValueError: if there are no items, or node vectors have not the items' width.
        """
        with self._lock:
            self._put(reassigned(self._now), None)

    def move_nodes(self, node_vectors: Sequence[Tensor]) -> None:
        """Give nodes other vectors; items stay where they are. Parts of leaves that were split keep theirs.

        Raises:
            ValueError: as the constructor.
        """
        with self._lock:
            self._put(self._now.moved(node_vectors), None)

    def release(self) -> None:
        """Forget the state before the last refresh, and free its memory."""
        with self._lock:
            self._previous = None

    def _put(self, changed: Snapshot, keys: Tensor | None) -> None:
        """Make a state the current one, in which the items of some keys are others."""
        if self._changed is not None and keys is not None:
            self._changed.append(keys)
        self._now = replace(changed, index_version=self._now.index_version + 1)

    def _snapshot_for(self, scorer: Scorer) -> Snapshot:
        now, previous = self._now, self._previous
        if scorer.version is None or scorer.version == now.model_version:
            return now
        if previous is not None and scorer.version == previous.model_version:
            return previous
        raise StaleIndexError(
            f'the index is of version "{now.model_version}" of the model, the scorer of "{scorer.version}"'
        )

    def health(self) -> Health:
        """How full and how worn the index is."""
        return health(self._now)

    def audit(self, scorer: Scorer, users: Any, k: int, beams: Sequence[Sequence[int]]) -> list[Audit]:
        """What each beam finds of the k best items, and scores for it.

        Raises:
            ValueError: as `search`.
            StaleIndexError: if the scorer is of another version.
        """
        return audit(self._snapshot_for(scorer), scorer, users, k, beams)

    def state(self) -> dict[str, Tensor]:
        """Items, node vectors and sizes, as contiguous tensors by name."""
        return self._now.state()

    @classmethod
    def restore(cls, state: dict[str, Tensor], *, version: str | None = None) -> HierarchicalIndex:
        """An index of what `state` gave.

        Raises:
            ValueError: if tensors are missing or contradict one another.
        """
        index = cls.__new__(cls)
        index._start(Snapshot.restored(state, version))
        return index

    def save(self, path: Path) -> None:
        """Write one file of safetensors, with the versions of format and model in its metadata."""
        now = self._now
        write(path, now.state(), now.model_version)

    @classmethod
    def load(cls, path: Path, *, version: str | None = None) -> HierarchicalIndex:
        """Read what `save` wrote.

        Args:
            version: of the model that the index must be of; any when omitted.

        Raises:
            ValueError: if the file is missing, damaged or of another format.
            StaleIndexError: if it is of another version of the model.
        """
        state, of = read(path)
        if version is not None and of != version:
            raise StaleIndexError(f'{path} is of version "{of}" of the model, expected "{version}"')
        try:
            return cls.restore(state, version=of)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
