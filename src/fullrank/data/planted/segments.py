"""Task C: four latent segments, two under each of two, with a linear logit each."""

# Shapes: n rows, F content fields, V values of a field, S segments (4).

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import numpy as np
import polars as pl
from pydantic import Field

from fullrank.data.planted.task import Floats, IndependentRows, Ints, labelled, sigmoid
from fullrank.schema import Categorical, Label, Schema

ROUTING_FIELDS = 4


class Segments(IndependentRows):
    """Four routing fields decide the segment, the content fields the logit, by weights of the segment.

    The upper bit of the segment is the sign of a_0[x_0] + a_1[x_1] + b_0[x_0] b_1[x_1]; the lower bit is such a sign of
    x_2 and x_3 with tables of its own in each upper half, so the same values mean different things there. Both signs
    cut at the median: segments are about equally large. Within a segment the log-odds are linear:

        logit = strength / √F · Σ_f (√share · w_f[upper, x_f] + √(1-share) · w_f[upper, lower, x_f]) + base of segment

    so two segments of one half are alike, and the two halves are not. Averaged over segments the weights all but
    vanish: one linear model for everybody learns next to nothing. The segment is kept as `__true_segment`, 0 to 3.

    Attributes:
        share: part of the weights' variance that the two segments of a half have in common.
        base: standard deviation of the segments' intercepts.
    """

    name: ClassVar[str] = "segments"

    fields: int = Field(default=8, ge=1)
    values: int = Field(default=10, ge=2)
    strength: float = Field(default=2.0, gt=0)
    share: float = Field(default=0.5, ge=0, le=1)
    base: float = Field(default=0.5, ge=0)

    def log_schema(self) -> Schema:
        names = [f"routing_{i}" for i in range(ROUTING_FIELDS)] + [f"content_{i}" for i in range(self.fields)]
        return Schema(
            features=tuple(Categorical(name=n, encoding="identity", num_embeddings=self.values) for n in names),
            labels=(Label(name="click"),),
        )

    @cached_property
    def _signs(self) -> Floats:
        """Signs ±1, shape (3, V, V): of the upper bit, and of the lower bit in each half."""
        rng = self.latents()
        first, second = rng.standard_normal((2, 3, 2, self.values))
        score = first[:, 0, :, None] + first[:, 1, None, :] + second[:, 0, :, None] * second[:, 1, None, :]
        return np.where(score > np.median(score, axis=(1, 2), keepdims=True), 1.0, -1.0)

    @cached_property
    def weights_SFV(self) -> Floats:
        """Weights of every segment, mean 0 and variance `strength`²/F over the values of a field."""
        rng = self.latents(1)
        shape = (self.fields, self.values)
        upper, lower = rng.standard_normal((2, *shape)), rng.standard_normal((4, *shape))
        mixed = np.sqrt(self.share) * upper.repeat(2, 0) + np.sqrt(1 - self.share) * lower
        mixed -= mixed.mean(0)  # what all segments agree on
        mixed -= mixed.mean(2, keepdims=True)
        scale = np.sqrt(np.square(mixed).mean((1, 2), keepdims=True))
        weights_SFV: Floats = self.strength / np.sqrt(self.fields) * mixed / scale
        return weights_SFV

    @cached_property
    def base_S(self) -> Floats:
        return self.base * self.latents(2).standard_normal(4)

    def segment(self, routing_n4: Ints) -> Ints:
        """Segment of rows, 0 to 3; the upper bit is `segment // 2`."""
        x = routing_n4
        upper = (self._signs[0, x[:, 0], x[:, 1]] > 0).astype(np.int64)
        lower = (self._signs[1 + upper, x[:, 2], x[:, 3]] > 0).astype(np.int64)
        segment: Ints = 2 * upper + lower
        return segment

    def logit(self, routing_n4: Ints, content_nF: Ints) -> Floats:
        """True log-odds of rows, shape (n,)."""
        segment = self.segment(routing_n4)
        weights = self.weights_SFV[segment[:, None], np.arange(self.fields), content_nF]
        logit: Floats = self.base_S[segment] + weights.sum(1)
        return logit

    def block(self, rng: np.random.Generator, rows: int, first: int) -> pl.DataFrame:
        x = rng.integers(0, self.values, (rows, ROUTING_FIELDS + self.fields))
        routing, content = x[:, :ROUTING_FIELDS], x[:, ROUTING_FIELDS:]
        columns = dict(zip((feature.name for feature in self.log_schema().features), x.T, strict=True))
        frame = labelled(rng, columns, click=sigmoid(self.logit(routing, content)))
        return frame.with_columns(pl.Series("__true_segment", self.segment(routing), dtype=pl.Float32))
