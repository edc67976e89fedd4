"""The style sheet of the report: light and dark, from a phone's width on.

Of the colours each means one thing on the whole page; `MEANINGS` is their legend.
"""

from __future__ import annotations

# Colour -> what has it, in the order of the legend.
MEANINGS = {
    "base": "a baseline",
    "retrieval": "retrieval",
    "early": "an early stage",
    "final": "the final stage and its lists",
    "best": "the best possible",
    "warn": "a warning",
}

_COLOURS = """
:root{color-scheme:light dark;--ink:#1b2430;--soft:#566171;--line:#dde2e9;--card:#f6f8fa;--back:#fff;
--base:#9aa4b2;--retrieval:#8a4fd0;--early:#e07b1f;--final:#2457c5;--best:#1f8a55;--warn:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e2e7ee;--soft:#a3afbf;--line:#323b49;--card:#1d232c;--back:#141920;
--base:#6f7b8c;--retrieval:#b794f6;--early:#f2a65a;--final:#7aa2ff;--best:#5ecb95;--warn:#ff8a80}}
"""

_CHARTS = """
svg text{fill:var(--ink)}svg .soft{fill:var(--soft);font-size:13px}svg .number{font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--line)}svg .axis{stroke:var(--soft);stroke-opacity:.7}
svg .whisker{stroke:var(--ink);stroke-width:1.5}svg .ring{fill:none;stroke:var(--ink);stroke-width:1.5}
svg .kept{stroke:var(--ink);stroke-dasharray:2 3}svg .unbiased{stroke:var(--soft);stroke-dasharray:5 4}
"""

STYLE = (
    _COLOURS
    + """
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--back);
max-width:60rem;margin:2rem auto;padding:0 1.25rem;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.25;margin:0}h2{font-size:1.25rem;margin:2.75rem 0 .25rem}
h3{font-size:1rem;margin:1.25rem 0 0}p{margin:.35rem 0;max-width:46rem}
.soft{color:var(--soft);font-size:.92rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;margin:.9rem 0 0;list-style:none;font-size:.9rem}
.legend i,td i{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;margin-right:.4rem}
.warnings{border:1px solid var(--warn);border-left-width:5px;border-radius:8px;padding:.6rem 1rem;margin:1.25rem 0}
.warnings h2{margin:0;font-size:1.05rem;color:var(--warn)}.warnings ul{margin:.3rem 0;padding-left:1.1rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.75rem;margin:1.25rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem .9rem}
.card b{display:block;font-size:1.55rem;font-variant-numeric:tabular-nums}
.card span{display:block;font-size:.9rem;line-height:1.35}.card small{display:block;color:var(--soft);font-size:.84rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:.5rem 2.5rem}
.pair{align-items:start}
figure{margin:.9rem 0;max-width:23.5rem}figcaption{font-weight:600;font-size:.95rem;margin-bottom:.35rem}
figure svg{display:block;width:100%;height:auto;font:13px system-ui,sans-serif;overflow:visible}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;margin:.5rem 0;font-size:.94rem}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:middle}
th{font-weight:600;color:var(--soft);font-size:.88rem}
th.text,td.text{text-align:left}td.text{white-space:normal;min-width:6.75rem;overflow-wrap:normal}
td small{display:block;color:var(--soft);font-size:.82rem;line-height:1.2}
tr.group td{font-weight:600;text-align:left;padding-top:.8rem}
td .cell{display:block}
td .track{display:inline-block;width:80px;margin-left:.5rem;text-align:left}
td .bar{display:inline-block;height:.6rem;border-radius:2px;vertical-align:middle}
.narrow{width:auto;min-width:min(100%,20rem)}
.facts td{white-space:normal;text-align:left}.facts td:first-child{color:var(--soft);width:9rem}
.yes{color:var(--best)}
"""
    + _CHARTS
    + """
@media(max-width:375px){figure svg,svg .soft{font-size:14.5px}}
"""
)

# Of a chart that is a file of its own.
ALONE = _COLOURS + "svg{font:13px system-ui,sans-serif}" + _CHARTS
