"""The section `stream` of a recipe."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StreamConfig(BaseModel):
    """How a log is trained on as it happens. All times are seconds of the events, not of the clock.

    Attributes:
        window: seconds of a window. Each is first predicted, then learnt, then published.
        delta: seconds between deltas within a window, a whole part of it; null publishes bundles only.
        arrivals: the log is the files of the directory `data.source.path`, one after another as they arrive, in the
            order of their names; else it is the dataset `data.dataset`, replayed.
        extend: give new ids of arriving files rows of their own, from the next window on; else they are out of
            vocabulary.
        lateness: how long a window waits for events that arrive behind later ones.
        skew: how far ahead of the time at which its file was written an event may be; one further ahead is refused.
        keep: bundles to keep, and with each its deltas.
        rollback: if the normalised entropy (of a number the squared error) of what is served exceeds that of the model
            one window older, on the same events, by more than this share, and by more than two standard errors, what is
            served goes back to the older one; null never does.
        retrieval_every: of a funnel: windows from one fit of its retriever to the next. Between them, items are added
            and removed.
        retrieval_windows: how many of the last windows such a fit learns from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: int = Field(default=3600, ge=1)
    delta: int | None = Field(default=None, ge=1)
    arrivals: bool = False
    extend: bool = True
    lateness: int = Field(default=0, ge=0)
    skew: int = Field(default=300, ge=0)
    keep: int = Field(default=3, ge=3)
    rollback: float | None = Field(default=0.02, ge=0, allow_inf_nan=False)
    retrieval_every: int = Field(default=24, ge=1)
    retrieval_windows: int = Field(default=72, ge=1)

    @model_validator(mode="after")
    def _deltas_fill_windows(self) -> Self:
        if self.delta is not None and self.window % self.delta:
            raise ValueError(f"window is {self.window} s, expected a multiple of delta, {self.delta} s")
        return self

    @property
    def step(self) -> int:
        """Seconds of what is learnt in one go."""
        return self.delta or self.window
