"""The OpenAPI document as a page for people: plain HTML, nothing loaded from anywhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any, Final

_STYLE: Final = """\
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2329;background:#fff}
h1{font-size:1.8rem}h2{margin-top:2.5rem;border-bottom:1px solid #cdd5dc}
details{border:1px solid #cdd5dc;border-radius:6px;margin:.5rem 0;padding:.4rem .8rem}
summary{cursor:pointer}code,pre{font:14px/1.45 ui-monospace,monospace}
pre{background:#f2f5f7;padding:.7rem;border-radius:6px;overflow-x:auto}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0}
.m{display:inline-block;min-width:4.2rem;font-weight:700}.s{color:#55636f}
@media(prefers-color-scheme:dark){body{color:#dde3e8;background:#14191d}pre{background:#1e252b}
details,h2{border-color:#37424b}.s{color:#9aa7b2}}"""


def render_page(document: dict[str, Any]) -> bytes:
    """The page for an OpenAPI document of ours."""
    by_tag: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, op in methods.items():
            by_tag.setdefault(op["tags"][0], []).append(
                _operation(method, path, op, document["components"]["responses"])
            )
    info = document["info"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        *(f"<p>{_inline(text)}</p>" for text in info["description"].split("\n\n")),
        '<p><a href="/v1/openapi.json">openapi.json</a></p>',
    ]
    for tag in document["tags"]:
        name = escape(tag["name"])
        parts.append(f'<h2 id="{name}">{name} <span class="s">{escape(tag["description"])}</span></h2>')
        parts += by_tag.get(tag["name"], ())
    parts.append("</body></html>\n")
    return "\n".join(parts).encode()


def _inline(text: str) -> str:
    """Text with its `code` and **bold** marked up."""
    out = []
    for place, piece in enumerate(text.split("`")):
        if place % 2:
            out.append(f"<code>{escape(piece)}</code>")
        else:
            bold = [escape(one) for one in piece.split("**")]
            out.append("".join(f"<b>{one}</b>" if at % 2 else one for at, one in enumerate(bold)))
    return "".join(out)


def _operation(method: str, path: str, op: dict[str, Any], responses: dict[str, Any]) -> str:
    parts = [
        f'<details id="{escape(op["operationId"])}"><summary><span class="m">{method.upper()}</span>'
        f' <code>{escape(path)}</code> <span class="s">{escape(op["summary"])}</span></summary>',
        f"<p>{_inline(op['description'])}</p>",
    ]
    if op.get("parameters"):
        rows = "".join(
            f"<tr><td><code>{escape(one['name'])}</code></td><td>{one['in']}</td>"
            f"<td>{_inline(one.get('description', ''))}</td></tr>"
            for one in op["parameters"]
        )
        parts.append(f"<table>{rows}</table>")
    if body := op.get("requestBody"):
        parts.append(f"<p>Body. {escape(body['description'])}.</p>{_example(body['content'])}")
    for status, reply in op["responses"].items():
        if ref := reply.get("$ref"):
            reply = responses[ref.rpartition("/")[2]]
        parts.append(f"<p><b>{status}</b> {_inline(reply['description'])}</p>")
        if status < "300":
            parts.append(_example(reply.get("content", {})))
    parts.append("</details>")
    return "\n".join(parts)


def _example(content: dict[str, Any]) -> str:
    return "".join(
        f"<pre>{escape(json.dumps(one['example'], indent=2, ensure_ascii=False))}</pre>"
        for one in content.values()
        if "example" in one
    )
