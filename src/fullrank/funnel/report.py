"""One HTML page about a trained funnel or ranker: no script, no outside file, charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import fullrank
from fullrank.data import atomic
from fullrank.data.dataset import Dataset
from fullrank.funnel import charts, report_cascade, report_parts
from fullrank.funnel.charts import number_of
from fullrank.funnel.evaluation import evaluate_funnel
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.report_parts import FINAL_STAGE, MODEL
from fullrank.funnel.report_style import MEANINGS, STYLE
from fullrank.funnel.retrieval_run import LENGTHS, RETRIEVER
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.searcher import Searcher
from fullrank.funnel.stages import FINAL, RETRIEVAL
from fullrank.models import Ranker
from fullrank.training.patience import HIGHER_IS_BETTER
from fullrank.training.run import Report

# How metrics are called that only training looks at.
_MONITORS = {**report_parts.BINARY, "mse": "MSE", "logloss": "log loss"}


def write_report(
    path: Path,
    title: str,
    report: Mapping[str, Any],
    facts: Mapping[str, str],
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write the page of `render`."""
    atomic.write_text(path, render(title, report, facts, training))


def run_page(report: Report) -> str:
    """The page of a training run, for `fullrank.training.run.run(page=...)`.

    It is about the test split, the validation split where there is none, and only about the training without both.
    """
    content, dataset = report.content, report.dataset
    if isinstance(content, Searcher):
        return _retrieval_page(content, report)
    split = next((split for split in ("test", "valid") if split in report.metrics), None)
    measured: Mapping[str, Any] = {}
    if isinstance(content, Ranker):
        content = Scorer(dataset.encoders, content)
        if split is not None:
            measured = evaluate_funnel(content, dataset, split)
    elif split is not None:
        measured = report.metrics[split]
    known = isinstance(content, Funnel | Scorer)
    facts = facts_of(content, dataset) if known else {"log": str(dataset.path)}
    if "model" in report.details:
        facts["training"] = (
            f"{_plural(report.details['epochs'], 'epoch')}, {report.details['steps']:,} steps, "
            f"{report.details['samples_per_second']:,.0f} rows/s, {report.details['precision']}"
        )
    name = content.model.name if isinstance(content, Scorer) else "funnel"
    training = {**report.details, "seconds": report.seconds}
    return render(f"{name} on {dataset.path.resolve().name}", measured, facts, training)


def _retrieval_page(content: Searcher, report: Report) -> str:
    """Of a retriever that stands alone: its lists beside the most popular items, and times."""
    dataset, name = report.dataset, content.retriever.name
    parts = []
    for split, found in report.metrics.items():
        lines = "".join(
            f"<tr><td class=text>{escape(name if by == RETRIEVER else by)}"
            + "".join(f"<td>{values[f'{metric}_at_{k}']:.4f}" for k in LENGTHS for metric in ("recall", "ndcg"))
            for by, values in found.items()
        )
        users = f"{found[RETRIEVER]['users']:,.0f} users"
        heads = "".join(f"<th>recall@{k}<th>NDCG@{k}" for k in LENGTHS)
        table = f"<table class=narrow><tr><th class=text>{users}{heads}</tr>{lines}</table>"
        parts.append(f"<h2>All items ranked for the users of {escape(split)}</h2>{report_parts.wide(split, table)}")
    rows = ", ".join(f"{split} {dataset.rows(split):,}" for split in dataset.splits)
    facts = {
        "log": str(dataset.path),
        "rows": rows,
        RETRIEVAL: f"{name}, {len(content.items):,} items",
        "settings": ", ".join(f"{key} {value}" for key, value in content.retriever.config.model_dump().items()),
        "fullrank": fullrank.__version__,
    }
    facts_table = "".join(f"<tr><td>{escape(key)}<td>{escape(text)}" for key, text in facts.items())
    measured = "" if parts else _measured({})
    return page_of(
        f"{name} on {dataset.path.resolve().name}",
        "\n".join(
            [
                measured,
                *parts,
                _times(report.seconds),
                f"<h2>What was run</h2><table class=facts>{facts_table}</table>",
            ]
        ),
    )


def facts_of(content: Funnel | Scorer, dataset: Dataset) -> dict[str, str]:
    """What a page says about a trained thing and its log."""
    rows = ", ".join(f"{split} {dataset.rows(split):,}" for split in dataset.splits)
    facts = {"log": str(dataset.path), "rows": rows}
    if isinstance(content, Funnel):
        sizes = (content.sizes.retrieve, *content.sizes.keeps(len(content.early)))
        items = f"{len(content.items.active_I):,} items"
        facts[RETRIEVAL] = f"{content.retriever.name}, hands on {sizes[0]:,} of {items}"
        for (stage, model), keep in zip(content.early.items(), sizes[1:], strict=True):
            facts[f"{stage} stage"] = f"{_model(model)}, hands on {keep:,} items"
        facts["final stage"], facts["value"] = _model(content.final), content.value.text
    else:
        facts["model"] = _model(content.model)
    return facts | {"fullrank": fullrank.__version__}


def _model(model: Ranker) -> str:
    size = model.num_parameters()
    return f"{model.name}, {size.total:,} parameters, {size.embedding:,} of them in embedding tables"


