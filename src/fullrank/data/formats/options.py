"""How to read a log of text where a guess cannot serve."""

from __future__ import annotations

import codecs
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

_SPELLED = {"tab": "\t", "space": " ", "comma": ",", "semicolon": ";", "bar": "|", "\\t": "\t"}


class ReadOptions(BaseModel):
    """What a user says of a text file; what is left out is guessed from the file and checked on its first rows.

    Attributes:
        separator: between fields: one or more characters, or `tab`, `space`, `\\t`, `\\x01`.
        encoding: such as `latin-1`, `cp1252`, `utf-16-le`.
        quote: the character around texts that may hold separators, or `none`: then quotes are characters like others.
        header: the first line holds names.
        columns: a name for every column, in order, in place of the header's; without either, `column_1` and so on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    separator: str | None = None
    encoding: str | None = None
    quote: str | None = None
    header: bool = True
    columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, **values: Any) -> ReadOptions:
        """The options with these values.

        Raises:
            ValueError: in one line, if one of them cannot be.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            reason = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"--{'.'.join(str(part) for part in first['loc'])}: {reason}") from None

    @field_validator("separator")
    @classmethod
    def _one_separator(cls, value: str | None) -> str | None:
        if value is None:
            return None
        value = _SPELLED.get(value, value)
        if value.startswith("\\x") and len(value) == 4:
            try:
                value = chr(int(value[2:], 16))
            except ValueError:
                raise ValueError(f'"{value}" is no character') from None
        if not 1 <= len(value) <= 8 or any(character in value for character in '\r\n"\0'):
            raise ValueError("expected 1 to 8 characters without line ends or quotes, or tab, space")
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            "a\n".encode(value)
            codecs.getincrementaldecoder(value)
        except (LookupError, ValueError):
            raise ValueError(f'"{value}" is no text encoding, such as latin-1, cp1252 or utf-16-le') from None
        return value

    @field_validator("quote")
    @classmethod
    def _one_quote(cls, value: str | None) -> str | None:
        if value is None or value == "none" or (len(value) == 1 and value.isascii() and value.isprintable()):
            return value
        raise ValueError("expected one character, or none")

    @field_validator("columns")
    @classmethod
    def _distinct_columns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(name.strip() for name in value)
        if not all(names) or len(set(names)) < len(names):
            raise ValueError("expected different names, separated by commas")
        return names
