"""Names that recipes, bundles and commands use, and the things that they stand for."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializeAsAny,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Things by name: those of this library, those registered in this process, and those of installed packages.

    A thing of this library or of an entry point is imported when it is asked for. Nothing else is ever imported: a name
    that a file brings along is looked up here, and here only.

    Args:
        what: what is listed, in the singular, for messages: "ranker".
        group: of the entry points of other packages, such as `fullrank.rankers`.
        builtin: name -> `module:attribute`.

    Attributes:
        places: `builtin`.
    """

    def __init__(self, what: str, group: str, builtin: Mapping[str, str]) -> None:
        self.what, self.group = what, group
        self.places = dict(builtin)
        self._things: dict[str, T] = {}
        self._installed: dict[str, EntryPoint] | None = None

    def register(self, name: str, thing: T) -> T:
        """List a thing under a name.

        Raises:
            ValueError: if another thing has the name. The same one, or one that was defined anew in the same place, as
                in a notebook, may be registered again.
        """
        if name in self._things:
            taken = _place_of(self._things[name]) != _place_of(thing)
        else:
            # What a place or an entry point names is not asked for here: its module may be the one that registers.
            taken = name in self and self._package(name) != str(getattr(thing, "__module__", "")).split(".")[0]
        if taken:
            raise ValueError(f'the {self.what} "{name}" exists already: choose another name')
        self._things[name] = thing
        return thing

    def register_class(self, kind: T) -> T:
        """List a class under its attribute `name`.

        Raises:
            ValueError: if it has none, or another thing has the name.
        """
        name = getattr(kind, "name", None)
        if not isinstance(name, str) or not name:
            shown = getattr(kind, "__name__", kind)
            raise ValueError(f'{shown} needs a class attribute "name", such as: name = "mine"')
        return self.register(name, kind)

    def unregister(self, name: str) -> None:
        """Take a registered thing off the list.

        Raises:
            KeyError: if nothing was registered under the name in this process.
        """
        del self._things[name]

    def _package(self, name: str) -> str:
        place = self.places[name] if name in self.places else self._entry_points()[name].value
        return place.replace(":", ".").split(".")[0]

    def find(self, name: object, defined_in: str | None = None) -> T:
        """The thing called `name`.

        Args:
            defined_in: the module that is said to define it; named in the message, never imported.

        Raises:
            ValueError: if there is none; says what there is and how to make it known.
        """
        if isinstance(name, str) and name in self:
            return self[name]
        close = difflib.get_close_matches(str(name), list(self), n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        if not defined_in or defined_in.split(".")[0] == "fullrank":
            cure = "one of your own has to be registered first, by importing the module that does"
        elif defined_in == "__main__":
            cure = "it was defined in a script: register it before, in the same way"
        else:
            cure = f"import the package that registers it, {defined_in}, before"
        shown = f'"{name}"' if isinstance(name, str) else repr(name)
        raise ValueError(f"{self.what} {shown} is unknown; choose one of {', '.join(self)}{hint} ({cure})")

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._installed is None:
            self._installed = {point.name: point for point in entry_points(group=self.group)}
        return self._installed

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            if name in self.places:
                module, attribute = self.places[name].split(":")
                self._things[name] = getattr(import_module(module), attribute)
            else:
                self._things[name] = self._entry_points()[name].load()
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self.places or name in self._things or name in self._entry_points()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.places, *self._things, *self._entry_points())))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _place_of(thing: object) -> object:
    """Where a thing is defined, or the thing itself."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    return thing if module is None or name is None or name == "<lambda>" else (module, name)


class Spec(BaseModel):
    """A registered class with its Config, validated once; in recipes one mapping: the name, then the Config's fields.

    A subclass sets `registry`, whose classes have a `Config`. It is made from that mapping, from a name alone, or from
    another spec.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    registry: ClassVar[Registry[Any]]

    name: str
    config: SerializeAsAny[BaseModel]

    @model_validator(mode="before")
    @classmethod
    def _from_mapping(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or isinstance(value.get("config"), BaseModel):
            return value
        try:
            if "name" not in value:
                raise ValueError(f"expected one of {', '.join(cls.registry)}")
            kind = cls.registry.find(value["name"])
        except ValueError as error:
            raise _at("name", str(error), value.get("name")) from None
        # Errors of a validator inside a validator keep their places: model.hidden.0, not a text about a model.
        config = kind.Config.model_validate({key: item for key, item in value.items() if key != "name"})
        return {"name": value["name"], "config": config}

    @model_serializer
    def _as_mapping(self, info: SerializationInfo) -> dict[str, Any]:
        return {"name": self.name, **self.config.model_dump(mode="json", exclude_defaults=info.exclude_defaults)}

    @classmethod
    def of(cls, value: Self | str | Mapping[str, Any]) -> Self:
        """The spec that a name, a mapping or a spec stands for.

        Raises:
            ValueError: if the name is unknown or a field is wrong (pydantic's message names it).
        """
        return cls.model_validate(value)

    @property
    def kind(self) -> Any:
        """The class."""
        return self.registry[self.name]


def _at(field: str, message: str, value: Any) -> ValidationError:
    """An error of a field that a validator of the whole finds."""
    kind = PydanticCustomError("value_error", "{text}", {"text": message})
    return ValidationError.from_exception_data("Spec", [InitErrorDetails(type=kind, loc=(field,), input=value)])


def import_modules(names: Iterable[str], place: str) -> None:
    """Import modules that a user named, so that they register what they define.

    The current directory is searched last. Python does that by itself for a script there, but not for an installed
    command such as `fullrank`; and only where modules are named, so that nothing in it is ever imported by chance.

    Raises:
        ValueError: if one cannot be imported; names `place` and the module.
    """
    for name in names:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(f"{place}: cannot import {name}: {error}") from None
