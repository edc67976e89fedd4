"""Docstrings of this package as the reader of the reference expects them; an extension of mkdocstrings' parser."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Three habits of ours that the parser of Google's style does not share."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(text: str) -> str:
    """The same docstring with an entry for each name, sections indented, and `<` outside of code as itself."""
    first, _, rest = text.partition("\n")
    if re.fullmatch(r"(Args|Attributes|Raises|Returns):", first):
        # A docstring that begins with a section: the formatter has moved its entries to the margin.
        text = first + "\n" + re.sub(r"^(?=.)", "    ", rest, flags=re.MULTILINE)
    entry = r"^ {4}(\w+(?:, \w+)+):(.*(?:\n {5,}.*)*)$"
    text = re.sub(
        entry,
        lambda found: "\n".join(f"    {name}:{found[2]}" for name in found[1].split(", ")),
        text,
        flags=re.MULTILINE,
    )
    # Outside of code, `<` is no HTML.
    return re.sub(r"`[^`]*`|<", lambda found: "&lt;" if found[0] == "<" else found[0], text)
