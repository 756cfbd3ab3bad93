"""The page's files as they are served and as they refer to one another; a browser drives them in tests/extra."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

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
    wrapped = {"method", "max_length", "stride", "add_bos", "language"}  # inside their labels
    for tag, attributes in page.tags:
        if tag in ("input", "select", "textarea"):
            name = attributes.get("id") or attributes.get("name")
            assert name in labelled | wrapped | {"same-text"}, name
    for relation in ("for", "aria-controls", "aria-labelledby"):
        assert set(page.values(relation)) <= ids


# --- the heat scale --------------------------------------------------------------------------------------------------

STEPS = 7  # shades of the legend: 0, 2 ... 12 bits
# how someone without cones for red, green or blue sees linear sRGB (Machado, Oliveira and Fernandes 2009, severity 1)
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# OKLab (Ottosson 2020)
TO_LMS = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
TO_LAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip
Color = NDArray[np.float64]


def decoded(srgb: Color) -> Color:
    """Linear light of sRGB in [0, 1]."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def encoded(linear: Color) -> Color:
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def oklab(linear: Color) -> Color:
    found: Color = TO_LAB @ np.cbrt(TO_LMS @ np.clip(linear, 0, 1))
    return found


def of_oklch(lightness: float, chroma: float, hue: float) -> Color:
    """Linear sRGB."""
    a, b = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
    return np.linalg.inv(TO_LMS) @ (np.linalg.inv(TO_LAB) @ np.array([lightness, a, b])) ** 3


def of_hex(code: str) -> Color:
    return np.array([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def variable(name: str, theme: int) -> Color:
    """Linear sRGB of a custom property in the light (0) or dark (1) theme."""
    found = re.search(rf"--{name}: light-dark\((#\w+), (#\w+)\)", SOURCES["style.css"])
    assert found
    return decoded(of_hex(found[1 + theme]))


def shades(theme: int) -> list[Color]:
    """Linear sRGB of the legend's steps as they lie on a card."""
    rule = re.search(r"\n\.heat \{(.*?)\n\}", SOURCES["style.css"], re.DOTALL)
    assert rule
    text = re.findall(r"oklch\((.*)\)", rule[1])[theme].replace("calc", "").replace("var(--s)", "s")
    assert re.fullmatch(r"[\ds.()*+/ -]+", text)
    # the three coordinates stand between brackets, then the opacity
    parts: list[Callable[[float], float]] = [
        lambda s, part=part: float(eval(part, {"s": s}))
        for part in re.fullmatch(r"(\(.*?\)) (\(.*?\)) (\(.*?\)) / (\(.*?\))", text).groups()  # type: ignore[union-attr,misc]
    ]
    sheet = encoded(variable("sheet", theme))
    found = []
    for s in np.linspace(0, 1, STEPS):
        *coordinates, opacity = (part(s) for part in parts)
        alpha = min(1.0, opacity)
        found.append(decoded(alpha * encoded(of_oklch(*coordinates)) + (1 - alpha) * sheet))
    return found


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_steps_of_the_heat_scale_are_told_apart(theme: int, vision: str) -> None:
    seen = [oklab(np.clip(VISIONS[vision] @ shade, 0, 1)) for shade in shades(theme)]
    distances = [100 * float(np.linalg.norm(later - sooner)) for sooner, later in itertools.pairwise(seen)]
    assert min(distances) >= 4, distances


def test_both_heat_scales_have_the_same_range_of_lightness_and_text_is_read_on_all_of_it() -> None:
    ranges = []
    for theme in (0, 1):
        lightness = [float(oklab(shade)[0]) for shade in shades(theme)]
        assert lightness == sorted(lightness, reverse=theme == 0)
        ranges.append(abs(lightness[-1] - lightness[0]))
        luminances = [
            float(np.dot([0.2126, 0.7152, 0.0722], shade)) for shade in [variable("ink", theme), *shades(theme)]
        ]
        ink, *grounds = luminances
        for ground in grounds:
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5
    assert ranges[1] >= ranges[0]


def test_scripts_stay_small() -> None:
    assert max(len(text.splitlines()) for text in SCRIPTS.values()) < 200
