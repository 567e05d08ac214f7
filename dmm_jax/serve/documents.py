"""The list of addresses as a page of HTML, made from the OpenAPI document; it loads nothing."""

import json
import re
from collections.abc import Mapping

from dmm_jax.gallery.page import escape


def render(document: Mapping) -> str:
    """Returns a page with every address of an OpenAPI document, its fields and what it does."""
    groups: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tag = next(iter(operation.get("tags", ())), "Service")
            groups.setdefault(tag, []).append(_operation(path, method, operation, document))
    body = "".join(f"<section><h2>{escape(tag)}</h2>{''.join(parts)}</section>" for tag, parts in groups.items())
    title, description = (escape(document["info"][name]) for name in ("title", "description"))
    source = f'<a href="/openapi.json">OpenAPI {escape(document["openapi"])}</a>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{title}</title><link rel="stylesheet" '
        f'href="/static/style.css"></head><body class="documents"><main><h1>{title}</h1>'
        f"<p>{description} The same as {source}.</p>{body}</main></body></html>\n"
    )


def _operation(path: str, method: str, operation: Mapping, document: Mapping) -> str:
    head = f"<h3><code>{method.upper()} {escape(path)}</code></h3><p>{_prose(operation.get('description', ''))}</p>"
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    schema = document.get("components", {}).get("schemas", {}).get(content.get("$ref", "").rpartition("/")[2], {})
    rows = "".join(
        f"<tr><th scope=row><code>{escape(name)}</code></th><td>{escape(_kind(field))}</td>"
        f"<td>{_default(name, field, schema)}</td><td>{_prose(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    columns = "".join(f"<th scope=col>{name}</th>" for name in ("field", "type", "default", "meaning"))
    return head + (f'<div class="scroll"><table><tr>{columns}</tr>{rows}</table></div>' if rows else "")


def _prose(text: str) -> str:
    """Returns plain text as HTML; `words` between backticks are code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _kind(field: Mapping) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(option) for option in field["anyOf"]))
    if "enum" in field or "const" in field:
        return " or ".join(map(repr, field.get("enum", [field.get("const")])))
    bounds = [f"{sign} {field[key]:g}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in field]
    return " ".join([str(field.get("type", "any")), *bounds])


def _default(name: str, field: Mapping, schema: Mapping) -> str:
    if name in schema.get("required", ()):
        return "required"
    return f"<code>{escape(json.dumps(field['default']))}</code>" if "default" in field else ""
