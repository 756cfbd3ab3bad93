"""The documents as pages: complete, readable without a key, with links that lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path

import pytest

from server.routes import pages
from server.settings import GROUPS, Settings
from tests.documents import ROOT
from tests.serving import Served, serving
from tests.tiny import Architecture

NAMES = [*pages.DOCUMENTS, pages.REFERENCE]


@pytest.fixture(scope="module")
def locked(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"], api_key="first", served_model_name="of-nobody's-business") as server:
        yield server


class Page(HTMLParser):
    """Tags with their attributes, and texts in code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def values(self, attribute: str) -> list[str]:
        return [str(attributes[attribute]) for _, attributes in self.tags if attribute in attributes]

    @cached_property
    def ids(self) -> set[str]:
        return set(self.values("id"))

    def count(self, tag: str) -> int:
        return sum(tag == found for found, _ in self.tags)


@pytest.fixture(scope="module")
def read(locked: Served) -> dict[str, Page]:
    """Every page, as someone without a key gets it."""
    found = {}
    for name in NAMES:
        answer = locked.client.get(f"/docs/{name}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8"), name
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "of-nobody" not in answer.text
        found[name] = Page(answer.text)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_page_loads_nothing_and_has_landmarks(read: dict[str, Page], name: str) -> None:
    page = read[name]
    assert not page.values("src")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "form"}
    assert (page.count("main"), page.count("h1")) == (1, 1)
    assert page.values("aria-current") == ["page"]
    links = page.values("href")
    for other in pages.DOCUMENTS:
        assert (other or "./") in links
    ids = page.values("id")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(read: dict[str, Page], name: str) -> None:
    for link in read[name].values("href"):
        target, _, fragment = link.partition("#")
        if target in ("../", "../openapi.json") or target.startswith(("https://", "http://127.0.0.1:8000/")):
            continue
        page = read[name if not target else "" if target == "./" else target]
        assert not fragment or fragment in page.ids, link


def test_the_short_address_leads_to_the_documents(locked: Served) -> None:
    answer = locked.client.get("/docs")
    assert (answer.status_code, answer.headers["location"]) == (307, "docs/")


def test_every_document_has_a_page() -> None:
    files = {path.stem for path in (ROOT / "server" / "docs").glob("*.md")} - {"index"}
    assert files | {"", "lpa", "cpu"} == set(pages.DOCUMENTS)


def test_operations_shows_every_metric_of_a_scrape(locked: Served) -> None:
    page = locked.client.get("/metrics").text
    scraped = re.findall(r"^# TYPE lpa:(\w+) (\w+)$", page, re.MULTILINE)
    rows = [f"| `{name}`{', histogram' if kind == 'histogram' else ''} |" for name, kind in scraped]
    assert re.findall(r"^\| `\w+`.*? \|", pages.metrics_table(), re.MULTILINE) == rows


def test_operations_shows_every_setting_in_its_group() -> None:
    text = pages.settings_tables()
    flags = re.findall(r"^\| `--(?:no-)?([\w-]+)`", text, re.MULTILINE)
    assert flags == [name.replace("_", "-") for name in Settings.model_fields]
    assert re.findall("^### (.+)$", text, re.MULTILINE) == list(GROUPS.values())
    assert "| `--port` | `8000` | Port to listen on; 0 takes a free one. At least 0, at most 65535. |" in text
    assert "| `--no-log-requests` | yes | Log a line for every request. |" in text
    assert "One of `32`, `64`, `128`." in text
    page = pages.render("operations")
    assert "{settings}" not in page
    assert "{metrics}" not in page
    assert "<code>--kv-cache-layout</code>" in page
