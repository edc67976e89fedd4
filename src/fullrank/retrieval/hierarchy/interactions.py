"""What a user's lists and an item's values have in common, counted for any pair without a table of pairs."""

# Shapes: B users, I items, M items of a user, C lists of a user, L their length, A values of an item, F counts of a
# pair.

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.schema import OUT_OF_VOCABULARY_ID, Schema

# Ids of an item's bag that count; more of them are left out.
VALUES = 8
# Ids up to here are whole numbers in float32, as which an index stores them beside an item's vector.
_LARGEST_TABLE = 1 << 24
_NO_VALUE, _NO_EVENT = -1, torch.iinfo(torch.int64).max


class InteractionCounts(nn.Module):
    """Counts of an item's values among a user's lists: the item in the history, its category among liked categories.

    Every list of the user's (a bag, the ids of a sequence) meets every feature of the item that shares its table. The
    user's lists are sorted once; a value's count is then two binary searches. This is the inverted index of the source
    (values of items are keys, a user's lists the query), kept on the side of the user.

    Attributes:
        width: numbers of a pair, 2 for each meeting: whether a value is in the list, and log(1 + how often).
        num_values: A, of all features that meet a list.

    Source: Hierarchical Structured Neural Network (arXiv 2408.06653), section on interaction features. Its further
    counters, such as click rates by pair of values, need a log of them and are left out.
    """

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        role_of, embedded, sizes = schema.roles(), schema.embedded(), schema.tables()
        single = [feature.name for feature in schema.categorical]
        of_users = [name for name in embedded if role_of[name] != "item" and name not in single]
        of_items = [name for name in embedded if role_of[name] == "item"]
        meetings = [
            (user, item)
            for user in of_users
            for item in of_items
            if embedded[user].table_name == embedded[item].table_name
            and sizes[embedded[user].table_name] <= _LARGEST_TABLE
        ]
        self.lists = tuple(dict.fromkeys(user for user, _ in meetings))
        self.columns = {name: column for column, name in enumerate(single)}
        self.places: dict[str, slice] = {}
        self.num_values = 0
        for item in dict.fromkeys(item for _, item in meetings):
            size = 1 if item in self.columns else VALUES
            self.places[item] = slice(self.num_values, self.num_values + size)
            self.num_values += size
        self.meetings = [(self.lists.index(user), self.places[item]) for user, item in meetings]
        self.width = 2 * len(meetings)

    def user_lists(self, batch: Batch) -> Tensor:
        """Sorted ids of each list, int64 of shape (B, C, L), filled up with ids that no item has."""
        padded = [_padded(*batch.jagged(name), _NO_EVENT) for name in self.lists]
        longest = max((part.shape[1] for part in padded), default=0)
        lists_BCL = torch.full((len(batch), len(self.lists), longest), _NO_EVENT)
        for place, part in enumerate(padded):
            lists_BCL[:, place, : part.shape[1]] = part
        return lists_BCL.masked_fill_(lists_BCL <= OUT_OF_VOCABULARY_ID, _NO_EVENT).sort(2).values

    def item_values(self, batch: Batch) -> Tensor:
        """Ids of an item's features one behind the other, int64 of shape (I, A), filled up with ids no list has."""
        values_IA = torch.full((len(batch), self.num_values), _NO_VALUE)
        for name, place in self.places.items():
            if name in self.columns:
                values_IA[:, place] = batch.ids_BF[:, self.columns[name], None]
            else:
                part = _padded(*batch.jagged(name), _NO_VALUE)[:, :VALUES]
                values_IA[:, place.start : place.start + part.shape[1]] = part
        return values_IA

    def forward(self, lists_BCL: Tensor, values: Tensor) -> Tensor:
        """counts_BMF of each user's M items, given as (B, M, A), or as (M, A): the same items for all users."""
        rows = lists_BCL.shape[0]
        values_BMA = values.expand(rows, *values.shape[-2:])
        counts = []
        for place, columns in self.meetings:
            list_BL = lists_BCL[:, place].contiguous()
            wanted_BN = values_BMA[:, :, columns].flatten(1).contiguous()
            times_BN = torch.searchsorted(list_BL, wanted_BN, right=True) - torch.searchsorted(list_BL, wanted_BN)
            count_BM = times_BN.view(rows, values_BMA.shape[1], -1).sum(2).float()
            counts += [(count_BM > 0).float(), count_BM.log1p()]
        return torch.stack(counts, 2) if counts else values_BMA.new_zeros((*values_BMA.shape[:2], 0)).float()


def _padded(values: Tensor, lengths_B: Tensor, filler: int) -> Tensor:
    """Lists one below the other, (B, longest)."""
    rows, longest = len(lengths_B), int(lengths_B.max()) if len(lengths_B) else 0
    padded = torch.full((rows, longest), filler)
    row = torch.arange(rows).repeat_interleave(lengths_B)
    place = torch.arange(len(values)) - (lengths_B.cumsum(0) - lengths_B).repeat_interleave(lengths_B)
    padded[row, place] = values
    return padded
