"""The page at `/`: a form to ask, what became of the question, and what is served. It works without its script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from typing import Any

import torch

from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import Scorer
from fullrank.serving.page_style import STYLE

# Known users that the form offers.
OFFERED = 50

# A longer list is of no use on a page, which is written while other requests wait.
MOST_ITEMS = 1000

# Fields of the form that hold JSON, with what the form says of them.
DESCRIBED = {
    "features": 'features of the user, such as {"gender": 1}',
    "context": 'of the context, such as {"device": 2}',
    "session": 'what was done just now, such as [{"item_id": 7, "labels": {"click": 1}}]',
    "filter": 'what items have to be, such as {"any": {"category": [3]}}',
}

# An answer takes the place of the one before, and numbers are kept fresh; without it the browser loads the page anew.
_SCRIPT = """
const answer=document.getElementById("answer"),form=document.querySelector("form"),now=document.getElementById("live");
const show=async address=>{
  answer.setAttribute("aria-busy","true");
  try{
    const text=await(await fetch(address,{headers:{Accept:"text/html"}})).text();
    const found=new DOMParser().parseFromString(text,"text/html").getElementById("answer");
    if(!found)throw new Error("the server gave no page");
    answer.replaceChildren(...found.childNodes);
    answer.querySelector("[tabindex]")?.focus();
  }catch(error){
    const said=document.createElement("p");said.className="problem";said.setAttribute("role","alert");
    said.textContent="No answer: "+error.message;answer.replaceChildren(said);
  }
  answer.removeAttribute("aria-busy");
};
form.addEventListener("submit",event=>{
  event.preventDefault();
  const given=new URLSearchParams([...new FormData(form)].filter(([,value])=>value.trim()));
  const address="./?"+given;history.pushState(null,"",address);show(address);
});
addEventListener("popstate",()=>location.reload());
setInterval(async()=>{
  if(document.hidden)return;
  try{const found=await fetch("live");if(found.ok)now.innerHTML=await found.text()}catch{}
},4000);
"""

# Nothing comes from elsewhere, no script runs but this one, and no other page shows this one in a frame.
SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'; script-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    + "'"
)


def page(content: Funnel | Scorer, asked: Mapping[str, str], answer: str, card: str, live: str) -> str:
    """A self-contained HTML page.

    Args:
        asked: fields of the form as they were filled in.
        answer: HTML of what was answered; empty where nothing was asked.
        card: HTML of the model card.
        live: HTML of the numbers that change.
    """
    fields = _recommend(content, asked) if isinstance(content, Funnel) else _score(content, asked)
    what = "A funnel" if isinstance(content, Funnel) else "A ranker"
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>fullrank</title><style>{STYLE}</style></head><body><header><h1>fullrank</h1>"
        "<nav><a href=docs>API</a><a href=metrics>metrics</a></nav></header>"
        f"<main><p class=soft>{what} at work. Ask it, and see what each part did.</p>"
        f"<form action='./' method=get>{fields}</form>"
        f"<section id=answer>{answer}</section>{card}"
        f"<h2>Since it started</h2><div id=live>{live}</div></main>"
        f"<script>{_SCRIPT}</script></body></html>"
    )


def refused(status: int, detail: str, wait: str | None) -> str:
    """What the page says where there is no answer."""
    again = "" if wait is None else f" Try again in {escape(wait)} s."
    return (
        f"<div class=problem role=alert id=list tabindex=-1><b>No answer ({status})</b>: {escape(detail)}.{again}</div>"
    )


def _recommend(content: Funnel, asked: Mapping[str, str]) -> str:
    known = content.users.ids_of(torch.arange(len(content.users))[:OFFERED]) if content.users is not None else []
    offered = "".join(f"<option value='{escape(str(user))}'>" for user in known)
    user, k = escape(asked.get("user", "")), escape(asked.get("k", "10"))
    texts = "".join(
        f"<label>{escape(said)}<textarea name={name} rows=2 spellcheck=false>{escape(asked.get(name, ''))}</textarea>"
        "</label>"
        for name, said in DESCRIBED.items()
    )
    opened = " open" if any(asked.get(name, "").strip() for name in DESCRIBED) else ""
    try_one = f" such as {escape(str(known[0]))}" if known else ""
    return (
        f"<div class=fields><label>user<input name=user list=users autocomplete=off value='{user}' "
        f"placeholder='anyone{try_one and f',{try_one}'}'></label><datalist id=users>{offered}</datalist>"
        f"<label>items<input name=k type=number min=1 max={MOST_ITEMS} value='{k}'></label>"
        "<button>Recommend</button></div>"
        f"<details{opened}><summary>Describe the user</summary>{texts}</details>"
    )


def _score(content: Scorer, asked: Mapping[str, str]) -> str:
    rows = asked.get("rows") or json.dumps(blank_row(content), indent=1, ensure_ascii=False)
    return (
        "<label>a row, or a list of rows, as JSON; null is missing"
        f"<textarea name=rows spellcheck=false>\n{escape(rows)}</textarea></label><button>Score</button>"
    )


def blank_row(scorer: Scorer) -> dict[str, Any]:
    """A row of every column, all missing: something to fill in."""
    lists = {*scorer.schema.jagged_keys, *scorer.schema.event_number_keys}
    alias = {sequence.name for sequence in scorer.schema.sequences}
    return {name: [] if name in lists else None for name in scorer.columns if name not in alias}
