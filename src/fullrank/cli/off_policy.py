"""What `fullrank evaluate --off-policy` and `fullrank data rollout` share, and the table of the estimates."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fullrank.funnel.slate import PolicySpec

_option = partial(typer.Option, rich_help_panel="With --off-policy, of a log with propensities")

OffPolicyOption = Annotated[bool, _option("--off-policy", help="Estimate what the funnel would have earned.")]
RewardOption = Annotated[
    str | None,
    _option("--reward", metavar="FORMULA", help="Of a shown item, by labels and bid. Default: the funnel's value."),
]
PropensityOption = Annotated[
    str, _option("--propensity", metavar="COLUMN", help="What each item was drawn with, given those above.")
]
SlateOption = Annotated[str, _option("--slate", metavar="COLUMN", help="The same value for the rows of one list.")]
SlotOption = Annotated[str, _option("--slot", metavar="COLUMN", help="Place in the list, from 0.")]
DistributionOption = Annotated[
    str | None,
    _option("--distribution", metavar="COLUMN", help="What each candidate was drawn with; has to sum to 1."),
]
WeighingOption = Annotated[
    str, _option("--weighing", help="prefix: by all slots above too, exact; slot: by the own slot alone.")
]
ClipOption = Annotated[float | None, _option("--clip", help="Largest weight; larger ones are set to it.")]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="POLICY",
        help='Who gets a slot, in place of what the bundle says: greedy, epsilon, "{name: softmax, temperature: 0.2}".',
    ),
]


def policy_of(text: str | None) -> PolicySpec | None:
    """The slot policy that an option names.

    Raises:
        ValueError: if there is no such policy, or a parameter of it is wrong.
    """
    import yaml
    from pydantic import ValidationError

    from fullrank.funnel.slate import PolicySpec
    from fullrank.schema import describe_errors

    if text is None:
        return None
    try:
        return PolicySpec.of(yaml.safe_load(text))
    except yaml.YAMLError:
        raise ValueError(f'--policy: "{text}" is neither a name nor a mapping such as {{name: epsilon}}') from None
    except ValidationError as error:
        raise ValueError(describe_errors(error, "--policy").splitlines()[0]) from None


def estimates(report: dict[str, Any]) -> Any:
    """The table of the estimates."""
    from rich.table import Table

    from fullrank.funnel.report_parts import ESTIMATORS

    policy = ", ".join(str(value) for value in report["policy"].values())
    caption = (
        f"95 % intervals, users resampled; {report['slates']:,} lists, effective sample size "
        f"{report['effective_sample_size']:,.0f}, largest weight {report['largest_weight']:,.1f}, mean weight "
        f"{report['mean_weight']:.3f}"
    )
    title = f"value of a request by {report['reward']}, had the policy been: {policy}"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in ("", "value", "interval", "more than logged", "interval"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("logged", f"{report['logged']['value']:.4f}", _interval(report["logged"]["interval"]), "", "")
    for name, text in ESTIMATORS.items():
        if name in report:
            found, gain = report[name], report[name]["gain"]
            table.add_row(
                text,
                _number(found["value"], ".4f"),
                _interval(found["interval"]),
                _number(gain["value"], "+.4f"),
                _interval(gain["interval"], "+.4f"),
            )
    return table


def _number(value: float, form: str) -> str:
    return "undefined" if math.isnan(value) else f"{value:{form}}"


def _interval(ends: list[float], form: str = ".4f") -> str:
    return "" if math.isnan(ends[0]) else f"{ends[0]:{form}} to {ends[1]:{form}}"
