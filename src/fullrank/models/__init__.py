"""Rankers, one file per architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from fullrank.models.base import ParameterCount, Ranker, RankerOutput

# name -> class, in the file of the name
_CLASSES = {
    "lr": "LR",
    "fm": "FM",
    "deepfm": "DeepFM",
    "dcn_v2": "DCNv2",
    "dlrm": "DLRM",
    "autoint": "AutoInt",
    "finalmlp": "FinalMLP",
    "din": "DIN",
    "bst": "BST",
    "dien": "DIEN",
    "transact": "TransAct",
    "mmoe": "MMoE",
    "ple": "PLE",
    "cetnet": "CETNet",
    "multi_embedding": "MultiEmbedding",
    "wukong": "Wukong",
    "dhen": "DHEN",
    "hilomoe": "HiLoMoE",
    "interformer": "InterFormer",
    "kunlun": "Kunlun",
}
_FILES = {"multi_embedding": "cetnet"}


class _Registry(Mapping[str, type[Ranker]]):
    """Model classes by name. A class is imported when asked for: some need PyTorch's compiler, 0.7 s and 40 MB."""

    def __getitem__(self, name: str) -> type[Ranker]:
        class_name = _CLASSES[name]
        found: type[Ranker] = getattr(import_module(f"fullrank.models.{_FILES.get(name, name)}"), class_name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


MODELS: Mapping[str, type[Ranker]] = _Registry()


def __getattr__(name: str) -> type[Ranker]:
    for key, class_name in _CLASSES.items():
        if class_name == name:
            return MODELS[key]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["MODELS", "ParameterCount", "Ranker", "RankerOutput"]
