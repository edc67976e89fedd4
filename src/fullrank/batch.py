"""The one tensor container that flows through every model."""

# Shapes: B rows, N numeric columns, F single-id features, K jagged keys, E event-number keys, T tasks.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fullrank.extras import needs

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class Batch:
    """Rows of a log as tensors. Columns follow the schema's order (`Schema.numeric_columns`, `.categorical`,
    `.jagged_keys`, `.event_number_keys`, `.labels`).

    Attributes:
        numeric_BN: float32, transformed numbers.
        ids_BF: int64, one row id per single-id feature.
        jagged_values: int64, shape (sum of jagged_lengths_KB,): the ids of key 0 for all rows, then of key 1, ...;
            within a row oldest first for sequences. The layout of TorchRec's `KeyedJaggedTensor`.
        jagged_lengths_KB: int64, number of ids of each key in each row.
        event_values: float32, shape (sum of event_lengths_EB,): numbers carried by sequence events, laid out alike.
        event_lengths_EB: int64.
        labels_BT: float32; NaN where a label was not observed.
        weights_B: float32 importance of the rows, or None for equal weights.
        timestamp_B: int64 seconds since 1970, or None.
        user_B: int64 key that groups the rows of one user (GAUC), or None.
    """

    numeric_BN: Tensor
    ids_BF: Tensor
    jagged_keys: tuple[str, ...]
    jagged_values: Tensor
    jagged_lengths_KB: Tensor
    event_keys: tuple[str, ...]
    event_values: Tensor
    event_lengths_EB: Tensor
    labels_BT: Tensor
    weights_B: Tensor | None = None
    timestamp_B: Tensor | None = None
    user_B: Tensor | None = None

    def __len__(self) -> int:
        return self.ids_BF.shape[0]

    @property
    def device(self) -> torch.device:
        return self.ids_BF.device

    def jagged(self, key: str) -> tuple[Tensor, Tensor]:
        """Values and lengths_B of one jagged key.

        Raises:
            KeyError: if the batch has no such key.
        """
        return _jagged(self.jagged_keys, self.jagged_values, self.jagged_lengths_KB, key)

    def events(self, key: str) -> tuple[Tensor, Tensor]:
        """Numbers and lengths_B of one event-number key.

        Raises:
            KeyError: if the batch has no such key.
        """
        return _jagged(self.event_keys, self.event_values, self.event_lengths_EB, key)

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def __getitem__(self, rows: slice) -> Batch:
        """A contiguous slice of rows (step 1)."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"a Batch can be sliced with step 1 only, got {step}")
        stop = max(start, stop)

        def cut(values: Tensor, lengths_KB: Tensor) -> tuple[Tensor, Tensor]:
            if lengths_KB.shape[0] == 0:
                return values, lengths_KB[:, start:stop]
            ends = lengths_KB.reshape(-1).cumsum(0)
            offsets = torch.cat([ends.new_zeros(1), ends])
            size = lengths_KB.shape[1]
            pieces = [
                values[offsets[key * size + start] : offsets[key * size + stop]] for key in range(lengths_KB.shape[0])
            ]
            return torch.cat(pieces), lengths_KB[:, start:stop].contiguous()

        jagged_values, jagged_lengths_KB = cut(self.jagged_values, self.jagged_lengths_KB)
        event_values, event_lengths_EB = cut(self.event_values, self.event_lengths_EB)
        return Batch(
            numeric_BN=self.numeric_BN[start:stop],
            ids_BF=self.ids_BF[start:stop],
            jagged_keys=self.jagged_keys,
            jagged_values=jagged_values,
            jagged_lengths_KB=jagged_lengths_KB,
            event_keys=self.event_keys,
            event_values=event_values,
            event_lengths_EB=event_lengths_EB,
            labels_BT=self.labels_BT[start:stop],
            weights_B=None if self.weights_B is None else self.weights_B[start:stop],
            timestamp_B=None if self.timestamp_B is None else self.timestamp_B[start:stop],
            user_B=None if self.user_B is None else self.user_B[start:stop],
        )

    def keyed_jagged_tensor(self) -> KeyedJaggedTensor:
        """The jagged part as TorchRec's container, sharing memory with this batch (needs torchrec)."""
        with needs("distributed", "a KeyedJaggedTensor"):
            from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        return KeyedJaggedTensor(
            keys=list(self.jagged_keys), values=self.jagged_values, lengths=self.jagged_lengths_KB.reshape(-1)
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            changed[field.name] = change(value) if isinstance(value, Tensor) else value
        return Batch(**changed)


def _jagged(keys: tuple[str, ...], values: Tensor, lengths_KB: Tensor, key: str) -> tuple[Tensor, Tensor]:
    if key not in keys:
        raise KeyError(f'no jagged key "{key}"; this batch has {", ".join(keys) or "none"}')
    index = keys.index(key)
    if len(keys) == 1:
        return values, lengths_KB[0]
    begin = int(lengths_KB[:index].sum())
    return values[begin : begin + int(lengths_KB[index].sum())], lengths_KB[index]
