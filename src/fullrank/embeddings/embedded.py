"""What a collection of tables says of a batch."""

# Shapes: B rows, F tokens, L longest sequence, D width.

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fullrank.embeddings.padding import Padding


@dataclass(frozen=True)
class Embedded:
    """Vectors of one batch.

    Attributes:
        flat: float32, shape (B, sum of widths): single-id features, pooled bags, then pooled sequences,
            and behind them the further vectors of columns whose ids have several.
        widths: width of each of those tokens.
        events: vectors (sum of lengths, D) of each `<sequence>.<field>`, oldest first within a row.
        lengths: int64 lengths_B of each `<sequence>.<field>`.
    """

    flat: Tensor
    widths: tuple[int, ...]
    events: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens_BFD(self) -> Tensor:
        """The tokens of `flat` as one tensor.

        Raises:
            ValueError: if their widths differ.
        """
        if len(set(self.widths)) != 1:
            raise ValueError(f"this model needs one embedding width for all features, got {sorted(set(self.widths))}")
        return self.flat.view(self.flat.shape[0], len(self.widths), self.widths[0])

    def padded(self, key: str) -> tuple[Tensor, Tensor]:
        """history_BLD and mask_BL of one sequence field; L is the longest history of the batch (at least 1)."""
        padding = Padding.of(self.lengths[key])
        return padding.pad(self.events[key]), padding.mask_BL
