"""From one foundation model to many small served models: labels, and embeddings of what users did, that it leaves.

Names are imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fullrank.transfer.codec import MatryoshkaCodec
    from fullrank.transfer.config import TransferConfig, read_transfer
    from fullrank.transfer.embedding_log import ALL_VERSIONS, EmbeddingLog, LeakageError
    from fullrank.transfer.external import ExternalDistillation, soft_label_bce
    from fullrank.transfer.gain import Compared, transfer_ratio
    from fullrank.transfer.histories import HistoryPooling, history_columns
    from fullrank.transfer.lookup import HistorySequence
    from fullrank.transfer.scoring import TeacherScorer
    from fullrank.transfer.student import Student, export_student
    from fullrank.transfer.tap import EmbeddingTap
    from fullrank.transfer.teacher_labels import TeacherLabelLog

_PLACES = {
    "ALL_VERSIONS": "embedding_log",
    "Compared": "gain",
    "EmbeddingLog": "embedding_log",
    "EmbeddingTap": "tap",
    "ExternalDistillation": "external",
    "HistoryPooling": "histories",
    "HistorySequence": "lookup",
    "LeakageError": "embedding_log",
    "MatryoshkaCodec": "codec",
    "Student": "student",
    "TeacherLabelLog": "teacher_labels",
    "TeacherScorer": "scoring",
    "TransferConfig": "config",
    "export_student": "student",
    "history_columns": "histories",
    "read_transfer": "config",
    "soft_label_bce": "external",
    "transfer_ratio": "gain",
}

__all__ = [
    "ALL_VERSIONS",
    "Compared",
    "EmbeddingLog",
    "EmbeddingTap",
    "ExternalDistillation",
    "HistoryPooling",
    "HistorySequence",
    "LeakageError",
    "MatryoshkaCodec",
    "Student",
    "TeacherLabelLog",
    "TeacherScorer",
    "TransferConfig",
    "export_student",
    "history_columns",
    "read_transfer",
    "soft_label_bce",
    "transfer_ratio",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
