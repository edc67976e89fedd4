"""What retrieval hands on: what it finds of what may be recommended, or what stands in where it is late or fails."""

# Shapes: U users, I items, C candidates of a user, K results.

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.data.encoders import Encoders
from fullrank.funnel.catalogue import NO_ROW, Catalogue, most_shown
from fullrank.funnel.deadline import Deadline, log
from fullrank.funnel.ranking import Terms, in_front
from fullrank.funnel.stages import RETRIEVAL
from fullrank.retrieval.base import NO_ITEM, Retriever, SearchResult


class Candidates:
    """The first stage of a funnel.

    Args:
        encoders: of training; they know how often each item was shown.
        items: catalogue.
        retriever: with the active items of the catalogue.
    """

    def __init__(self, encoders: Encoders, items: Catalogue, retriever: Retriever) -> None:
        self._encoders, self._items, self.retriever = encoders, items, retriever

    def __call__(
        self, users: Batch, count: int, deadline: Deadline, terms: Terms
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows of the catalogue (U, C), items scored for each user, and whether they were found in time, shape (U, 1),
        None for all."""
        end, count_U = deadline.of(RETRIEVAL), len(users)
        if not deadline.is_over():
            try:
                found = self.searched(users, count, terms)
            except Exception:
                log.warning("retrieval failed; the most shown items stand in", exc_info=True)
            else:
                items_UC, in_time = self._items.places(found.item_keys_BK), deadline.clock() <= end
                if in_time and not bool(found.scores_BK.isnan().any()):
                    return items_UC, found.cost_B, None
                spoilt_U = (found.scores_BK.isnan() | ~found.found_BK).all(1) & found.found_BK.any(1)
                usual_UC = self._usual(count_U, items_UC.shape[1], terms)
                items_UC = torch.where(spoilt_U[:, None], usual_UC, items_UC)
                return items_UC, found.cost_B, ~spoilt_U[:, None] & in_time
        usual_UC, nothing_U = self._usual(count_U, count, terms), torch.zeros(count_U, dtype=torch.int64)
        return usual_UC[:, (usual_UC != NO_ROW).any(0)], nothing_U, torch.zeros(count_U, 1, dtype=torch.bool)

    @torch.inference_mode()
    def searched(self, users: Batch, count: int, terms: Terms) -> SearchResult:
        """What retrieval finds for users, of what may be recommended to them."""
        allowed_I, filters = terms.allowed_I, self.retriever.filters
        asked = count if terms.excluded_UE is None else count + terms.excluded_UE.shape[1]
        if allowed_I is None:
            found = self.retriever.search(users, asked)
        elif filters:
            found = self.retriever.search(users, asked, allowed=self._items.keys_I[allowed_I])
        else:
            # One that cannot filter ranks all that it has.
            found = self.retriever.search(users, len(self._items))
        if terms.excluded_UE is None and (allowed_I is None or filters):
            return found
        rows_UC = self._items.places(found.item_keys_BK)
        kept_UC = ~terms.out(rows_UC)
        if allowed_I is not None:
            kept_UC &= allowed_I[rows_UC]
        order_UC, none_UC = in_front(kept_UC, count)
        return SearchResult(
            found.item_keys_BK.gather(1, order_UC).masked_fill(none_UC, NO_ITEM),
            found.scores_BK.gather(1, order_UC).masked_fill(none_UC, -torch.inf),
            found.cost_B,
        )

    def _usual(self, users: int, count: int, terms: Terms) -> Tensor:
        """What is handed on where retrieval cannot, shape (users, count), `NO_ROW` behind the last."""
        usual_C = self._usual_I if terms.allowed_I is None else self._usual_I[terms.allowed_I[self._usual_I]]
        usual_UC = terms.left(usual_C.expand(users, -1), count)
        return F.pad(usual_UC, (0, count - usual_UC.shape[1]), value=NO_ROW)

    @cached_property
    def _usual_I(self) -> Tensor:
        """The active rows of the catalogue, the most shown first."""
        return most_shown(self._items, self._encoders)
