"""The page at `/docs`: the OpenAPI document for people, without a script and without the network."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from fullrank.funnel.report_parts import wide
from fullrank.serving.page_style import STYLE

_MORE = """
h2 code{font-size:1.05rem}section{border-top:1px solid var(--line);margin-top:1.5rem}section h2{margin-top:1.25rem}
td,th,td:first-child{text-align:left;white-space:normal;overflow-wrap:normal}
pre{overflow-x:auto;padding:.5rem .75rem;background:var(--card);border:1px solid var(--line);border-radius:5px}
.text{white-space:pre-line}
"""


def description_page(document: dict[str, Any]) -> str:
    """The paths of an OpenAPI document with their bodies and answers."""
    schemas = document.get("components", {}).get("schemas", {})
    info = document["info"]
    parts = [
        _operation(method, path, operation, schemas)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>fullrank: the API</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}{_MORE}</style><body><main><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{escape(info.get('summary', ''))} The same for machines: "
        f'<a href="openapi.json">openapi.json</a>. <a href="./">Try it</a>.</p>{"".join(parts)}</main></body></html>'
    )


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    text = escape(operation.get("description", operation.get("summary", "")))
    parts = [f"<section><h2><code>{method.upper()} {escape(path)}</code></h2><p>{text}</p>"]
    content = operation.get("requestBody", {}).get("content", {})
    for kind, body in content.items():
        parts.append(f"<h3>Body, <code>{escape(kind)}</code></h3>{_fields(body['schema'], schemas)}")
    rows = "".join(
        f"<tr><td>{escape(status)}</td><td>{escape(said.get('description', ''))}</td>"
        f"<td><code>{escape(_answer(said))}</code></td></tr>"
        for status, said in sorted(operation["responses"].items())
    )
    parts.append("<h3>Answers</h3>" + wide("answers", f"<table><tr><th>status<th>when<th>body</tr>{rows}</table>"))
    answered = operation["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema")
    if answered:
        parts.append(_fields(answered, schemas))
    return "".join(parts) + "</section>"


def _answer(said: dict[str, Any]) -> str:
    for kind, content in said.get("content", {}).items():
        return _type(content["schema"]) if content.get("schema") else str(kind)
    return ""


def _fields(schema: dict[str, Any], schemas: dict[str, Any], depth: int = 0) -> str:
    """A table of the fields of an object, and of the objects that it holds."""
    found = _resolved(schema, schemas)
    fields = found.get("properties", {})
    required = set(found.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td><code>{escape(_type(field))}</code></td>"
        f"<td>{'required' if name in required else _default(field)}</td></tr>"
        for name, field in fields.items()
    )
    # The docstring, of which the browser keeps the lines.
    text = escape(found.get("description", ""))
    examples = "".join(f"<pre>{escape(json.dumps(example))}</pre>" for example in found.get("examples", ()))
    inside = "".join(
        f"<h3><code>{escape(_name(part))}</code></h3>{_fields(part, schemas, depth + 1)}"
        for field in fields.values()
        for part in _objects(field)
        if depth < 4
    )
    table = wide("fields", f"<table><tr><th>field<th>type<th></tr>{rows}</table>") if rows else ""
    return f'<p class="text">{text}</p>{examples}{table}{inside}'


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schemas.get(_name(schema), {}) if "$ref" in schema else schema
    return found


def _name(schema: dict[str, Any]) -> str:
    return str(schema["$ref"]).rsplit("/", 1)[-1]


def _objects(field: dict[str, Any]) -> list[dict[str, Any]]:
    """References to objects in a field's type."""
    if "$ref" in field:
        return [field]
    inner = [field.get("items"), field.get("additionalProperties"), *field.get("anyOf", ())]
    return [found for part in inner if isinstance(part, dict) for found in _objects(part)]


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return _name(field)
    if "anyOf" in field:
        return " | ".join(dict.fromkeys(_type(part) for part in field["anyOf"]))
    if field.get("type") == "array":
        return f"[{_type(field.get('items', {}))}]"
    if isinstance(field.get("additionalProperties"), dict):
        return f"{{name: {_type(field['additionalProperties'])}}}"
    return str(field.get("type", "any"))


def _default(field: dict[str, Any]) -> str:
    return f"default {escape(json.dumps(field['default']))}" if field.get("default") is not None else "may be left out"
