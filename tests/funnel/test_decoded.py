"""Raw values of encoded rows are encoded to what they were."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.encoders import Encoders
from fullrank.data.loader import partial_batch
from fullrank.funnel import Funnel, Request
from fullrank.funnel.decoded import Decoder
from fullrank.funnel.recent_events import Event
from fullrank.schema import MISSING_ID, OUT_OF_VOCABULARY_ID, Schema

NOW = 1_700_000_000


def again(raw: list[dict[str, Any]], encoders: Encoders) -> Batch:
    return partial_batch(encoders.transform(pl.DataFrame(raw), allow_missing=True), encoders.schema)


def known(ids_BF: Tensor) -> Tensor:
    """What is outside of a vocabulary has no value, and is missing."""
    return ids_BF.masked_fill(ids_BF == OUT_OF_VOCABULARY_ID, MISSING_ID)


def test_decoded_rows_are_encoded_to_what_they_were(funnel: Funnel) -> None:
    encoders = funnel.encoders
    is_item = torch.tensor([feature.role == "item" for feature in encoders.schema.categorical])
    events = [Event(item, NOW + item, {"click": 1.0}) for item in range(5)]
    rows = funnel.encode([Request(3), Request(7, events=events), Request("nobody", {"device": 1})])
    found = again(Decoder(encoders, {"user", "context"})(rows), encoders)
    assert found.ids_BF[:, ~is_item].equal(known(rows.ids_BF[:, ~is_item]))
    assert found.jagged_values.equal(known(rows.jagged_values)) and found.event_values.equal(rows.event_values)
    items = funnel.items.rows.batch
    found = again(Decoder(encoders, {"item"})(items), encoders)
    assert found.ids_BF[:, is_item].equal(known(items.ids_BF[:, is_item]))
    assert found.numeric_BN.equal(items.numeric_BN)


@pytest.mark.parametrize(
    ("feature", "values"),
    [
        ({"kind": "categorical", "encoding": "raw"}, ["7", "a text", None, "007"]),
        ({"kind": "categorical", "encoding": "identity", "num_embeddings": 9}, ["0", "8", "3"]),
        ({"kind": "categorical", "encoding": "log2_bucket"}, [None, "-3", "0", "1", "2", "3", "17", "4000"]),
        ({"kind": "categorical", "encoding": "quantile", "num_embeddings": 6}, [None, *map(str, range(40))]),
        ({"kind": "multi_categorical"}, [["a", "b"], [], ["b"]]),
        ({"kind": "numeric", "encoding": "scalar", "transform": "standard"}, [1.5, -2.25, 1e6]),
        ({"kind": "numeric", "encoding": "scalar", "transform": "none", "missing_indicator": True}, [1.5, None, 0.0]),
        ({"kind": "numeric"}, [float(k % 7) for k in range(50)]),
    ],
)
def test_every_encoding_but_a_hash_comes_back(feature: dict[str, Any], values: list[Any]) -> None:
    schema = Schema.model_validate({"features": [{"name": "x", "role": "user", **feature}], "labels": [{"name": "y"}]})
    frame = pl.DataFrame({"x": values, "y": [1.0] * len(values)})
    encoders = Encoders.fit(schema, [frame])
    before = encoders.transform(frame)
    raw = Decoder(encoders, {"user"})(partial_batch(before, encoders.schema))
    after = encoders.transform(pl.DataFrame(raw, infer_schema_length=None, strict=False), allow_missing=True)
    assert after.equals(before.drop("y"))
