"""Embeddings of a large model as short codes of which every trained prefix is a code too."""

# Shapes: n rows, I width of the embedding, D width of the code, C bytes of a code.

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from fullrank.data import atomic

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Bits = Literal[4, 32]

# A standard deviation below this is that of a unit that never fires: it is left as it is, not blown up.
LEAST_DEVIATION = 1e-6
ROWS_AT_ONCE = 8192


def code_bytes(dim: int, bits: int) -> int:
    """C: bytes of a code of `dim` numbers."""
    return -(-dim * bits // 8)


def pack(z_nD: Floats, bits: int = 4) -> Bytes:
    """Codes_nC of numbers in [-1, 1].

    In 4 bits q = clip(round(8 z), -8, 7), two to a byte, the even place in the low half; in 32 they are kept as they
    are.
    """
    if bits == 32:
        return np.ascontiguousarray(z_nD, np.float32).view(np.uint8)
    q_nD = (np.clip(np.rint(8 * z_nD), -8, 7) + 8).astype(np.uint8)
    if q_nD.shape[1] % 2:
        q_nD = np.pad(q_nD, ((0, 0), (0, 1)))
    codes_nC: Bytes = q_nD[:, 0::2] | np.left_shift(q_nD[:, 1::2], np.uint8(4))
    return codes_nC


def unpack(codes_nC: Bytes, dim: int, bits: int = 4) -> Floats:
    """The numbers of codes, shape (n, D)."""
    if bits == 32:
        return np.ascontiguousarray(codes_nC).view(np.float32)[:, :dim]
    q_nD = np.empty((codes_nC.shape[0], 2 * codes_nC.shape[1]), np.float32)
    q_nD[:, 0::2], q_nD[:, 1::2] = codes_nC & 15, codes_nC >> 4
    q_nD -= 8
    q_nD /= 8
    return q_nD[:, :dim]


class MatryoshkaCodec(nn.Module):
    """z = tanh(Enc((e - mean) / std)), trained on Σ_d ‖e' - Dec(z_1:d, 0)‖² over the widths d of its prefixes.

    The decoder is linear and shared by all prefixes: the rest of a code counts as 0. Mean and deviation of e, which
    differ widely between the units of a ReLU layer, are those of the rows that it was fitted to, and stay.

    Args:
        dim_in: I.
        dim: D.
        prefix_dims: widths that a reader may cut a code to; D is one of them anyway.
        bits: 4, or 32 for codes that are not rounded.
        hidden: of the encoder.

    Raises:
        ValueError: if a prefix is longer than the code, or a width is below 1.

    Source: LoopFM, arXiv 2605.29280; Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022.
    """

    mean_I: Tensor
    std_I: Tensor

    def __init__(
        self, dim_in: int, dim: int, prefix_dims: Sequence[int] = (), bits: Bits = 4, hidden: int = 64
    ) -> None:
        super().__init__()
        prefixes = tuple(sorted({*prefix_dims, dim}))
        if prefixes[0] < 1 or prefixes[-1] > dim or dim_in < 1:
            raise ValueError(f"prefix_dims are {list(prefix_dims)}, expected widths from 1 to dim, {dim}")
        if bits not in (4, 32):
            raise ValueError(f"bits is {bits}, expected 4 or 32")
        self.dim_in, self.dim, self.prefix_dims, self.bits, self.hidden = dim_in, dim, prefixes, bits, hidden
        self.encoder = nn.Sequential(nn.Linear(dim_in, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.Tanh())
        self.decoder = nn.Linear(dim, dim_in)
        self.register_buffer("mean_I", torch.zeros(dim_in))
        self.register_buffer("std_I", torch.ones(dim_in))

    def forward(self, e_nI: Tensor) -> Tensor:
        """z_nD, not rounded. No gradient reaches what made e."""
        z_nD: Tensor = self.encoder((e_nI.detach() - self.mean_I) / self.std_I)
        return z_nD

    def reconstruction_error(self, e_nI: Tensor, z_nD: Tensor | None = None) -> dict[int, Tensor]:
        """Mean squared error of the standardised embedding by the width of the prefix that it is made from."""
        z_nD = self(e_nI) if z_nD is None else z_nD
        target_nI = (e_nI.detach() - self.mean_I) / self.std_I
        found = {}
        for width in self.prefix_dims:
            decoded_nI = torch.nn.functional.linear(z_nD[:, :width], self.decoder.weight[:, :width], self.decoder.bias)
            found[width] = (target_nI - decoded_nI).square().mean()
        return found

    def fit(
        self, e_nI: Tensor, *, epochs: int = 10, batch_size: int = 256, learning_rate: float = 2e-3, seed: int = 0
    ) -> Self:
        """Fit to embeddings, shape (n, I).

        Raises:
            ValueError: if there are none, their width is another, or one is not finite.
        """
        if e_nI.ndim != 2 or e_nI.shape[1] != self.dim_in or not len(e_nI):
            raise ValueError(f"embeddings have shape {tuple(e_nI.shape)}, expected (n, {self.dim_in}) with n >= 1")
        if not bool(torch.isfinite(e_nI).all()):
            raise ValueError("embeddings have NaN or infinity, expected finite numbers")
        e_nI = e_nI.detach().float()
        std_I = e_nI.std(0, correction=0)
        self.mean_I.copy_(e_nI.mean(0))
        self.std_I.copy_(torch.where(std_I > LEAST_DEVIATION, std_I, 1.0))
        optimizer = torch.optim.Adam(self.parameters(), learning_rate)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order_n = torch.randperm(len(e_nI), generator=generator)
            for begin in range(0, len(e_nI), batch_size):
                optimizer.zero_grad()
                errors = self.reconstruction_error(e_nI[order_n[begin : begin + batch_size]])
                loss = torch.stack(list(errors.values())).sum()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return self.requires_grad_(False)

    @torch.no_grad()
    def encode(self, e_nI: Tensor) -> Bytes:
        """Codes_nC."""
        if e_nI.ndim != 2 or e_nI.shape[1] != self.dim_in:
            raise ValueError(f"embeddings have shape {tuple(e_nI.shape)}, expected (n, {self.dim_in})")
        e_nI, starts = e_nI.float(), range(0, len(e_nI), ROWS_AT_ONCE)
        parts = [pack(self(e_nI[begin : begin + ROWS_AT_ONCE]).numpy(), self.bits) for begin in starts]
        return np.concatenate(parts) if parts else np.empty((0, code_bytes(self.dim, self.bits)), np.uint8)

    def decode(self, codes_nC: Bytes, prefix: int | None = None) -> Tensor:
        """z of codes, shape (n, D) or (n, prefix).

        Raises:
            ValueError: if the prefix is none of those it was trained for.
        """
        width = check_prefix(prefix, self.dim, self.prefix_dims)
        return torch.from_numpy(unpack(codes_nC, self.dim, self.bits)[:, :width].copy())

    def save(self, path: Path) -> None:
        """Write the codec as one safetensors file."""
        config = {"dim_in": self.dim_in, "dim": self.dim, "prefix_dims": self.prefix_dims, "bits": self.bits}
        about = {"codec": json.dumps({**config, "hidden": self.hidden})}
        atomic.write_bytes(path, to_safetensors(dict(self.state_dict()), metadata=about))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises:
        ValueError: if the file is no codec.
        """
        try:
            with safe_open(path, framework="pt") as file:
                codec = cls(**json.loads((file.metadata() or {})["codec"]))
                codec.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no codec of embeddings: {error}") from None
        return codec.requires_grad_(False)


def check_prefix(prefix: int | None, dim: int, prefix_dims: Sequence[int]) -> int:
    """The width that a reader asks for.

    Raises:
        ValueError: if it is none of those that were trained.
    """
    if prefix is None:
        return dim
    if prefix not in prefix_dims:
        raise ValueError(f"prefix is {prefix}, expected one of {', '.join(map(str, prefix_dims))}")
    return prefix
