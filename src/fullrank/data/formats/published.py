"""Published splits of the public CTR leaderboard (BARS), recognised by their columns and md5."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fullrank.data.formats.lines import bare_name, first_line, read_blocks

_TEXT_ENDINGS = (".csv", ".txt", ".tsv", ".libfm", ".libsvm", ".svm")
# `index:1` of libFM's text, the label before it, and nothing else on the line.
_ENTRIES = re.compile(r"[-+]?\d+(?:\.0+)?((?: \d+:1)+)")
_MINUS, _PLUS = re.compile(rb"^-1(?:\.0+)?(?= )", re.MULTILINE), re.compile(rb"^\+?1(?:\.0+)?(?= )", re.MULTILINE)
_VALUE = re.compile(rb":[^ \r\n]*")


@dataclass(frozen=True)
class Published:
    """One benchmark's split into files.

    Attributes:
        columns: names in the first line of each CSV file, in order.
        md5: of the file of each part.
        line_ends: those of the published files; both kinds are tried where they are not known.
        libfm: whether the CSV files were written from libFM text, row by row.
    """

    name: str
    columns: tuple[str, ...]
    md5: Mapping[str, str]
    line_ends: tuple[bytes, ...] = (b"\n",)
    libfm: bool = False


def _numbered(letter: str, last: int) -> tuple[str, ...]:
    return tuple(f"{letter}{place}" for place in range(1, last + 1))


_CRITEO = (*_numbered("I", 13), *_numbered("C", 26))
_AVAZU = (
    "id", "click", "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain",
    "app_category", "device_id", "device_ip", "device_model", "device_type", "device_conn_type", "C14", "C15", "C16",
    "C17", "C18", "C19", "C20", "C21",
)  # fmt: skip
_FRAPPE = (
    "label", "user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city",
)  # fmt: skip
_TAOBAO_AD = (
    "clk", "btag_his", "cate_his", "brand_his", "userid", "cms_segid", "cms_group_id", "final_gender_code", "age_level",
    "pvalue_level", "shopping_level", "occupation", "new_user_class_level", "adgroup_id", "cate_id", "campaign_id",
    "customer", "brand", "price", "pid", "btag",
)  # fmt: skip

PUBLISHED = (
    Published(
        "Criteo_x1",
        ("label", *_CRITEO),
        {
            "train": "30b89c1c7213013b92df52ec44f52dc5",
            "valid": "f73c71fb3c4f66b6ebdfa032646bea72",
            "test": "2c48b26e84c04a69b948082edae46f8c",
        },
    ),
    Published(
        "Criteo_x4",
        ("Label", *_CRITEO),
        {
            "train": "4a53bb7cbc0e4ee25f9d6a73ed824b1a",
            "valid": "fba5428b22895016e790e2dec623cb56",
            "test": "cfc37da0d75c4d2d8778e76997df2976",
        },
    ),
    Published(
        "Avazu_x1",
        ("label", *_numbered("feat_", 22)),
        {
            "train": "f1114a07aea9e996842c71648e0f6395",
            "valid": "d9568f246357d156c4b8030fadb8b623",
            "test": "9e2fe9c48705c9315ae7a0953eb57acf",
        },
    ),
    Published(
        "Avazu_x4",
        _AVAZU,
        {
            "train": "de3a27264cdabf66adf09df82328ccaa",
            "valid": "33232931d84d6452d3f956e936cab2c9",
            "test": "3ebb774a9ca74d05919b84a3d402986d",
        },
    ),
    Published(
        "MovielensLatest_x1",
        ("label", "user_id", "item_id", "tag_id"),
        {
            "train": "efc8bceeaa0e895d566470fc99f3f271",
            "valid": "e1930223a5026e910ed5a48687de8af1",
            "test": "54e8c6baff2e059fe067fb9b69e692d0",
        },
        line_ends=(b"\r\n", b"\n"),
        libfm=True,
    ),
    Published(
        "Frappe_x1",
        _FRAPPE,
        {
            "train": "ba7306e6c4fc19dd2cd84f2f0596d158",
            "valid": "88d51bf2173505436d3a8f78f2a59da8",
            "test": "3470f6d32713dc5f7715f198ca7c612a",
        },
        line_ends=(b"\r\n",),
        libfm=True,
    ),
    Published(
        "AmazonElectronics_x1",
        ("label", "user_id", "item_id", "cate_id", "item_history", "cate_history"),
        {"train": "e9bf80b92985e463db18fdc753d347b5", "test": "57a20e82fe736dd495f2eaf0669bf6d0"},
    ),
    Published(
        "TaobaoAd_x1",
        _TAOBAO_AD,
        {"train": "eaabfc8629f23519b04593e26c7522fc", "test": "f5ae6197e52385496d46e2867c1c8da1"},
    ),
    Published(
        "KuaiVideo_x1",
        ("timestamp", "user_id", "item_id", "is_click", "is_like", "is_follow", "pos_items", "neg_items"),
        {"train": "16f13734411532cc313caf2180bfcd56", "test": "ba26c01caaf6c65c272af11aa451fc7a"},
    ),
)


@dataclass(frozen=True)
class Fingerprint:
    """What a file with a published layout turned out to be.

    Attributes:
        benchmark: whose layout it has.
        part: of the benchmark whose rows it holds; None if it is none of the published files.
        md5: of its text with the benchmark's line ends (and as CSV, if it is libFM text).
    """

    benchmark: str
    part: str | None
    md5: str

    def describe(self, name: str) -> str:
        """One line for a report."""
        if self.part is None:
            return f"{name} has the layout of {self.benchmark} but is none of its published files (md5 {self.md5})"
        return f"{name} is the published {self.part} part of {self.benchmark}"


def fingerprints(files: Iterable[Path]) -> dict[str, Fingerprint]:
    """What each file with a published layout is, by the file's name.

    A file is read through only if its first line is that of a published layout. Line ends do not matter, nor does
    gzip; MovielensLatest_x1 and Frappe_x1 are also recognised in libFM's text (`label index:1 ...`).

    Raises:
        ValueError: if a file has a published layout and its gzip stream is damaged.
    """
    found = {file.name: _recognise(file) for file in dict.fromkeys(files)}
    return {name: fingerprint for name, fingerprint in found.items() if fingerprint is not None}


def _recognise(file: Path) -> Fingerprint | None:
    if not file.is_file() or not bare_name(file).endswith(_TEXT_ENDINGS):
        return None
    try:
        line = first_line(file)
    except ValueError:
        return None  # the import will say what is wrong with it
    entries = _ENTRIES.fullmatch(line)
    for published in PUBLISHED:
        if entries is None:
            same = tuple(line.split(",")) == published.columns
        else:
            same = published.libfm and entries[1].count(":") == len(published.columns) - 1
        if same:
            header = None if entries is None else published.columns
            return _compare(published, file, header)
    return None


def _compare(published: Published, file: Path, header: tuple[str, ...] | None) -> Fingerprint:
    parts = {md5: part for part, md5 in published.md5.items()}
    digests = (
        _md5(file, header, line_end, zero)
        for line_end in published.line_ends
        for zero in ((False, True) if header is not None else (False,))
    )
    first = None
    for digest in digests:
        first = first or digest
        if digest in parts:
            return Fingerprint(published.name, parts[digest], digest)
    return Fingerprint(published.name, None, first or "")


def _md5(file: Path, header: tuple[str, ...] | None, line_end: bytes, zero: bool) -> str:
    """Of a file's text with the given line ends; with a header, of libFM text as CSV, where labels -1 and +1 may be
    spelled 0 and 1."""
    digest = hashlib.md5(usedforsecurity=False)
    if header is not None:
        digest.update(",".join(header).encode() + line_end)
    for block in read_blocks(file):
        if header is not None:
            if zero:
                block = _PLUS.sub(b"1", _MINUS.sub(b"0", block))
            block = _VALUE.sub(b"", block).replace(b" ", b",")
            block += b"" if block.endswith(b"\n") else b"\n"
        # Blocks end at line ends, so none of these is cut in two.
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n")
        digest.update(block if line_end == b"\n" else block.replace(b"\n", line_end))
    return digest.hexdigest()
