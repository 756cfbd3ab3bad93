"""GET /docs/ and /docs/NAME: the Markdown documents of the package as pages. They load nothing and run no program.

The paths must be known when the application is made, to let them through without an API key; a page is rendered when
it is read for the first time.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from typing import Any, NamedTuple

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import RedirectResponse, Response
from jinja2 import Environment, PackageLoader
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from server.metrics import Metrics
from server.settings import GROUPS, Settings

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
MEDIA_TYPE = "text/html; charset=utf-8"


class Document(NamedTuple):
    """A Markdown file of the package."""

    label: str  # in the navigation
    package: str
    path: str


def _of_server(name: str, label: str) -> Document:
    return Document(label, "server", f"docs/{name}.md")


# by the name in the URL
DOCUMENTS = {
    "": _of_server("index", "Documents"),
    "quickstart": _of_server("quickstart", "Quickstart"),
    "models": _of_server("models", "Models"),
    "conversion": _of_server("conversion", "Conversion"),
    "scoring": _of_server("scoring", "Scoring"),
    "api": _of_server("api", "API"),
    "clients": _of_server("clients", "Clients"),
    "operations": _of_server("operations", "Operations"),
    "capacity": _of_server("capacity", "Capacity"),
    "benchmarks": _of_server("benchmarks", "Benchmarks"),
    "lpa": Document("LPA", "lpa_model", "README.md"),
    "kernels": _of_server("kernels", "Kernels"),
    "cpu": Document("CPU kernels", "lpa_model", "backends/cpu/README.md"),
    "architecture": _of_server("architecture", "Architecture"),
    "contributing": _of_server("contributing", "Contributing"),
    "changelog": _of_server("changelog", "Changelog"),
}
LINKS = {
    (f"{name or 'index'}.md" if found.package == "server" else f"../../{found.package}/{found.path}"): name or "./"
    for name, found in DOCUMENTS.items()
}
"""Files as documents of the server link to them, and their pages."""
REFERENCE = "reference"
"""The page that is made from the OpenAPI document, between the documents."""
DOCS_PATHS = frozenset({"/docs", *(f"/docs/{name}" for name in (*DOCUMENTS, REFERENCE))})
"""Need no API key: they hold no secret, and a browser that opens a page has none to send."""


def environment() -> Environment:
    """Templates of pages; `base.html` has style and navigation."""
    found = Environment(loader=PackageLoader("server", "routes"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    found.globals["pages"] = [(name, document.label) for name, document in DOCUMENTS.items()]
    return found


def pages_router() -> APIRouter:
    """The routes of the documents."""
    router = APIRouter(include_in_schema=False)

    @router.get("/docs")
    def index(request: Request) -> Response:
        return RedirectResponse("docs/", headers=HEADERS)  # relative, since a proxy may have a prefix

    @router.get("/docs/")
    @router.get("/docs/{name}")
    def page(name: str = "") -> Response:
        if name not in DOCUMENTS:
            raise HTTPException(404)
        return Response(render(name), media_type=MEDIA_TYPE, headers=HEADERS)

    return router


@functools.cache
def render(name: str) -> str:
    """A document's page."""
    text = source(name).replace("\n{settings}\n", f"\n{settings_tables()}\n")
    text = text.replace("\n{metrics}\n", f"\n{metrics_table()}\n")
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    contents: list[tuple[str, str]] = []
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = re.sub("[`*]", "", tokens[i + 1].content)
            token.attrSet("id", anchor(heading))
            if token.tag == "h2":
                contents.append((anchor(heading), heading))
        for inner in token.children or ():
            if inner.type == "link_open":
                inner.attrSet("href", _page_link(str(inner.attrGet("href"))))
    end = next((i for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"), len(tokens))
    return (
        environment()
        .get_template("page.html")
        .render(
            title=DOCUMENTS[name].label,
            current=name,
            contents=contents if len(contents) > 2 else (),
            body=_html(parser, tokens[:end]),
            rest=_html(parser, tokens[end:]),
        )
    )


def _html(parser: MarkdownIt, tokens: list[Token]) -> Markup:
    """A column without a name has no header."""
    found = str(parser.renderer.render(tokens, parser.options, {}))
    return Markup(re.sub(r"<th( style=\"[^\"]*\")?></th>", "<td></td>", found))


def source(name: str) -> str:
    """A document's Markdown."""
    document = DOCUMENTS[name]
    return files(document.package).joinpath(document.path).read_text(encoding="utf-8")


def anchor(heading: str) -> str:
    """The id of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _page_link(href: str) -> str:
    """Links between files as links between pages."""
    path, mark, fragment = href.partition("#")
    return LINKS.get(path, path) + mark + fragment


def settings_tables() -> str:
    """Every setting, in a Markdown table per group."""
    schema = Settings.model_json_schema()["properties"]
    lines: list[str] = []
    for name, field in Settings.model_fields.items():
        if name in GROUPS:
            lines += ["", f"### {GROUPS[name]}", "", "| flag | default | |", "| --- | --- | --- |"]
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool and field.default:
            flag = f"--no-{name.replace('_', '-')}"
        default = "" if field.default in (None, ()) or field.default_factory else _shown(field.default)
        text = " ".join(filter(None, (field.description or "", _limits(schema[name]))))
        cells = (f"`{flag}`", default, re.sub(r"([|*])", r"\\\1", text))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def metrics_table() -> str:
    """Every metric of the server in a Markdown table, as a query names it."""
    lines = ["| metric | what it is |", "| --- | --- |"]
    for family in Metrics("").collect():
        name = family.name.removeprefix("lpa:") + ("_total" if family.type == "counter" else "")
        kind = ", histogram" if family.type == "histogram" else ""
        lines.append(f"| `{name}`{kind} | {family.documentation} |")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    return {True: "yes", False: "no"}.get(default, f"`{default}`") if isinstance(default, bool) else f"`{default}`"


def _limits(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return f"One of {', '.join(f'`{value}`' for value in schema['enum'])}."
    kinds = schema.get("anyOf", [schema])
    forms = {"minimum": "at least {}", "exclusiveMinimum": "more than {}", "maximum": "at most {}"}
    found = [form.format(f"{kind[key]:g}") for kind in kinds for key, form in forms.items() if key in kind]
    return f"{', '.join(found).capitalize()}." if found else ""
