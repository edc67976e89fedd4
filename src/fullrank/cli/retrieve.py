"""`fullrank retrieve`: the best items of a user, by the retriever of a run or a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullrank.cli.options import ImportOption

if TYPE_CHECKING:
    from fullrank.funnel.requests import Request

# Requests answered at once.
_AT_ONCE = 256


def retrieve(
    run: Annotated[Path, typer.Argument(help="A run directory, or the bundle of a retriever or a funnel.")],
    user: Annotated[list[str] | None, typer.Option("--user", help="A user's id in the log; repeatable.")] = None,
    requests: Annotated[
        Path | None,
        typer.Option("--requests", metavar="FILE", help='JSON lines: {"user_id": 7, "features": {"device": "tv"}}.'),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Items for each.")] = 20,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each request.")] = False,
) -> None:
    """The best items of users, or of requests that say what is new of a user.

    A user whom the log does not know gets what suits the average user.

    Example: fullrank retrieve runs/gowalla-lightgcn --user 17 -k 10
    """
    from rich.console import Console
    from rich.table import Table

    from fullrank.funnel.bundle import load_searcher
    from fullrank.funnel.requests import Request
    from fullrank.registry import import_modules

    asked = [Request(user_id=name) for name in user or ()]
    if requests is not None:
        asked += _read(requests)
    if not asked:
        raise ValueError("nobody to find items for: name users with --user ID, or a file of requests with --requests")
    import_modules(imports or (), "--import")
    searcher = load_searcher(run / "bundle" if (run / "bundle").is_dir() else run)
    users = searcher.users
    for begin in range(0, len(asked), _AT_ONCE):
        part = asked[begin : begin + _AT_ONCE]
        for request, found in zip(part, searcher.search(part, k), strict=True):
            if as_json:
                items = [{"item": item, "score": score} for item, score in found]
                print(json.dumps({"user": request.user_id, "items": items}, allow_nan=False))
                continue
            new = request.user_id is not None and (users is None or users.row(request.user_id) is None)
            table = Table("place", "item", "score")
            for place, (item, score) in enumerate(found, start=1):
                table.add_row(str(place), str(item), f"{score:.4g}")
            print(f"user {request.user_id}{' (not in the log)' if new else ''}")
            Console(markup=False).print(table)
    if not as_json:
        print(f"{searcher.retriever.name} over {searcher.retriever.cost():,} items", file=sys.stderr)


def _read(path: Path) -> list[Request]:
    from fullrank.funnel.requests import Request

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            values = None
        if not isinstance(values, dict) or not values.keys() <= {"user_id", "features"}:
            raise ValueError(f'{path} line {number}: expected {{"user_id": ..., "features": {{...}}}}, got {line[:80]}')
        name, features = values.get("user_id"), values.get("features", {})
        if isinstance(name, bool) or not isinstance(name, int | str | None) or not isinstance(features, dict):
            raise ValueError(f"{path} line {number}: expected an id and a mapping of features, got {line[:80]}")
        found.append(Request(user_id=name, features=features))
    return found
