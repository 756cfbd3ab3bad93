"""GET /openapi.json, and GET /docs/reference: the document as one page to read, which loads nothing else.

Swagger UI and its like would be megabytes of vendored JavaScript, or none without the internet; a page that needs a
second request could not send an API key with it.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import Response
from jinja2 import Template
from markupsafe import Markup, escape

from server.routes.described import responses
from server.routes.pages import HEADERS, MEDIA_TYPE, REFERENCE, environment
from server.routes.requests import CONTROL
from server.routes.respond import json_response

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
KEYS = {"ApiKey": "$KEY", "AdminKey": "$ADMIN_KEY"}  # how an example's shell has the keys of a security scheme
WIDTH = 100  # characters of a line of an answer


def docs_router(
    document: Callable[[], dict[str, Any]], open_document: Callable[[], dict[str, Any]], root_path: str
) -> APIRouter:
    """The routes of a document that there is once the application has all of its routes.

    `open_document` is what a page that needs no key may say, `root_path` a proxy's prefix.
    """
    router = APIRouter(tags=["Operations"])
    described = responses(None, description="A page of HTML.")
    described[200]["content"] = {"text/html": {"schema": {"type": "string"}}}

    # beside the event loop: the document takes half a second to make
    @router.get("/openapi.json", include_in_schema=False)
    def openapi() -> Response:
        return json_response(document())

    @router.get(f"/docs/{REFERENCE}", summary="This page", response_class=Response, responses=described)
    def reference(request: Request) -> Response:
        """The OpenAPI document, which is at /openapi.json, as a page."""
        url = str(request.base_url).rstrip("/") + root_path
        document = open_document()
        page = _template().render(
            document=document,
            url=url,
            model=_model_of(document),
            secured=any("security" in operation for item in document["paths"].values() for operation in item.values()),
            title="API reference",
            current="api",
        )
        return Response(page, media_type=MEDIA_TYPE, headers=HEADERS)

    return router


def _model_of(document: dict[str, Any]) -> str | None:
    """The first of the model's names, if the document tells them."""
    model = document["components"]["schemas"]["CompletionRequest"]["properties"]["model"]
    names = [name for kind in model.get("anyOf", [model]) for name in kind.get("enum", ())]
    return names[0] if names else None


@functools.cache
def _template() -> Template:
    templates = environment()
    templates.filters |= {"kind": _kind, "limits": _limits, "prose": _prose, "fields": _fields}
    templates.globals |= {"by_tag": _by_tag, "examples": _examples, "name_of": _name_of}
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
    own = [form.format(_number(schema[key])) for key, form in LIMITS.items() if key in schema]
    inner = [*schema.get("anyOf", ()), *(schema[key] for key in ("items",) if key in schema)]
    return ", ".join(dict.fromkeys([*own, *filter(None, map(_limits, inner))]))


def _number(value: float) -> str:
    """All digits of an integer: one more than the limit must be seen to be more."""
    return str(value) if isinstance(value, int) else f"{value:.15g}"


def _fields(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that are required first."""
    required = schema.get("required", ())
    fields = [
        {
            "name": name,
            "schema": field,
            "required": name in required,
            "default": None if field.get("default") is None else _json(field["default"]),
            "examples": [_json(value) for value in field.get("examples", ())],
        }
        for name, field in schema.get("properties", {}).items()
    ]
    return sorted(fields, key=lambda field: not field["required"])


@functools.cache
def recorded() -> dict[str, list[dict[str, Any]]]:
    """Examples by method and path: what is sent, and what lpa-tiny answered; a test records them and runs them."""
    found: dict[str, list[dict[str, Any]]] = json.loads(
        files("server").joinpath("routes/examples.json").read_text(encoding="utf-8")
    )
    return found


def _examples(
    method: str, path: str, operation: dict[str, Any], url: str, model: str | None
) -> Iterator[tuple[str, str]]:
    """(command, answer) of a route, for a shell; `model` is the name to send in the place of the recorded one."""
    security = [{"AdminKey": []}] if CONTROL in operation["tags"] else operation.get("security", ())
    for example in recorded().get(f"{method} {path}", ()):
        yield command(example, method, url + path, security, model), _shown(example["answer"])


def command(example: dict[str, Any], method: str, url: str, security: Any, model: str | None) -> str:
    """The line that sends an example. `url` has the names of path parameters in braces."""
    query = {name: _renamed(value, name, model) for name, value in example.get("query", {}).items()}
    for name, value in example.get("path", {}).items():
        url = url.replace(f"{{{name}}}", model if model and name == "name" else value)
    words = ["curl -s" if "then" in example else "curl", shlex.quote(f"{url}?{urlencode(query)}" if query else url)]
    if method == "DELETE" or (method == "POST" and not {"body", "lines", "file"} & example.keys()):
        words += ["-X", method]
    words += [f'-H "Authorization: Bearer {KEYS[scheme]}"' for schemes in security for scheme in schemes]
    before = ""
    if "body" in example:
        body = {name: _renamed(value, name, model) for name, value in example["body"].items()}
        words += ["-H 'Content-Type: application/json'", "-d", shlex.quote(_json(body))]
    lines = example.get("lines") or [_renamed_body(line, model) for line in example.get("file", ())]
    if lines:
        before = f"printf '%s\\n' {' '.join(shlex.quote(_json(line)) for line in lines)} |\n  "
    if "file" in example:
        words += ["-F", "purpose=batch", "-F", "'file=@-;filename=requests.jsonl'"]
    if "lines" in example:
        words += ["-H 'Content-Type: application/x-ndjson'", "--data-binary", "@-"]
    return f"{before}{' '.join(words)}{example.get('then', '')}"


def _renamed(value: Any, name: str, model: str | None) -> Any:
    return model if model and name == "model" else value


def _renamed_body(line: dict[str, Any], model: str | None) -> dict[str, Any]:
    """A batch's line."""
    return {**line, "body": {name: _renamed(value, name, model) for name, value in line["body"].items()}}


def _shown(answer: Any) -> str:
    """JSON with a line for each entry of what does not fit in one; text as it is."""
    return answer if isinstance(answer, str) else _pretty(answer, 0)


def _pretty(value: Any, indent: int) -> str:
    whole = _json(value)
    if len(whole) + indent <= WIDTH or not isinstance(value, dict | list):
        return whole
    pairs = [(f"{_json(k)}: ", v) for k, v in value.items()] if isinstance(value, dict) else [("", v) for v in value]
    space = " " * (indent + 2)
    inner = ",\n".join(f"{space}{name}{_pretty(entry, indent + 2)}" for name, entry in pairs)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}\n{' ' * indent}{closing}"


def _prose(text: str) -> Markup:
    """Paragraphs, and `code` in back quotes."""
    paragraphs = (str(escape(" ".join(part.split()))) for part in re.split(r"\n\s*\n", text.strip()))
    return Markup("".join(f"<p>{re.sub('`([^`]+)`', '<code>' + chr(92) + '1</code>', p)}</p>" for p in paragraphs))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
