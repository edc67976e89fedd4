"""Recipes that come with the package, for who has no checkout of it."""

from __future__ import annotations

import difflib
from pathlib import Path

import fullrank


def shipped_recipes() -> dict[str, Path]:
    """Name -> file, such as `movielens-1m-dcn_v2` or `bars/criteo_x1-dcn_v2`; the schemas beside them are left out."""
    return {path.relative_to(_home()).with_suffix("").as_posix(): path for path in sorted(_home().rglob("*.yaml"))}


def here_or_shipped(path: Path) -> Path:
    """The path if there is such a file; else that of a recipe's schema or recipe of this name, `recipes/` or not, with
    its suffix or not, in the package; else the path as it was."""
    name = Path(*path.parts[1:]) if path.parts[:1] == ("recipes",) else path
    if (path.exists() and not path.is_dir()) or path.is_absolute() or ".." in path.parts or not name.parts:
        return path
    for candidate in (_home() / name, _home() / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    return path


def find_recipe(path: Path) -> Path:
    """The file itself, or the one of the package that it names.

    Raises:
        ValueError: if there is neither; names those that are near.
    """
    found = here_or_shipped(path)
    if not found.exists():
        name = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
        near = difflib.get_close_matches(name, shipped_recipes(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{path}: no such file, and no recipe of fullrank{hint}")
    return found


def _home() -> Path:
    package = Path(fullrank.__file__).parent
    # In a wheel they lie inside the package, in a checkout beside `src`.
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parents[1] / "recipes"
