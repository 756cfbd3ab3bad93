"""The page's files as they are served and as they refer to one another; a browser drives them in tests/extra."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from lpa_model.config import Architecture
from server.routes.playground import PLAYGROUND_PATHS
from tests.serving import serving

FOLDER = Path(__file__).parent.parent / "server/playground"
SOURCES = {path.name: path.read_text() for path in sorted(FOLDER.iterdir())}
SCRIPTS = {name: text for name, text in SOURCES.items() if name.endswith(".js")}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class Page(HTMLParser):
    """Tags of index.html with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(SOURCES["index.html"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def values(self, attribute: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(attribute)) is not None]


@pytest.fixture(scope="module")
def client(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[httpx.Client]:
    """Of a server that asks for a key, which this client does not send."""
    with serving(tiny_checkpoints["setting2"], api_key="secret") as served:
        yield served.client


def url_of(name: str) -> str:
    return "/" if name == "index.html" else f"/playground/{name}"


@pytest.mark.parametrize("name", SOURCES)
def test_file_is_served_without_a_key_under_a_strict_policy(name: str, client: httpx.Client) -> None:
    answer = client.get(url_of(name))
    assert answer.status_code == 200
    assert answer.text == SOURCES[name]
    assert answer.headers["content-type"] == f"{TYPES[name.rpartition('.')[2]]}; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert not [
        source for sources in policy.values() for source in sources.split() if source not in ("'self'", "'none'")
    ]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_browser_that_has_a_file_is_told_so_without_it(client: httpx.Client) -> None:
    first = client.get("/playground/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/playground/main.js", headers={"if-none-match": f'"x", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    other = client.get("/playground/main.js", headers={"if-none-match": client.get("/").headers["etag"]})
    assert other.status_code == 200


def test_nothing_but_the_page_goes_without_a_key(client: httpx.Client) -> None:
    assert {url_of(name) for name in SOURCES} == PLAYGROUND_PATHS
    for path in ("/v1/models", "/playground", "/playground/", "/playground/index.html", "/playground/../app.py"):
        assert client.get(path).status_code == 401
    with_key = client.get("/playground/nothing.js", headers={"authorization": "Bearer secret"})
    assert with_key.status_code == 404


@pytest.mark.parametrize("name", SOURCES)
def test_no_file_names_another_host(name: str) -> None:
    text = SOURCES[name].replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.findall(r"(?:https?:|wss?:|data:|\B)//[\w.-]+\.\w|@import|url\(", text)


def test_what_the_policy_forbids_is_not_there() -> None:
    page = Page()
    assert not page.values("style")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert all(attributes.get("src") for tag, attributes in page.tags if tag == "script")
    for name, text in SCRIPTS.items():
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )


def test_every_reference_of_the_page_is_a_file_or_an_anchor() -> None:
    page = Page()
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    own = {*PLAYGROUND_PATHS, "/docs/"}
    for reference in page.values("src") + page.values("href"):
        assert reference.removeprefix("#") in ids if reference.startswith("#") else f"/{reference}" in own
    for name, text in SCRIPTS.items():
        for module in re.findall(r'from "([^"]+)"', text):
            assert module.removeprefix("./") in SCRIPTS, f"{name} imports {module}"


def test_every_id_that_a_script_asks_for_exists() -> None:
    ids = set(Page().values("id"))
    asked = set()
    for text in SCRIPTS.values():
        asked |= set(re.findall(r'(?:byId|getElementById|failed)\("([\w-]+)"', text))
        for names in re.findall(r"\[([^\]]*)\]\.map\(byId\)", text):
            asked |= set(re.findall(r'"([\w-]+)"', names))
    assert len(asked) > 20
    assert asked <= ids


def test_every_control_has_a_label_and_every_relation_a_target() -> None:
    page = Page()
    ids, labelled = set(page.values("id")), set(page.values("for"))
    wrapped = {"method", "max_length", "stride", "add_bos"}  # inside their labels, in the template
    for tag, attributes in page.tags:
        if tag in ("input", "select", "textarea"):
            name = attributes.get("id") or attributes.get("name")
            assert name in labelled | wrapped | {"same-text"}, name
    for relation in ("for", "aria-controls", "aria-labelledby"):
        assert set(page.values(relation)) <= ids


def test_scripts_stay_small() -> None:
    assert max(len(text.splitlines()) for text in SCRIPTS.values()) < 200
