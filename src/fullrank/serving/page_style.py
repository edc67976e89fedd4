"""The style sheet of `/` and `/docs`: that of the report, with links, forms and code."""

from __future__ import annotations

from fullrank.funnel.report_style import STYLE as _REPORT

STYLE = (
    _REPORT
    + """
a{color:var(--final);text-underline-offset:.15em}
a:focus-visible,button:focus-visible,input:focus-visible,textarea:focus-visible,summary:focus-visible,
.wide:focus-visible{outline:3px solid var(--final);outline-offset:2px;border-radius:4px}
code,pre,textarea{font:14px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace}
header{display:flex;flex-wrap:wrap;align-items:baseline;justify-content:space-between;gap:.25rem 1.5rem}
nav{display:flex;gap:1.1rem}
form{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:1rem;margin:1.25rem 0}
.fields{display:flex;flex-wrap:wrap;gap:.75rem 1rem;align-items:end}
form label{display:block;font-size:.92rem;color:var(--soft)}
input,textarea{display:block;margin-top:.2rem;padding:.45rem .6rem;border:1px solid var(--soft);border-radius:5px;
background:var(--back);color:var(--ink);font-size:16px;max-width:100%}
input[name=user]{width:14rem}input[name=k]{width:6rem}
textarea{width:100%;min-height:4.6rem;resize:vertical}textarea[name=rows]{min-height:15rem;margin-bottom:.8rem}
button{padding:.5rem 1.15rem;border:0;border-radius:5px;background:#2457c5;color:#fff;font:inherit;cursor:pointer}
button:hover{background:#1b459f}
summary{cursor:pointer;padding:.35rem 0;color:var(--final)}
form details{margin-top:.6rem}form details label{margin-top:.6rem}form p{margin:.6rem 0 0}
.problem{border:1px solid var(--warn);border-left-width:5px;border-radius:8px;padding:.6rem 1rem;margin:1.25rem 0}
.problem b{color:var(--warn)}
.note{border-left:3px solid var(--soft);padding-left:.8rem;margin:.8rem 0}
[aria-busy=true]{opacity:.5}
.late{color:var(--warn);font-weight:600}
table{border-collapse:separate;border-spacing:0}
td.place,th.place{text-align:left;position:sticky;left:0;background:var(--back)}
body{max-width:76rem}td.what{font-size:.88rem}
@media(min-width:45rem){td.what{white-space:nowrap}}
tr.kept td{font-weight:600}tr.kept td.what{color:color-mix(in srgb,var(--best) 80%,var(--ink))}
th.over{text-align:center;border-bottom-color:var(--soft)}
svg .path{fill:none;stroke:var(--base);stroke-width:1;stroke-opacity:.55}
svg .path.kept{stroke:var(--final);stroke-width:2;stroke-opacity:1;stroke-dasharray:none}
"""
)
