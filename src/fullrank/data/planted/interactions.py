"""Task A: the logit is a sum of products of r latent embeddings, and of nothing of lower order."""

# Shapes: n rows, F fields, V values of a field, G groups of r fields, K latent dimensions.

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from fullrank.data.planted.task import Floats, IndependentRows, Ints, labelled, sigmoid
from fullrank.schema import Categorical, Label, Schema


class Interactions(IndependentRows):
    """The fields are dealt into F/r groups at random; logit = strength · mean over groups of Σ_k Π_{f in group} e_f,k.

    (The mean is by the root of the number of groups, and each group is scaled to variance 1.)

    In every field half of the values have the embeddings of the other half, negated. Hence the distribution of the
    logit is symmetric around 0 whatever is known of fewer than r fields of a group: a model of lower order, linear,
    FM or cross, cannot do better than chance, exactly. With order 1 the logit is additive.

    Attributes:
        order: r, which divides `fields`.
        values: V of each field, even.
        latent_dim: K.
        strength: standard deviation of the logit.
    """

    name: ClassVar[str] = "order"

    order: int = Field(default=2, ge=1)
    fields: int = Field(default=12, ge=1)
    values: int = Field(default=6, ge=2)
    latent_dim: int = Field(default=2, ge=1)
    strength: float = Field(default=3.0, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.fields % self.order:
            raise ValueError(f"fields must be a multiple of order, got {self.fields} fields for order {self.order}")
        if self.values % 2:
            raise ValueError(f"values must be even (half of them negate the other half), got {self.values}")
        return self

    def log_schema(self) -> Schema:
        return Schema(
            features=tuple(
                Categorical(name=f"field_{i}", encoding="identity", num_embeddings=self.values)
                for i in range(self.fields)
            ),
            labels=(Label(name="click"),),
        )

    @cached_property
    def groups_GR(self) -> Ints:
        """Fields of each group."""
        return self.latents().permutation(self.fields).reshape(-1, self.order)

    @cached_property
    def embeddings_FVK(self) -> Floats:
        """Latent embeddings, of length √K before each group is scaled to variance 1."""
        rng = self.latents(1)
        half = rng.standard_normal((self.fields, self.values // 2, self.latent_dim))
        half *= np.sqrt(self.latent_dim) / np.linalg.norm(half, axis=2, keepdims=True)
        result = np.concatenate([half, -half], 1)
        # Fields are independent, so a group's variance is the sum of the product of their second moments.
        second_FKK = np.einsum("fvk,fvl->fkl", result, result) / self.values
        variance_G = second_FKK[self.groups_GR].prod(1).sum((1, 2))
        result[self.groups_GR[:, 0]] /= np.sqrt(variance_G)[:, None, None]
        return result

    def logit(self, values_nF: Ints) -> Floats:
        """True log-odds of rows, shape (n,)."""
        vectors_nFK = self.embeddings_FVK[np.arange(self.fields), values_nF]
        products_nGK = vectors_nFK[:, self.groups_GR].prod(2)
        logit: Floats = self.strength / np.sqrt(len(self.groups_GR)) * products_nGK.sum((1, 2))
        return logit

    def block(self, rng: np.random.Generator, rows: int, first: int) -> pl.DataFrame:
        values_nF = rng.integers(0, self.values, (rows, self.fields))
        columns = {f"field_{i}": values_nF[:, i] for i in range(self.fields)}
        return labelled(rng, columns, click=sigmoid(self.logit(values_nF)))
