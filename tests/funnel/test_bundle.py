"""Facts about bundles."""

from __future__ import annotations

import json
import os
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fullrank.funnel import Funnel, Request, load_bundle, save_bundle
from fullrank.funnel.bundle import read_manifest


@pytest.fixture(scope="module")
def saved(funnel: Funnel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    save_bundle(funnel, path, about={"seed": 3})
    return path


@pytest.fixture
def bundle(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


def change(bundle: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    edit(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_an_opened_bundle_answers_as_the_funnel_that_was_saved(funnel: Funnel, saved: Path) -> None:
    requests = [Request(3), Request("stranger", {"device": 2}), Request()]
    opened = load_bundle(saved)
    assert opened.recommend(requests, 20) == funnel.recommend(requests, 20)
    assert opened.score(Request(3), [1, "new"]) == funnel.score(Request(3), [1, "new"])
    assert read_manifest(saved).about == {"seed": 3}


def test_a_bundle_of_the_first_version_is_read(funnel: Funnel, bundle: Path) -> None:
    def older(manifest: dict[str, Any]) -> None:
        manifest["version"] = 1
        for stage in manifest["stages"]:
            del stage["defined_in"]

    change(bundle, older)
    assert load_bundle(bundle).recommend([Request(3)], 5) == funnel.recommend([Request(3)], 5)


def test_every_single_changed_byte_is_refused_and_named(saved: Path, bundle: Path) -> None:
    for name in json.loads((saved / "manifest.json").read_text())["files"]:
        content = (saved / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[place] ^= 1
            (bundle / name).write_bytes(changed)
            with pytest.raises(ValueError, match="does not match its hash") as caught:
                load_bundle(bundle)
            assert str(bundle / name) in str(caught.value)
        (bundle / name).write_bytes(content)
    load_bundle(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "items.parquet").unlink()
    with pytest.raises(ValueError, match=r"items.parquet is missing from the bundle"):
        load_bundle(bundle)


def test_a_file_that_the_manifest_does_not_list_is_refused(bundle: Path) -> None:
    (bundle / "encoders" / "extra.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"extra.parquet is not listed in manifest.json"):
        load_bundle(bundle)


@pytest.mark.parametrize("outside", ["../secret", "/etc/hostname", "encoders/../../secret", "a\\..\\..\\b"])
def test_a_path_outside_the_bundle_is_refused(bundle: Path, outside: str) -> None:
    (bundle.parent / "secret").write_text("x")
    change(bundle, lambda manifest: manifest["files"].update({outside: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(ValueError, match="lies outside the bundle"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", ["items.parquet", "encoders"])
def test_a_link_out_of_the_bundle_is_refused(bundle: Path, name: str) -> None:
    shutil.move(bundle / name, bundle.parent / "elsewhere")
    os.symlink(bundle.parent / "elsewhere", bundle / name)
    with pytest.raises(ValueError, match="lies outside the bundle"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.update(version=9, made_by="fullrank 9"),
            "version is 9 (made by fullrank 9), this release reads 1 and 2",
        ),
        (lambda m: m.update(extra=1), "extra: unknown key"),
        (lambda m: m.pop("stages"), "stages: Field required"),
        (lambda m: m["stages"].pop(0), "no stage retrieval"),
        (lambda m: m["stages"].pop(1), "early.safetensors belongs to no stage"),
        (lambda m: m["stages"].reverse(), "stage retrieval is not the first"),
        (lambda m: m["stages"][1].update(stage="../early"), "'../early' is no name of a stage"),
        (lambda m: m["stages"][1].update(stage="other"), "no file other.safetensors"),
        (lambda m: m["sizes"].update(keep=[30, 20]), "keep has 2 sizes for 1 early stages"),
        (lambda m: m["sizes"].update(keep=0), "sizes: keep"),
        (lambda m: m["stages"][0]["config"].update(output_dim=8), "manifest.json differ in the configuration"),
        (lambda m: m["stages"][2].update(kind="os.system"), 'ranker "os.system" is unknown'),
        (lambda m: m["stages"][0].update(kind="magic"), 'retriever "magic" is unknown'),
        (lambda m: m["stages"][2]["config"].update(hidden=[32]), "does not fit the din of the manifest"),
        (lambda m: m["stages"][2]["config"].update(hiden=[32]), "hiden: unknown key"),
        (lambda m: m.update(value="__import__('os').system('true')"), "Call is not allowed"),
        (
            lambda m: m["slate"]["policy"].update(name="os.system"),
            'slate: policy.name: slot policy "os.system" is unknown',
        ),
        (lambda m: m["slate"].update(diversity={"by": "category", "at_most": 0}), "slate: diversity.0.at_most"),
        (lambda m: m["slate"].update(diversity={"by": "x", "at_most": 1}), 'slate.diversity.by: "x" is no'),
        (lambda m: m["files"].pop("users.parquet"), "users.parquet is not listed"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    bundle: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    change(bundle, edit)
    with pytest.raises(ValueError) as caught:
        load_bundle(bundle)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_json_is_refused(bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"version": 1,')
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        load_bundle(bundle)


def test_a_directory_without_manifest_is_no_bundle(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"is not a bundle: it has no manifest.json; did you mean {bundle}"):
        load_bundle(tmp_path)
    with pytest.raises(ValueError, match=r"it has no manifest.json$"):
        load_bundle(tmp_path / "nothing")


def test_an_existing_directory_is_replaced_only_when_asked(funnel: Funnel, bundle: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        save_bundle(funnel, bundle)
    assert (bundle / "manifest.json").read_bytes() == before
    save_bundle(funnel, bundle, overwrite=True)
    assert load_bundle(bundle).recommend([Request(3)], 3) == funnel.recommend([Request(3)], 3)


def test_a_failed_save_leaves_nothing(funnel: Funnel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(funnel.retriever, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_bundle(funnel, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_a_pickle(saved: Path) -> None:
    for path in saved.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            with pytest.raises((ValueError, UnicodeDecodeError)):
                list(pickletools.genops(content))
