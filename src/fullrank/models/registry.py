"""The rankers by name, and how recipes, ensembles and funnels name one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel

from fullrank.embeddings import TableConfig
from fullrank.models.base import Ranker
from fullrank.registry import Registry, Spec
from fullrank.schema import Schema

if TYPE_CHECKING:
    from fullrank.data.encoders import Encoders

# A class is imported when it is asked for: some need PyTorch's compiler, 0.7 s and 40 MB.
RANKERS: Registry[type[Ranker]] = Registry(
    "ranker",
    "fullrank.rankers",
    {
        "lr": "fullrank.models.lr:LR",
        "fm": "fullrank.models.fm:FM",
        "deepfm": "fullrank.models.deepfm:DeepFM",
        "dcn_v2": "fullrank.models.dcn_v2:DCNv2",
        "dlrm": "fullrank.models.dlrm:DLRM",
        "autoint": "fullrank.models.autoint:AutoInt",
        "finalmlp": "fullrank.models.finalmlp:FinalMLP",
        "din": "fullrank.models.din:DIN",
        "bst": "fullrank.models.bst:BST",
        "dien": "fullrank.models.dien:DIEN",
        "transact": "fullrank.models.transact:TransAct",
        "mmoe": "fullrank.models.mmoe:MMoE",
        "ple": "fullrank.models.ple:PLE",
        "cetnet": "fullrank.models.cetnet:CETNet",
        "multi_embedding": "fullrank.models.cetnet:MultiEmbedding",
        "wukong": "fullrank.models.wukong:Wukong",
        "dhen": "fullrank.models.dhen:DHEN",
        "hilomoe": "fullrank.models.hilomoe:HiLoMoE",
        "interformer": "fullrank.models.interformer:InterFormer",
        "kunlun": "fullrank.models.kunlun:Kunlun",
        "early_stage": "fullrank.models.early_stage:EarlyStageRanker",
        "student": "fullrank.transfer.student:Student",
    },
)


def register(ranker: type[Ranker]) -> type[Ranker]:
    """List a ranker under its `name`, so that recipes can ask for it and what is saved of it can be loaded.

    Usable as a decorator. A package lists its rankers for good by entry points of the group `fullrank.rankers`.

    Raises:
        ValueError: if the class has no name, or another ranker has it.
    """
    return RANKERS.register_class(ranker)


class RankerSpec(Spec):
    """A ranker's name and Config: `{name: dcn_v2, hidden: [256, 128]}`."""

    registry: ClassVar[Registry[Any]] = RANKERS

    config: Ranker.Config

    def fitted(self, encoders: Encoders) -> Self:
        """The same with what its tables take from the training counts of their values; see `TableConfig.fitted`.

        Tables without a vocabulary stay as they are.
        """

        def fitted(name: str, table: TableConfig) -> TableConfig:
            known = encoders.vocabularies.get(name)
            return table if known is None else table.fitted(known.id_counts)

        return self.model_copy(update={"config": _with_tables(self.config, fitted)})

    def build(self, schema: Schema) -> Ranker:
        """The model for a fitted schema.

        Raises:
            ValueError: if the schema lacks what the ranker needs.
        """
        ranker: Ranker = RANKERS[self.name].from_config(schema, self.config)
        return ranker


def _with_tables(value: Any, change: Callable[[str, TableConfig], TableConfig]) -> Any:
    """Settings of a ranker with those of its tables changed, and of the tables of rankers in it."""
    if isinstance(value, list | tuple):
        return type(value)(_with_tables(item, change) for item in value)
    if not isinstance(value, BaseModel):
        return value
    updates = {name: _with_tables(getattr(value, name), change) for name in type(value).model_fields}
    if isinstance(value, Ranker.Config):
        updates["tables"] = {name: change(name, table) for name, table in value.tables.items()}
    changed = {name: new for name, new in updates.items() if new != getattr(value, name)}
    return value.model_copy(update=changed) if changed else value


def pass_on(values: Any, field: str) -> Any:
    """Settings of a ranker that holds rankers, in which those have what it says of tables and they do not.

    For validators that run before the fields' own.

    Args:
        field: holds the mapping of one ranker, or of several.
    """
    if not isinstance(values, Mapping) or field not in values:
        return values
    shared = {name: values[name] for name in ("embedding_dim", "embedding_init", "tables") if name in values}

    def completed(inner: Any) -> Any:
        if isinstance(inner, str):
            inner = {"name": inner}
        if isinstance(inner, RankerSpec):
            inner = {"name": inner.name, **inner.config.model_dump(exclude_unset=True)}
        return {**shared, **inner} if isinstance(inner, Mapping) else inner

    held = values[field]
    several = isinstance(held, list | tuple)
    return {**values, field: [completed(inner) for inner in held] if several else completed(held)}
