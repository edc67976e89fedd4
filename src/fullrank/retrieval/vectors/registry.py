"""The indexes of vectors by name, and how retrievers name one."""

from __future__ import annotations

from typing import Any, ClassVar

from fullrank.registry import Registry, Spec
from fullrank.retrieval.vectors.base import VectorIndex

VECTOR_INDEXES: Registry[type[VectorIndex]] = Registry(
    "vector index",
    "fullrank.vector_indexes",
    {
        "exact": "fullrank.retrieval.exact:ExactIndex",
        "auto": "fullrank.retrieval.vectors.auto:AutoIndex",
        "ivf": "fullrank.retrieval.vectors.ivf:IVFIndex",
        "tree": "fullrank.retrieval.vectors.clusters:TreeVectors",
        "streaming_vq": "fullrank.retrieval.vectors.clusters:StreamingVectors",
        "faiss_ivf_sq8": "fullrank.retrieval.vectors.faiss_index:FaissIVFSQ8",
        "faiss_ivf_pq": "fullrank.retrieval.vectors.faiss_index:FaissIVFPQ",
        "faiss_4bit": "fullrank.retrieval.vectors.faiss_index:Faiss4Bit",
        "faiss_ivf_4bit": "fullrank.retrieval.vectors.faiss_index:FaissIVF4Bit",
        "faiss_hnsw": "fullrank.retrieval.vectors.faiss_index:FaissHNSW",
        "hnswlib": "fullrank.retrieval.vectors.hnswlib_index:HnswlibIndex",
        "usearch": "fullrank.retrieval.vectors.usearch_index:UsearchIndex",
        "scann": "fullrank.retrieval.vectors.scann_index:ScannIndex",
    },
)


def register_index(index: type[VectorIndex]) -> type[VectorIndex]:
    """List an index under its `name`, so that recipes can ask for it.

    Usable as a decorator. A package lists its indexes for good by entry points of the group `fullrank.vector_indexes`.

    Raises:
        ValueError: if the class has no name, or another index has it.
    """
    return VECTOR_INDEXES.register_class(index)


class VectorIndexSpec(Spec):
    """An index's name and Config: `{name: faiss_ivf_sq8, probes: 96}`."""

    registry: ClassVar[Registry[Any]] = VECTOR_INDEXES

    config: VectorIndex.Config

    def build(self, width: int) -> VectorIndex:
        """The index for vectors of this width, empty.

        Raises:
            MissingExtra: if the library that it needs is not installed.
        """
        return VECTOR_INDEXES[self.name](width, self.config)
