"""The extras of the package: what each is for, what it installs, and one line where something of it is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Extra:
    """An extra of pyproject.toml.

    Attributes:
        use: what it is for.
        packages: module -> distribution that brings it.
        by_hand: a further command, for what an extra cannot install.
    """

    use: str
    packages: Mapping[str, str]
    by_hand: str = ""

    def missing(self) -> list[str]:
        """Distributions that are not installed; they are looked up, not imported."""
        return [name for name in self.packages.values() if not installed(name)]


# TorchRec's own metadata asks for the CUDA build of FBGEMM, whose files overwrite the CPU build's: hence --no-deps.
_TORCHREC = "pip install --no-deps torchrec==1.8.0"

EXTRAS: dict[str, Extra] = {
    "fbgemm": Extra("fused CPU kernels of embedding tables", {"fbgemm_gpu": "fbgemm-gpu-cpu"}),
    "serve": Extra(
        "HTTP service", {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
    ),
    "redis": Extra("what users did, for servers of several hosts", {"redis": "redis"}),
    "retrieval": Extra("FAISS, for large catalogues and as a baseline", {"faiss": "faiss-cpu"}),
    "ann": Extra("USearch and ScaNN, further indexes of vectors", {"usearch": "usearch", "scann": "scann"}),
    "hnswlib": Extra("hnswlib, built from source", {"hnswlib": "hnswlib"}),
    "text": Extra("vectors of texts for codes", {"wordllama": "wordllama"}),
    "randomized": Extra(
        "estimators of fullrank.randomized",
        {
            "sklearn": "scikit-learn",
            "scipy": "scipy",
            "dask": "dask",
            "distributed": "distributed",
            "numba": "numba",
        },
    ),
    "report": Extra("charts, TensorBoard logs", {"matplotlib": "matplotlib", "tensorboard": "tensorboard"}),
    "distributed": Extra(
        "what TorchRec needs",
        {
            "fbgemm_gpu": "fbgemm-gpu-cpu",
            "tensordict": "tensordict",
            "torchmetrics": "torchmetrics",
            "tqdm": "tqdm",
            "pyre_extensions": "pyre-extensions",
            "torchrec": "torchrec",
        },
        by_hand=_TORCHREC,
    ),
    "onnx": Extra("rankers as ONNX files", {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}),
    "docs": Extra(
        "the documentation",
        {"mkdocs": "mkdocs", "material": "mkdocs-material", "mkdocstrings": "mkdocstrings"},
    ),
    "dev": Extra(
        "tests and checks",
        {
            "httpx": "httpx",
            "hypothesis": "hypothesis",
            "importlinter": "import-linter",
            "mypy": "mypy",
            "pytest": "pytest",
            "pytest_cov": "pytest-cov",
            "xdist": "pytest-xdist",
            "ruff": "ruff",
            "schemathesis": "schemathesis",
            "sklearn": "scikit-learn",
        },
    ),
}


class MissingExtra(ImportError, ValueError):
    """Something of an extra is not installed: its one line says what, and how to install it."""


def install(extra: str) -> str:
    """The command that installs an extra."""
    command = f"pip install 'fullrank[{extra}]'"
    return f"{command} && {EXTRAS[extra].by_hand}" if EXTRAS[extra].by_hand else command


@contextmanager
def needs(extra: str, user: str) -> Iterator[None]:
    """Around imports of what an extra brings, for the sake of `user`, the beginning of the line that is the error.

    Raises:
        MissingExtra: if a module is missing that is not of fullrank.
    """
    try:
        yield
    except MissingExtra:
        raise
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module in ("", "fullrank"):
            raise
        name = EXTRAS[extra].packages.get(module, module)
        raise MissingExtra(f"{user} needs {name}: {install(extra)}", name=error.name) from None


def installed(distribution: str) -> bool:
    """Whether a distribution is there, by its metadata."""
    from importlib import metadata  # 10 ms that no other command has to wait for

    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
