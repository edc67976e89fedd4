"""What every quantiser of content vectors can do: codes of vectors, vectors of codes, a report, and files."""

# Shapes: N vectors of width D, L levels, K codes of a level, E width of what is quantised.

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fullrank.data import atomic

FORMAT_VERSION = 1
DESCRIPTION, STATE = "quantizer.json", "quantizer.safetensors"
# Rows that are encoded together, always as many, so that a vector's codes do not depend on its company.
_CHUNK = 4096
# Distances that are worked on together.
_CACHED = 1 << 17
# Centroids whose squared distances differ by less than this share are as near; the first of them is taken.
_TIE = 1e-9


class NotFittedError(ValueError):
    """A quantiser that has no codebooks yet was asked for codes."""


class VersionMismatchError(ValueError):
    """Codes of another quantiser than the one whose codes a table has learnt."""


class Quantizer:
    """Codes of content vectors, level after level: each level quantises what the ones before it left over.

    Subclasses fit `codebooks` and may put an encoder before them and a decoder behind.

    Attributes:
        config: what `__init__` got, as JSON.
        codebooks: of each level, float32 of shape (K, E); empty before `fit`.
        continues: versions whose codes mean the same here, see `aligned_to`.
    """

    kind: ClassVar[str]
    config: dict[str, Any]
    codebooks: list[Tensor]
    input_dim: int | None = None
    continues: tuple[str, ...] = ()

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_1 .. K_L."""
        sizes: tuple[int, ...] = tuple(self.config["codebook_sizes"])
        return sizes

    def latent(self, x_ND: Tensor) -> Tensor:
        """What is quantised of a vector, (N, E)."""
        return x_ND

    def output(self, z_NE: Tensor) -> Tensor:
        """The vector that a quantised one stands for, (N, D)."""
        return z_NE

    def tensors(self) -> dict[str, Tensor]:
        """All that was learnt."""
        return {f"codebooks.{level}": codebook for level, codebook in enumerate(self.codebooks)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        self.codebooks = [tensors[f"codebooks.{level}"] for level in range(len(self.codebook_sizes))]
        self.input_dim = self.codebooks[0].shape[1]

    @torch.no_grad()
    def encode(self, x: Tensor | np.ndarray) -> Tensor:
        """Codes, int64 of shape (N, L): of each level the nearest centroid, the first one of several as near.

        A vector's codes depend on nothing but the vector. A row of which every number is NaN has no content: its codes
        are -1.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if the width is not that of `fit`, or a number is not finite; names the row.
            TypeError: if the vectors are integers.
        """
        x_ND = self._checked(x)
        codes_NL = torch.full((len(x_ND), len(self.codebooks)), -1, dtype=torch.int64)
        known_M = (~x_ND.isnan().all(1)).nonzero().squeeze(1)
        require_finite(x_ND, known_M)
        for rows_M in torch.split(known_M, _CHUNK):
            chunk = x_ND.new_zeros(_CHUNK, x_ND.shape[1])
            chunk[: len(rows_M)] = x_ND[rows_M]
            rest_NE = self.latent(chunk).double()
            for level, codebook in enumerate(self.codebooks):
                code_N = _nearest(rest_NE, codebook.double())
                codes_NL[rows_M, level] = code_N[: len(rows_M)].cpu()
                rest_NE -= codebook.double()[code_N]
        return codes_NL

    @torch.no_grad()
    def decode(self, codes_NL: Tensor) -> Tensor:
        """The vectors that codes stand for, (N, D), from as many levels as there are codes."""
        self._require_fitted()
        parts = [codebook[code_N] for codebook, code_N in zip(self.codebooks, codes_NL.unbind(1), strict=False)]
        return self.output(torch.stack(parts).sum(0))

    @torch.no_grad()
    def report(self, x: Tensor | np.ndarray) -> dict[str, Any]:
        """How well the codes of these vectors stand for them and tell them apart.

        Returns:
            rel_mse: by level, ‖X - X̂‖² / ‖X - mean‖² with the codes up to it.
            usage, perplexity: by level, share of the codes that occur, and 2 to the power of their entropy.
            unique_ratio: different tuples over vectors.
            max_collisions: vectors of the most frequent tuple.
            shared_depth: how many vectors share their first 0, 1 .. L codes, and no more, with another one.
        """
        x_ND = self._checked(x)
        require_finite(x_ND)
        codes_NL = self.encode(x_ND)
        spread = float((x_ND - x_ND.mean(0)).double().square().sum()) or 1.0
        usage, perplexity, errors = [], [], []
        depth_N = torch.zeros(len(x_ND), dtype=torch.int64)
        for level, size in enumerate(self.codebook_sizes):
            reached_ND = self.decode(codes_NL[:, : level + 1])
            errors.append(float((x_ND - reached_ND).double().square().sum()) / spread)
            share_K = torch.bincount(codes_NL[:, level], minlength=size).double() / len(codes_NL)
            usage.append(float((share_K > 0).double().mean()))
            perplexity.append(float(2 ** -(share_K * share_K.clamp_min(1e-300).log2()).sum()))
            _, of_N, count = torch.unique(codes_NL[:, : level + 1], dim=0, return_inverse=True, return_counts=True)
            depth_N += count[of_N] > 1
        return {
            "rel_mse": errors,
            "usage": usage,
            "perplexity": perplexity,
            "unique_ratio": len(count) / len(codes_NL),
            "max_collisions": int(count.max()),
            "shared_depth": torch.bincount(depth_N, minlength=len(self.codebooks) + 1).tolist(),
        }

    @property
    def version(self) -> str:
        """A hash of all that codes depend on."""
        self._require_fitted()
        digest = hashlib.sha256(json.dumps([FORMAT_VERSION, self.kind, self.config], sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, directory: Path) -> None:
        """Write `quantizer.json` and `quantizer.safetensors` into a directory, made if needed."""
        directory = Path(directory)
        description = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "config": self.config,
            "version": self.version,
            "continues": list(self.continues),
        }
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        atomic.write_bytes(directory / STATE, to_safetensors(tensors))
        atomic.write_text(directory / DESCRIPTION, json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read what `save` wrote. Runs no code from the files.

        Raises:
            ValueError: if a file is missing, damaged or of another kind.
            VersionMismatchError: if the two files are not of one quantiser.
        """
        place = Path(directory) / DESCRIPTION
        try:
            said = json.loads(place.read_text(encoding="utf-8"))
            if said["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version is {said['format_version']!r}, this release reads {FORMAT_VERSION}")
            tensors = from_safetensors((Path(directory) / STATE).read_bytes())
            if said["kind"] != cls.kind:
                raise ValueError(f"it describes a quantiser of the kind {said['kind']}, expected {cls.kind}")
            found = cls(**said["config"])
            found.restore(tensors)
            found.continues = tuple(said["continues"])
        except FileNotFoundError as error:
            raise ValueError(f"{directory} holds no quantiser: {Path(error.filename).name} is missing") from None
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{place} is damaged: {error}") from None
        if found.version != said["version"]:
            raise VersionMismatchError(
                f"{directory}: {STATE} is of version {found.version}, expected {said['version']}"
            )
        return found

    def aligned_to(self, old: Quantizer) -> Self:
        """This quantiser with the codes of each level renamed to those of an older one whose centroids they took over.

        Two centroids are the same code if they lie nearer to each other than half of what either book's centroids lie
        apart. The nearest pairs are matched first; a code without a partner takes a number that is free. What a table
        has learnt of matched codes then stays right: the new version `continues` the old one. How many items keep their
        codes, `code_churn` says.

        Raises:
            ValueError: if the codebooks have other shapes.
        """
        from fullrank.embeddings.semantic_id.matching import order_like

        shapes = [[tuple(book.shape) for book in each.codebooks] for each in (self, old)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"codebooks have shapes {shapes[0]}, those to be aligned to {shapes[1]}")
        found = type(self)(**self.config)
        tensors = self.tensors()
        for level, (new, book) in enumerate(zip(self.codebooks, old.codebooks, strict=True)):
            tensors[f"codebooks.{level}"] = new[order_like(new, book)]
        found.restore(tensors)
        found.continues = (old.version, *old.continues)
        return found

    def _require_fitted(self) -> None:
        if not self.codebooks:
            raise NotFittedError(f"this {type(self).__name__} is not fitted: call fit first")

    def _checked(self, x: Tensor | np.ndarray) -> Tensor:
        self._require_fitted()
        x_ND = as_vectors(x).to(self.codebooks[0].device)
        if x_ND.shape[1] != self.input_dim:
            raise ValueError(
                f"content vectors have width {x_ND.shape[1]}, and the quantiser was fitted to {self.input_dim}"
            )
        return x_ND


