"""What the commands have in common that write a bundle made smaller."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_smaller(
    bundle: Path,
    out: Path,
    change: Callable[[Any], tuple[Any, dict[str, Any]]],
    about: dict[str, Any],
    show: Callable[[dict[str, Any]], None],
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write what `change` makes of a bundle, and print its report.

    Args:
        about: what the new bundle says of it, beside what the old one says.
        show: prints the tables of the report.
    """
    from fullrank.funnel.bundle import load_bundle, save_bundle
    from fullrank.training.manifest import read_manifest

    content = load_bundle(bundle)
    try:
        smaller, report = change(content)
    except ValueError as error:
        raise ValueError(f"{bundle}: {error}") from None
    save_bundle(smaller, out, about={**read_manifest(bundle).about, **about}, overwrite=overwrite)
    if as_json:
        print(json.dumps({"bundle": str(out), **report}, allow_nan=False))
        return
    show(report)
    for stage in report["left"]:
        print(f"stage {stage} stays as it is", file=sys.stderr)
    print(f"written to {out}; what it costs in quality: fullrank compare {bundle} {out} DATA", file=sys.stderr)
