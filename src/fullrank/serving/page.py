"""The page at `/`: what is served, and a form to try it."""

from __future__ import annotations

from html import escape

from fullrank.funnel.funnel import Funnel

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:3rem auto;padding:0 1rem;color:#1c2430;background:#fff}
h1{font-size:1.5rem;margin:0 0 .5rem}code,pre,input{font:14px ui-monospace,monospace}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.25rem}dt{color:#5b6675}dd{margin:0}
input{padding:.35rem .5rem;border:1px solid #b6beca;border-radius:4px;width:9rem}
button{padding:.4rem 1rem;border:0;border-radius:4px;background:#2457c5;color:#fff;font:inherit;cursor:pointer}
label{margin-right:1rem}table{border-collapse:collapse;margin-top:1rem;width:100%}
td,th{text-align:right;padding:.25rem .75rem;border-bottom:1px solid #e4e8ee}
td:first-child,th:first-child{text-align:left}
#problem{color:#a3262a}
@media(prefers-color-scheme:dark){body{color:#dde3ec;background:#14181f}dt{color:#93a0b3}
input{background:#1d232c;color:inherit;border-color:#465063}td,th{border-color:#2b333f}#problem{color:#ff8a8a}}
"""

_SCRIPT = """
const [form,table,problem]=["form","table","#problem"].map(name=>document.querySelector(name));
form.addEventListener("submit",async event=>{
  event.preventDefault();problem.textContent="";table.replaceChildren();
  const user=form.user.value.trim(),body={k:Number(form.k.value)};
  if(user)body.user_id=/^-?\\d+$/.test(user)?Number(user):user;
  const response=await fetch("v1/recommend",{method:"POST",headers:{"Content-Type":"application/json"},
    body:JSON.stringify(body)});
  const answer=await response.json();
  if(!response.ok){problem.textContent=answer.detail;return}
  const row=(cells,tag)=>{const tr=document.createElement("tr");
    for(const cell of cells){const td=document.createElement(tag);td.textContent=cell;tr.append(td)}table.append(tr)};
  const tasks=answer.items.length?Object.keys(answer.items[0].predictions):[];
  row(["item","value",...tasks],"th");
  for(const item of answer.items)
    row([item.item_id,item.value.toFixed(4),...tasks.map(task=>item.predictions[task].toFixed(4))],"td");
});
"""


def page(funnel: Funnel) -> str:
    """A self-contained HTML page."""
    facts = {
        "value": funnel.value.text,
        "retrieval": f"{funnel.retriever.name}, {funnel.retriever.cost():,} items",
        "early stage": f"{funnel.early.name}, {funnel.sizes.retrieve:,} candidates",
        "final stage": f"{funnel.final.name}, {funnel.sizes.keep:,} candidates",
        "tasks": ", ".join(label.name for label in funnel.schema.labels),
        "known users": f"{len(funnel.users):,}" if funnel.users is not None else "none",
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>" for name, value in facts.items())
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fullrank</title><style>{_STYLE}</style><h1>fullrank</h1><dl>{rows}</dl>"
        "<form><label>user <input name=user placeholder='any'></label>"
        "<label>k <input name=k type=number min=1 value=10></label><button>Recommend</button></form>"
        "<p id=problem role=alert></p><table></table>"
        "<p><a href=docs>API</a> · <a href=metrics>metrics</a></p>"
        f"<script>{_SCRIPT}</script></html>"
    )
