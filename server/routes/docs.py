"""GET /openapi.json, and GET /docs/reference: the document as one page to read, which loads nothing else.

Swagger UI and its like would be megabytes of vendored JavaScript, or none without the internet; a page that needs a
second request could not send an API key with it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from jinja2 import Template
from markupsafe import Markup, escape

from server.routes.pages import HEADERS, MEDIA_TYPE, REFERENCE, environment
from server.routes.respond import json_response
from server.routes.responses import responses

LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} entries",
    "maxItems": "at most {} entries",
    "minProperties": "at least {} entries",
    "maxProperties": "at most {} entries",
}
IN_EXAMPLES = ("model", "prompt", "input", "tokens")  # beside required fields


def docs_router(document: Callable[[], dict[str, Any]], open_document: Callable[[], dict[str, Any]]) -> APIRouter:
    """The routes of a document that there is once the application has all of its routes.

    `open_document` is what a page that needs no key may say.
    """
    router = APIRouter(tags=["Operations"])
    described = responses(None, description="A page of HTML.")
    described[200]["content"] = {"text/html": {"schema": {"type": "string"}}}

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return json_response(document())

    @router.get(f"/docs/{REFERENCE}", summary="This page", response_class=Response, responses=described)
    async def reference(request: Request) -> Response:
        """The OpenAPI document, which is at /openapi.json, as a page."""
        url = str(request.base_url).rstrip("/")
        page = _template().render(document=open_document(), url=url, title="API reference", current="api")
        return Response(page, media_type=MEDIA_TYPE, headers=HEADERS)

    return router


@functools.cache
def _template() -> Template:
    templates = environment()
    templates.filters |= {"kind": _kind, "limits": _limits, "prose": _prose, "fields": _fields}
    templates.globals |= {"by_tag": _by_tag, "example": _example, "name_of": _name_of}
    return templates.get_template("reference.html")


def _by_tag(document: dict[str, Any], tag: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, operation) of a tag's routes."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if tag in operation["tags"]:
                yield method.upper(), path, operation


def _name_of(schema: dict[str, Any]) -> str:
    """What a reference refers to; "" if it is none."""
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _kind(schema: dict[str, Any]) -> Markup:
    """A schema's type in a few words, with links to the schemas that it is made of."""
    if name := _name_of(schema):
        return Markup('<a href="#{0}">{0}</a>').format(name)
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return Markup(" or ").join(dict.fromkeys(map(_kind, choices)))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return Markup(" or ").join(Markup("<code>{}</code>").format(_json(value)) for value in values)
    if schema.get("type") == "array":
        return Markup("list of ({})").format(_kind(schema.get("items", {})))
    inner = schema.get("additionalProperties")
    if schema.get("type") == "object" and isinstance(inner, dict) and inner:
        return Markup("object of ({})").format(_kind(inner))
    return escape(schema.get("type", "anything"))


def _limits(schema: dict[str, Any]) -> str:
    """Its limits in words, those of its alternatives and entries too."""
    own = [form.format(f"{schema[key]:.15g}") for key, form in LIMITS.items() if key in schema]
    inner = [*schema.get("anyOf", ()), *(schema[key] for key in ("items",) if key in schema)]
    return ", ".join(dict.fromkeys([*own, *filter(None, map(_limits, inner))]))


def _fields(schema: dict[str, Any]) -> list[dict[str, Any]]:
    required = schema.get("required", ())
    return [
        {
            "name": name,
            "schema": field,
            "required": name in required,
            "default": None if field.get("default") is None else _json(field["default"]),
            "examples": [_json(value) for value in field.get("examples", ())],
        }
        for name, field in schema.get("properties", {}).items()
    ]


def _example(document: dict[str, Any], schema: dict[str, Any]) -> str:
    """A body made of the examples of its fields."""
    schema = document["components"]["schemas"][_name_of(schema)]
    shown = [*schema.get("required", ()), *IN_EXAMPLES]
    properties = schema["properties"]
    return _json({k: field["examples"][0] for k, field in properties.items() if k in shown and "examples" in field})


def _prose(text: str) -> Markup:
    """Paragraphs, and `code` in back quotes."""
    paragraphs = (str(escape(" ".join(part.split()))) for part in re.split(r"\n\s*\n", text.strip()))
    return Markup("".join(f"<p>{re.sub('`([^`]+)`', '<code>' + chr(92) + '1</code>', p)}</p>" for p in paragraphs))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