def as_vectors(x: Tensor | np.ndarray) -> Tensor:
    """Content vectors as float32 of shape (N, D).

    Raises:
        TypeError: if they are not floating-point numbers.
        ValueError: if the shape is another.
    """
    tensor = torch.as_tensor(x)
    if not tensor.is_floating_point():
        raise TypeError(f"content vectors are {tensor.dtype}, expected floating-point numbers")
    if tensor.ndim != 2 or not tensor.shape[1]:
        raise ValueError(f"content vectors have shape {tuple(tensor.shape)}, expected (items, width)")
    return tensor.float()


def fitting_vectors(x: Tensor | np.ndarray, codebook_sizes: tuple[int, ...]) -> Tensor:
    """Content vectors to fit codebooks of these sizes to.

    Raises:
        ValueError: if a number is not finite, or there are fewer vectors than codes of a level.
    """
    x_ND = as_vectors(x)
    require_finite(x_ND)
    if len(x_ND) < max(codebook_sizes):
        raise ValueError(
            f"{len(x_ND)} content vectors are too few for {max(codebook_sizes)} codes a level: take a codebook_size of "
            f"at most {len(x_ND)}"
        )
    return x_ND


def require_finite(x_ND: Tensor, rows_M: Tensor | None = None) -> None:
    """Raises:
    ValueError: if one of these rows has a number that is not finite.
    """
    wrong_M = ~(x_ND if rows_M is None else x_ND[rows_M]).isfinite().all(1)
    if bool(wrong_M.any()):
        row = int(wrong_M.nonzero()[0])
        row = row if rows_M is None else int(rows_M[row])
        raise ValueError(f"content vectors: row {row} has a number that is not finite")


