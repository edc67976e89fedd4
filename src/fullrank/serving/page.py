"""The page at `/`: what is served, and a form to try it."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import Scorer

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:3rem auto;padding:0 1rem;color:#1c2430;background:#fff}
h1{font-size:1.5rem;margin:0 0 .5rem}code,pre,input,textarea{font:14px ui-monospace,monospace}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.25rem}dt{color:#5b6675}dd{margin:0}
input,textarea{padding:.35rem .5rem;border:1px solid #b6beca;border-radius:4px}input{width:9rem}
textarea{width:100%;height:16rem;box-sizing:border-box;display:block;margin:.5rem 0 1rem}
button{padding:.4rem 1rem;border:0;border-radius:4px;background:#2457c5;color:#fff;font:inherit;cursor:pointer}
label{margin-right:1rem}table{border-collapse:collapse;margin-top:1rem;width:100%}
td,th{text-align:right;padding:.25rem .75rem;border-bottom:1px solid #e4e8ee}
td:first-child,th:first-child{text-align:left}
#problem{color:#a3262a}
@media(prefers-color-scheme:dark){body{color:#dde3ec;background:#14181f}dt{color:#93a0b3}
input,textarea{background:#1d232c;color:inherit;border-color:#465063}td,th{border-color:#2b333f}#problem{color:#ff8a8a}}
"""

# Fills `path`, and `body` from the form's fields; the rest is the same for both pages.
_SCRIPT = """
const [form,table,problem]=["form","table","#problem"].map(name=>document.querySelector(name));
form.addEventListener("submit",async event=>{
  event.preventDefault();problem.textContent="";table.replaceChildren();
  try{
    const body=request(form);
    const response=await fetch(path,{method:"POST",headers:{"Content-Type":"application/json"},
      body:JSON.stringify(body)});
    const answer=await response.json();
    if(!response.ok){problem.textContent=answer.detail;return}
    const row=(cells,tag)=>{const tr=document.createElement("tr");
      for(const cell of cells){const td=document.createElement(tag);td.textContent=cell;tr.append(td)}table.append(tr)};
    const number=value=>value===null?"":value.toFixed(4);
    const tasks=answer.items.length?Object.keys(answer.items[0].predictions):[];
    row([named?"item":"row","value",...tasks],"th");
    answer.items.forEach((item,i)=>
      row([named?item.item_id:i+1,number(item.value),...tasks.map(task=>number(item.predictions[task]))],"td"));
  }catch(error){problem.textContent=error.message}
});
"""

_RECOMMEND = """
const path="v1/recommend",named=true;
const request=form=>{const user=form.user.value.trim(),body={k:Number(form.k.value)};
  if(user)body.user_id=/^-?\\d{1,15}$/.test(user)?Number(user):user;return body};
"""

_SCORE = """
const path="v1/score",named=false;
const request=form=>({rows:[].concat(JSON.parse(form.rows.value))});
"""


def page(content: Funnel | Scorer) -> str:
    """A self-contained HTML page."""
    tasks = ", ".join(label.name for label in content.schema.labels)
    if isinstance(content, Funnel):
        facts = {
            "value": content.value.text,
            "retrieval": f"{content.retriever.name}, {content.retriever.cost():,} items",
            **_stages(content),
            "tasks": tasks,
            "known users": f"{len(content.users):,}" if content.users is not None else "none",
        }
        fields = (
            "<label>user <input name=user placeholder='any'></label>"
            "<label>k <input name=k type=number min=1 value=10></label><button>Recommend</button>"
        )
        script = _RECOMMEND
    else:
        facts = {
            "model": f"{content.model.name}, {content.model.num_parameters().total:,} parameters",
            "tasks": tasks,
            "value": content.value.text,
            "columns": f"{len(content.columns):,}",
        }
        row = json.dumps(blank_row(content), indent=1, ensure_ascii=False)
        fields = (
            "<label>a row, or a list of rows; null is missing"
            f"<textarea name=rows spellcheck=false>{escape(row)}</textarea></label><button>Score</button>"
        )
        script = _SCORE
    rows = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>" for name, value in facts.items())
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fullrank</title><style>{STYLE}</style><h1>fullrank</h1><dl>{rows}</dl><form>{fields}</form>"
        "<p id=problem role=alert></p><table></table>"
        "<p><a href=docs>API</a> · <a href=metrics>metrics</a></p>"
        f"<script>{script}{_SCRIPT}</script></html>"
    )


def _stages(funnel: Funnel) -> dict[str, str]:
    """What each stage after retrieval is, and how many candidates it gets."""
    handed = (funnel.sizes.retrieve, *funnel.sizes.keeps(len(funnel.early)))
    rankers = {**funnel.early, "final": funnel.final}
    return {
        f"{stage} stage": f"{ranker.name}, {count:,} candidates"
        for (stage, ranker), count in zip(rankers.items(), handed, strict=True)
    }


def blank_row(scorer: Scorer) -> dict[str, Any]:
    """A row of every column, all missing: something to fill in."""
    lists = {*scorer.schema.jagged_keys, *scorer.schema.event_number_keys}
    alias = {sequence.name for sequence in scorer.schema.sequences}
    return {name: [] if name in lists else None for name in scorer.columns if name not in alias}
