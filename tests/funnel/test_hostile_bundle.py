"""Facts about bundles that are wrong inside though every hash is right: made by a broken or an evil program."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from fullrank.funnel import Funnel, load_bundle, save_bundle

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(funnel: Funnel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    save_bundle(funnel, path)
    return path


def seal(bundle: Path) -> None:
    """Write the hashes that the files now have into the manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    contents = {p.relative_to(bundle).as_posix(): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    contents.pop("manifest.json")
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def text(name: str, content: str) -> Edit:
    return lambda bundle: (bundle / name).write_text(content)


def values(name: str, edit: Callable[[Any], Any]) -> Edit:
    def apply(bundle: Path) -> None:
        content = json.loads((bundle / name).read_text())
        edit(content)
        (bundle / name).write_text(json.dumps(content))

    return apply


def table(name: str, edit: Callable[[pl.DataFrame], pl.DataFrame]) -> Edit:
    return lambda bundle: edit(pl.read_parquet(bundle / name)).write_parquet(bundle / name)


def tensors(name: str, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Edit:
    def apply(bundle: Path) -> None:
        content = edit({key: value.clone() for key, value in load_file(bundle / name).items()})
        (bundle / name).unlink()
        save_file(content, bundle / name)

    return apply


def both(*edits: Edit) -> Edit:
    return lambda bundle: [edit(bundle) for edit in edits]


def huge_tables(bundle: Path) -> None:
    """Tables of terabytes; hashed, so that no vocabulary contradicts them."""
    for name in ("schema.json", "encoders/encoders.json"):
        content = json.loads((bundle / name).read_text())
        for feature in content.get("table_schema", content)["features"]:
            if feature["name"] == "gender":
                feature.update(encoding="hash", num_embeddings=2**40)
        if "vocabularies" in content:
            (bundle / "encoders" / content["vocabularies"].pop("gender")).unlink()
        (bundle / name).write_text(json.dumps(content))


def column(name: str, value: Any, dtype: Any) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda frame: frame.with_columns(pl.lit(value, dtype=dtype).alias(name))


INDEX = "retrieval/retriever.safetensors"
CASES: dict[str, tuple[Edit, str]] = {
    "schema: deep": (text("schema.json", "[" * 200_000), "schema.json"),
    "encoders: deep": (text("encoders/encoders.json", "[" * 200_000), "encoders"),
    "encoders: not an object": (text("encoders/encoders.json", "[]"), "encoders.json"),
    **{
        f"encoders: vocabulary file {name!r}": (
            values("encoders/encoders.json", lambda v, name=name: v["vocabularies"].update(device=name)),
            "lies outside the directory|is not a readable vocabulary",
        )
        for name in ("", "..", "../items.parquet", "/etc/hostname", "vocabulary*.parquet")
    },
    "retriever: deep": (text("retrieval/retriever.json", "[" * 200_000), "retrieval"),
    "retriever: wrong type": (
        values("retrieval/retriever.json", lambda v: v["config"].update(hidden="x")),
        r"retriever.json: config: hidden: .*got 'x'",
    ),
    "retriever: a terabyte": (
        values("retrieval/retriever.json", lambda v: v["config"].update(output_dim=10**12)),
        "does not fit the schema",
    ),
    "tables: a terabyte": (huge_tables, r"early.safetensors does not fit .*gender.weight has shape"),
    "layers: a terabyte": (
        values("manifest.json", lambda v: v["stages"][2]["config"].update(hidden=[10**11])),
        r"final.safetensors does not fit .* expected \[100000000000",
    ),
    "layers: negative": (
        values("manifest.json", lambda v: v["stages"][2]["config"].update(hidden=[-1])),
        r"stage final: hidden.0: .*got -1",
    ),
    "a stage twice": (values("manifest.json", lambda v: v["stages"].append(v["stages"][2])), "a stage occurs twice"),
    "a deep formula": (values("manifest.json", lambda v: v.update(value="-" * 990 + "click")), "more than 200"),
    "labels: none": (
        both(
            values("schema.json", lambda v: v.update(labels=[])),
            values("encoders/encoders.json", lambda v: v["table_schema"].update(labels=[])),
        ),
        "at least one label",
    ),
    "items: no rows": (table("items.parquet", lambda frame: frame[:0]), "items.parquet .* at least one row"),
    "items: no columns": (
        table("items.parquet", lambda frame: frame.select(frame.columns[0])),
        'items.parquet: column "price" of the schema is missing',
    ),
    "items: id out of range": (
        table("items.parquet", column("item_id", 10**8, pl.Int32)),
        'items.parquet .*"item_id" has id 100000000, expected 0 to',
    ),
    "items: id below zero": (table("items.parquet", column("item_id", -5, pl.Int32)), 'items.parquet .*"item_id"'),
    "items: no key": (table("items.parquet", column("__item_id", None, pl.Int64)), "an integer or text in each row"),
    "items: half a key": (table("items.parquet", column("__item_id", 0.5, pl.Float64)), "an integer or text"),
    "items: bid as text": (table("items.parquet", column("__bid", "1", pl.String)), '"__bid" is String, expected num'),
    "items: a negative bid": (table("items.parquet", column("__bid", -1.0, pl.Float32)), r"__bid. of item .* is -1.0"),
    "items: a bid that is NaN": (table("items.parquet", column("__bid", float("nan"), pl.Float32)), "is nan, expected"),
    "items: an infinite bid": (table("items.parquet", column("__bid", float("inf"), pl.Float64)), "is inf, expected"),
    "items: a missing bid": (
        table("items.parquet", column("__bid", None, pl.Float32)),
        "is None, expected a number >= 0",
    ),
    "items: no bid": (table("items.parquet", lambda frame: frame.drop("__bid")), '"__bid" is missing, expected num'),
    "items: active as text": (table("items.parquet", column("__active", "1", pl.String)), '"__active" is String'),
    "items: fewer than indexed": (
        table("items.parquet", lambda frame: frame[5:]),
        "the index holds an item that items.parquet has not",
    ),
    "users: history out of range": (
        table(
            "users.parquet",
            lambda frame: frame.with_columns(
                pl.lit([10**8], dtype=pl.List(pl.Int32)).alias("history.item"),
                pl.lit([1], dtype=pl.List(pl.Int32)).alias("history.category"),
                pl.lit([1.0], dtype=pl.List(pl.Float32)).alias("history.age"),
            ),
        ),
        'users.parquet .*"history.item" has id 100000000',
    ),
    "context: two rows": (table("context.parquet", lambda frame: pl.concat([frame, frame])), "expected one row"),
    "context: a foreign column": (table("context.parquet", column("x", 1, pl.Int32)), "context.parquet: expected one"),
    "context: out of range": (table("context.parquet", column("device", 99, pl.Int32)), 'context.parquet .*"device"'),
    "weights: not a number": (
        tensors("final.safetensors", lambda state: {name: value * torch.nan for name, value in state.items()}),
        "final.safetensors: .* has a NaN or infinite number",
    ),
    "weights: a header of exabytes": (
        lambda bundle: (bundle / "final.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}"),
        "final.safetensors .*header",
    ),
    "weights: one missing": (
        tensors("early.safetensors", lambda state: dict(sorted(state.items())[1:])),
        "early.safetensors does not fit",
    ),
    "index: empty": (
        tensors(INDEX, lambda v: {**v, "index.keys": v["index.keys"][:0], "index.vectors": v["index.vectors"][:0]}),
        "the index holds no item",
    ),
    "index: keys of other items": (
        tensors(INDEX, lambda v: {**v, "index.keys": v["index.keys"] + 10**6}),
        "the index holds an item that items.parquet has not",
    ),
    "index: keys that are no integers": (
        tensors(INDEX, lambda v: {**v, "index.keys": v["index.keys"] + 0.5}),
        "retrieval is damaged: item keys are torch.float32",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_it_is_refused_with_one_line_that_names_the_place(saved: Path, tmp_path: Path, name: str) -> None:
    edit, message = CASES[name]
    bundle = Path(shutil.copytree(saved, tmp_path / "bundle"))
    edit(bundle)
    seal(bundle)
    with pytest.raises(ValueError, match=message) as caught:
        load_bundle(bundle)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


def test_sealing_again_changes_nothing(saved: Path, tmp_path: Path) -> None:
    """The cases above fail for what they change, not for the sealing."""
    bundle = Path(shutil.copytree(saved, tmp_path / "bundle"))
    seal(bundle)
    load_bundle(bundle)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "\ud800", ""])
def test_a_file_name_that_no_file_can_have_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    bundle = Path(shutil.copytree(saved, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest.json: file|is missing from the bundle") as caught:
        load_bundle(bundle)
    assert type(caught.value) is ValueError


def test_a_manifest_that_would_fill_the_memory_is_not_read(saved: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(saved, tmp_path / "bundle"))
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(17 << 20)
    with pytest.raises(ValueError, match="is larger than 16,777,216 bytes"):
        load_bundle(bundle)


def test_pipes_and_links_to_devices_are_not_opened(saved: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(saved, tmp_path / "bundle"))
    os.mkfifo(bundle / "extra")
    with pytest.raises(ValueError, match="extra is not listed"):
        load_bundle(bundle)
    (bundle / "extra").unlink()
    (bundle / "items.parquet").unlink()
    os.symlink("/dev/zero", bundle / "items.parquet")
    with pytest.raises(ValueError, match='"items.parquet" lies outside the bundle'):
        load_bundle(bundle)