def expanded(codebook_size: int | list[int] | tuple[int, ...], levels: int) -> list[int]:
    """A codebook size for each level.

    Raises:
        ValueError: if one is below 1, or there are not as many as levels.
    """
    sizes = [codebook_size] * levels if isinstance(codebook_size, int) else list(codebook_size)
    if levels < 1 or len(sizes) != levels or min(sizes) < 1:
        raise ValueError(
            f"codebook_size is {codebook_size} for {levels} levels, expected a size of at least 1 for each"
        )
    return sizes


def squared_distances(x_NE: Tensor, codebook_KE: Tensor) -> Tensor:
    """‖x - v‖² - ‖x‖², (N, K)."""
    return torch.addmm(codebook_KE.square().sum(1), x_NE, codebook_KE.T, alpha=-2)


def assigned(x_NE: Tensor, codebook_KE: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance less ‖x‖², (N,), and number of the nearest centroid: fast, to float32 rounding."""
    # As many rows at a time as leave their distances in the processor's cache: twice as fast.
    parts = torch.split(x_NE, max(64, _CACHED // len(codebook_KE)))
    nearest = [squared_distances(part, codebook_KE).min(1) for part in parts]
    return torch.cat([part.values for part in nearest]), torch.cat([part.indices for part in nearest])


def _nearest(x_NE: Tensor, codebook_KE: Tensor) -> Tensor:
    distance_NK = squared_distances(x_NE, codebook_KE)
    least_N1 = distance_NK.min(1, keepdim=True).values
    scale_N1 = x_NE.square().sum(1, keepdim=True) + codebook_KE.square().sum(1).max()
    number_K = torch.arange(len(codebook_KE), device=x_NE.device)
    return torch.where(distance_NK <= least_N1 + _TIE * scale_N1, number_K, len(codebook_KE)).min(1).values
