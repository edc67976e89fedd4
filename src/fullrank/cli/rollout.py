"""`fullrank data rollout`: a funnel in the simulated world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fullrank.cli.off_policy import PolicyOption, policy_of


def rollout(
    bundle: Annotated[Path, typer.Argument(help="A funnel that was trained on the simulated log WORLD.")],
    world: Annotated[Path, typer.Argument(help="The dataset that `fullrank data simulate` made.")],
    out: Annotated[Path, typer.Argument(help="The dataset directory to make.")],
    impressions: Annotated[int, typer.Option("--impressions", min=100, help="Rows of the log.")] = 100_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same log.")] = 0,
    policy: PolicyOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Let a funnel fill the lists in the world it was trained in: a log with the propensity of every item.

    Example: fullrank data rollout runs/demo/bundle runs/demo/data data/explored --policy epsilon
    """
    from rich.console import Console

    from fullrank.data.dataset import Dataset
    from fullrank.data.simulate import World
    from fullrank.funnel.bundle import load_bundle
    from fullrank.funnel.funnel import Funnel
    from fullrank.funnel.rollout import rollout_dataset

    spec = policy_of(policy)
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already: choose another name or pass --overwrite")
    funnel = load_bundle(bundle)
    if not isinstance(funnel, Funnel):
        raise ValueError(f"{bundle} is the bundle of a single ranker: it fills no lists")
    before = Dataset.open(world)
    if not (world / "world.npz").is_file():
        raise ValueError(f"{world} is no simulated world: it has no world.npz")
    with Console(stderr=True, markup=False).status("rolling out"):
        made = rollout_dataset(
            funnel, World.load(world / "world.npz"), out, impressions, like=bundle, before=before, seed=seed,
            policy=spec, overwrite=overwrite,
        )  # fmt: skip
    rows = {split: made.rows(split) for split in made.splits}
    if as_json:
        print(json.dumps({"path": str(out), "rows": rows}))
    else:
        print(f"{out}: {', '.join(f'{split} {count:,}' for split, count in rows.items())} rows")