def _plural(count: float, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def render(
    title: str, report: Mapping[str, Any], facts: Mapping[str, str], training: Mapping[str, Any] | None = None
) -> str:
    """The page as text.

    Args:
        report: of `evaluate_funnel`; with the keys `true_value` and `off_policy` the results of that function and of
            `evaluate_off_policy`. Empty if nothing was measured.
        facts: what was run, for the table at the end.
        training: of a run: `curves`, `monitor`, `best_step` and `seconds`, as `metrics.json` has them.
    """
    final: Mapping[str, Any] = report.get("stages", {}).get(FINAL, {})
    training = training or {}
    judge = FINAL_STAGE if "recall" in report or RETRIEVAL in training.get("seconds", {}) else MODEL
    task = next((name for name, values in final.items() if "ne" in values), next(iter(final), None))
    parts = [_measured(report), report_parts.warnings(judge, report.get("warnings") or [])]
    if task is not None:
        parts += [
            report_parts.cards(judge, final[task], report),
            report_parts.stages(judge, task, report),
            report_parts.tables(judge, report),
        ]
    beside = []
    if curve := report.get("calibration_curve"):
        beside.append(report_parts.calibration(judge, curve))
    if report.get("recall"):
        beside.append(report_parts.recall(report))
    parts.append(report_parts.pair(*beside))
    if report.get("cascade"):
        parts.append(report_cascade.cascade(report["cascade"]))
    parts.append(report_parts.slices(report.get("slices") or []))
    if report.get("true_value") is not None:
        parts.append(report_parts.true_value(report["true_value"]))
    if report.get("off_policy") is not None:
        parts.append(report_parts.off_policy(report["off_policy"]))
    parts += [_learning(judge, training), _times(training.get("seconds", {}))]
    rows = "".join(f"<tr><td>{escape(name)}<td>{escape(text)}" for name, text in facts.items())
    parts.append(f"<h2>What was run</h2><table class=facts>{rows}</table>")
    body = "\n".join(part for part in parts if part)
    return page_of(title, f"{_legend(judge, body)}{body}")


def page_of(title: str, body: str) -> str:
    """A whole page without script or outside file."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>\n{body}</html>\n"
    )


def _measured(report: Mapping[str, Any]) -> str:
    if not report:
        return "<p class=soft>Nothing was measured: there are no rows but those of training.</p>"
    return f"<p class=soft>Measured on the {escape(report['split'])} split of the log: {report['rows']:,} rows.</p>"


def _legend(judge: str, body: str) -> str:
    meanings = MEANINGS if judge == FINAL_STAGE else {**MEANINGS, FINAL: "this model"}
    items = "".join(
        f"<li><i style='background:var(--{colour})'></i>{meaning}"
        for colour, meaning in meanings.items()
        if f"var(--{colour})" in body
    )
    whisker = "whiskers are 95 % intervals; " if "class=whisker" in body else ""
    return (
        f"<ul class=legend>{items}</ul><p class=soft>In all charts bars grow to the right and curves rise where things "
        f"get better; {whisker}an axis of something that should be low runs from high to low.</p>\n"
    )


def _learning(judge: str, training: Mapping[str, Any]) -> str:
    """Training loss and watched metric of each stage by step."""
    curves = {stage: points for stage, points in (training.get("curves") or {}).items() if points}
    if not curves:
        return ""
    parts = []
    for stage, points in curves.items():
        name, colour = (judge, FINAL) if stage == FINAL else (f"{stage} stage", "early")
        kept = (training.get("best_step") or {}).get(stage)
        monitor = str((training.get("monitor") or {}).get(stage, ""))
        loss = [(point["step"], number_of(point.get("loss"))) for point in points]
        watched = [(p["step"], _sum(p["valid"].get(key) for key in monitor.split("+"))) for p in points if p["valid"]]
        lower = monitor.split("+")[0] not in HIGHER_IS_BETTER
        learnt = charts.curve("Training", loss, colour=colour, unit="lower mean loss", lower_is_better=True, kept=kept)
        metric = " + ".join(_MONITORS.get(key, key) for key in monitor.split("+"))
        unit = f"{'lower' if lower else 'higher'} {metric}"
        seen = charts.curve("Validation", watched, colour=colour, unit=unit, lower_is_better=lower, kept=kept)
        heading = f"<h3>{escape(name[0].upper() + name[1:])}</h3>" if len(curves) > 1 else ""
        parts.append(heading + report_parts.pair(learnt, seen))
    text = "The loss of a point is the mean over the steps since the one before."
    if training.get("best_step"):
        text += " The ring is the validation whose weights were kept."
    return f"<h2>How it learnt</h2><p>{text}</p>{''.join(parts)}"


def _sum(values: Iterable[object]) -> float:
    return sum(map(number_of, values))


def _times(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    # What `fit` took is said by stage, where there are several.
    several = RETRIEVAL in seconds
    names = {"fit": "training", "import": "import of the log", "evaluate": "evaluation", "total": "total"}
    total = seconds.get("total") or math.nan
    rows = "".join(
        f"<tr><td class=text>{escape(names.get(name, f'training, {name}'))}<td>{value:,.1f}"
        f"<td>{report_parts.formatted(value / total, '.0%')}"
        for name, value in seconds.items()
        if name != ("fit" if several else FINAL)
    )
    head = "<th class=text>part<th>seconds<th>share"
    return f"<h2>Times</h2>{report_parts.wide('times', f'<table class=narrow><tr>{head}{rows}</table>')}"
