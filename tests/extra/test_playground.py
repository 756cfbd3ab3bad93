"""The page in a real browser, against `lpa serve` with the embedded model."""

from __future__ import annotations

import ast
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, expect, sync_playwright

from server.routes.pages import DOCS_PATHS
from tests.processes import lpa_serve
from tests.templates import CHATML

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = shutil.which("chromium")
AXE = Path(sys.prefix) / "node_modules/axe-core/axe.min.js"  # make test-extra puts it there
ARGUMENTS = (
    *("--no-sandbox", "--headless=new", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WIDTHS = {"phone": 360, "tablet": 800, "desktop": 1280}
STORY = "The old man sat down by the fire and told them a story."
MIXED = 'He said: "naïve, 你好 🙂👍🏽" — and\nthe waves\n\nsaid nothing.'

# texts of the pieces of tokens that are given as lists of bytes
PIECES = """async (parts) => {
  const { assembler } = await import("/playground/tokens.js");
  const { push, flush } = assembler();
  const pieces = parts.map((part) => push({ bytes: Uint8Array.from(part), logprob: -1 }));
  return [...pieces, flush()].filter(Boolean).map(({ text }) => text);
}"""

# a request as code, and a link's entries after they were written and read
CODE = """async ({ base, requests, key }) => {
  const { shellCode, pythonCode } = await import("/playground/code.js");
  return [shellCode(base, requests, key), pythonCode(base, requests, key)];
}"""
LINK = """async ({ tab, entries }) => {
  const { fragmentOf, readFragment } = await import("/playground/link.js");
  return readFragment(new URL("#" + fragmentOf(tab, entries), location.href).hash.slice(1));
}"""
RANKS = """async (ranks) => {
  const { depthOfRank } = await import("/playground/shades.js");
  return ranks.map((rank) => Math.round(6 * depthOfRank(rank)));
}"""
SIZES = """async (sizes) => {
  const { sizeOf } = await import("/playground/cache.js");
  return sizes.map(sizeOf);
}"""

# the colours of the scored tokens, and of the card that they lie on, as a browser blends them
FILLS = """() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const paper = getComputedStyle(document.querySelector("#score-result")).backgroundColor;
  const blended = (color) => {
    for (const layer of [paper, color]) {
      context.fillStyle = layer;
      context.fillRect(0, 0, 1, 1);
    }
    const bytes = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    return "#" + bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("");
  };
  const spans = [...document.querySelectorAll("#score-map .token")];
  const tokens = spans.map((span) => blended(getComputedStyle(span).backgroundColor));
  return { paper: blended(paper), tokens: [...new Set(tokens)].filter((color) => color !== blended(paper)) };
}"""

# WCAG's contrast of every text that is visible and not disabled, as {text: ratio} of those below 4.5
LOW_CONTRAST = """() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const luminance = (colors) => {
    context.clearRect(0, 0, 1, 1);
    for (const color of colors) {
      context.fillStyle = color;
      context.fillRect(0, 0, 1, 1);
    }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((byte) => {
      const value = byte / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const low = {};
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
    if (!text.length || element.matches(":disabled, script, template, option") || !element.checkVisibility()) continue;
    const grounds = [];
    for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
    const [ground, ink] = [luminance(grounds), luminance([...grounds, getComputedStyle(element).color])];
    const ratio = (Math.max(ground, ink) + 0.05) / (Math.min(ground, ink) + 0.05);
    if (ratio < 4.5) low[text[0].data.trim()] = ratio;
  }
  return low;
}"""

# of axe-core: the rules that the page breaks, and the elements
VIOLATIONS = """async () => {
  const { violations } = await axe.run(document, { resultTypes: ["violations"] });
  return violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)]);
}"""

FOCUSED = "document.activeElement.id"
GROUND = "getComputedStyle(document.documentElement).backgroundColor"

expect.set_options(timeout=60_000)


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[str]:
    """`lpa serve` on a free port; its URL. It must end with status 0 when it is asked to."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LPA_")}
    with lpa_serve(folder / "stdout", "--threads", 1, *flags, environment=environment) as (found, process):
        yield found
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("serve")) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "chromium is not installed"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield launched
        launched.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Open]:
    """Opens the page at a width and in a theme. No page may ask another host for anything or log an error."""
    requests: list[str] = []
    troubles: list[str] = []
    contexts = []

    def open_at(width: int = 1280, theme: Any = "light", at: str = url, ready: bool = True, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(f"{at}/")
        if ready:  # with a first completion
            expect(page.locator("#completion .token").last).to_be_visible()
            idle(page, "complete")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert requests
    assert {urlsplit(request).hostname for request in requests} == {"127.0.0.1"}
    # the browser logs every answer that is no success by itself; tests that cause one look at what the page says
    assert [text for text in troubles if not text.startswith("Failed to load resource")] == []


def ask(url: str, path: str, **body: Any) -> dict[str, Any]:
    data = json.dumps({"model": "lpa-tiny", **body}).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def figure(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def running(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        found = re.search(r"^lpa:num_requests_running\S* (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found
    return float(found[1])


def idle(page: Page, tab: str) -> None:
    """Wait until nothing runs there."""
    expect(page.locator(f"#{tab}-form:not(.running)")).to_have_count(1, timeout=120_000)


def run(page: Page, tab: str) -> None:
    """Press the button, which stays pressed until all is there."""
    page.click(f"#{tab}-form .primary")
    idle(page, tab)


def open_tab(page: Page, tab: str) -> None:
    """With its first result, which comes by itself."""
    page.click(f"#{tab}-tab")
    expect(page.locator(f"#{tab} .token").last).to_be_visible()
    idle(page, tab)


def complete(page: Page, **controls: Any) -> None:
    """Set controls, and wait for a whole completion."""
    page.evaluate("document.querySelector('.more').open = true")
    for name, value in controls.items():
        page.locator(f"#{name}").fill(str(value))
    run(page, "complete")
    expect(page.locator("#copy")).to_be_enabled()


def score(page: Page, text: str) -> None:
    open_tab(page, "score")
    page.fill("#score-text", text)
    run(page, "score")
    expect(page.locator("#score-form")).not_to_have_class("stale")


def test_completion_is_that_of_the_api(open_page: Open, url: str) -> None:
    page = open_page()
    expect(page.locator("#model")).to_have_text("lpa-tiny")
    complete(page, prompt="It was a dark night, and", temperature=0, max_tokens=24)
    body = {"prompt": "It was a dark night, and", "temperature": 0, "max_tokens": 24}
    [choice] = ask(url, "/v1/completions", **body)["choices"]
    assert page.locator("#completion").text_content() == body["prompt"] + choice["text"]
    assert page.locator("#completion .token").count() == 24
    expect(page.locator("#complete-facts")).to_contain_text("24 tokens")
    page.click("#continue")
    idle(page, "complete")
    assert page.locator("#prompt").input_value() == body["prompt"] + choice["text"]


def test_stop_in_the_middle_ends_the_request(open_page: Open, url: str) -> None:
    page = open_page()
    page.fill("#max_tokens", "1000")
    page.click("#run")
    expect(page.locator("#run")).to_have_text("Stop")
    expect(page.locator("#completion.streaming .token").nth(5)).to_be_visible()
    page.click("#run")  # all of it takes little more than a second
    expect(page.locator("#run")).to_have_text("Complete")
    expect(page.locator("#complete-facts")).to_contain_text("stopped")
    assert 5 < page.locator("#completion .token").count() < 1000
    for _ in range(100):
        if running(url) == 0:
            break
        time.sleep(0.05)
    assert running(url) == 0
    expect(page.locator("#live-running")).to_have_text("0")


def test_token_shows_its_alternatives(open_page: Open, url: str) -> None:
    page = open_page()
    complete(page, temperature=0, max_tokens=8)
    card = page.locator("#card")
    expect(card).to_be_hidden()
    page.locator("#completion .token").nth(3).hover()
    expect(card).to_be_visible()
    [choice] = ask(url, "/v1/completions", prompt="It was a dark night, and", temperature=0, max_tokens=8, logprobs=5)[
        "choices"
    ]
    top = choice["logprobs"]["top_logprobs"][3]
    labels = [label.replace("␣", " ") for label in card.locator(".label").all_text_contents()]
    labels = [{"new line": "\n", "2 new lines": "\n\n", "space": " "}.get(label, label) for label in labels]
    assert labels == [*top, "all others"]
    shown = [float(text.removesuffix(" %")) / 100 for text in card.locator(".value").all_text_contents()]
    assert shown == pytest.approx([*map(math.exp, top.values()), 1 - sum(map(math.exp, top.values()))], rel=0.01)
    assert card.locator(".label.chosen").text_content() == card.locator(".label").first.text_content()  # greedy
    page.mouse.move(0, 0)
    expect(card).to_be_hidden()


def test_a_tap_shows_the_card_inside_a_phone(open_page: Open) -> None:
    page = open_page(360, has_touch=True, is_mobile=True)
    complete(page, max_tokens=30)
    for at in (0, 12, 29):
        page.locator("#completion .token").nth(at).tap()
        box = page.locator("#card").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_stop_text_and_what_the_server_refuses(open_page: Open, url: str) -> None:
    page = open_page()
    complete(page, temperature=0, max_tokens=40)
    whole = (page.locator("#completion").text_content() or "").removeprefix("It was a dark night, and")
    word = whole.split()[5]
    complete(page, stop=word)
    expect(page.locator("#complete-facts")).to_contain_text(f"ended at “{word}”")
    struck = "".join(page.locator("#completion s").all_text_contents())
    shown = (page.locator("#completion").text_content() or "").removeprefix("It was a dark night, and")
    assert shown.removesuffix(struck) == whole[: whole.index(word)]
    assert struck.startswith(word)
    page.fill("#stop", "\n".join("abcdefghijklmnopqrstuvwxyz"))
    run(page, "complete")
    expect(page.locator("#complete-error")).to_contain_text("Stop at: ")
    expect(page.locator("#stop")).to_have_attribute("aria-invalid", "true")
    page.click("#complete-error .remedy")
    expect(page.locator("#complete-error")).to_be_empty()
    expect(page.locator("#stop")).not_to_have_attribute("aria-invalid", "true")
    assert page.locator("#stop").input_value() == ""


def test_max_tokens_are_those_that_there_is_room_for(open_page: Open, url: str) -> None:
    page = open_page()
    prompt = STORY * 4
    count = ask(url, "/tokenize", prompt=prompt)["count"]
    page.fill("#prompt", prompt)
    expect(page.locator("#prompt-size")).to_have_text(f"{count} of 1,024 tokens")
    page.fill("#max_tokens", "5000")
    assert page.locator("#max_tokens").input_value() == str(1024 - count)
    page.fill("#prompt", "x")
    expect(page.locator("#max_tokens")).to_have_value("1023")
    page.fill("#max_tokens", "20")

    page.fill("#prompt", STORY * 100)
    before = page.locator("#completion").text_content()
    run(page, "complete")
    expect(page.locator("#complete-error")).to_contain_text("The prompt takes all that the model can read at once.")
    assert page.locator("#completion").text_content() == before
    page.click("#complete-error .remedy")
    expect(page.locator("#complete-facts")).to_contain_text("20 tokens")
    expect(page.locator("#prompt-size")).to_contain_text("1,00")
    assert page.locator("#prompt").input_value().endswith(STORY)
    idle(page, "complete")
    expect(page.locator("#complete-error")).to_be_empty()


def test_score_is_that_of_the_api(open_page: Open, url: str) -> None:
    page = open_page()
    score(page, MIXED)
    [scored] = ask(url, "/v1/perplexity", input=MIXED, return_tokens=True)["data"]
    assert page.locator("#score-perplexity").text_content() == figure(scored["perplexity"])
    assert page.locator("#score-bits-per-byte").text_content() == f"{scored['bits_per_byte']:.3f}"
    assert page.locator("#score-num-tokens").text_content() == str(scored["num_tokens"])
    assert page.locator("#score-map").text_content() == MIXED  # characters of several tokens are whole
    pieces = page.locator("#score-map .token").all_text_contents()
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert len(pieces) < len(scored["tokens"])
    page.locator("#score-map .token", has_text="🙂").focus()
    assert page.locator("#card .bar").count() > 1
    expect(page.locator("#card")).to_contain_text("tokens, which have bytes that are no text alone")


def test_most_surprising_words(open_page: Open, url: str) -> None:
    page = open_page()
    text = "Once upon a time there was a king who loved algebra."
    score(page, text)
    words = page.locator("#score-words button").all_text_contents()
    assert words[0] == "algebra"
    assert sorted(words) == sorted(re.findall(r"\w+", text))
    [scored] = ask(url, "/v1/perplexity", input=text, return_tokens=True)["data"]
    start, end = text.index("algebra") - 1, text.index("algebra") + len("algebra")
    bits = sum(-token["logprob"] / math.log(2) for token in scored["tokens"] if start <= token["offset"] < end)
    assert page.locator("#score-words li span").first.text_content() == f"{bits:.1f} bits"
    page.click("#score-words button >> nth=0")
    assert page.evaluate("document.activeElement.className").startswith("token")
    expect(page.locator("#card")).to_be_visible()


def test_compare_two_texts_and_two_methods(open_page: Open, url: str) -> None:
    page = open_page()
    open_tab(page, "compare")
    other = "Fire the old by a man sat story and down them told the."
    page.fill("#a-text", STORY)
    page.fill("#b-text", other)
    run(page, "compare")
    expect(page.locator("#verdict")).to_contain_text("finds A the easier text")
    cells = page.locator("#compare-table tr").first.locator("td").all_text_contents()
    expected = [entry["perplexity"] for entry in ask(url, "/v1/perplexity", input=[STORY, other])["data"]]
    assert cells[:2] == [figure(value) for value in expected]
    assert page.locator("#b-map").text_content() == other

    page.check("#same-text")
    assert page.locator("#b-text").input_value() == STORY
    page.fill("#a-text", STORY * 3)
    page.select_option('[data-method="b"] [name="method"]', "sliding")
    page.fill('[data-method="b"] [name="max_length"]', "8")
    page.fill('[data-method="b"] [name="stride"]', "4")
    run(page, "compare")
    expect(page.locator("#verdict")).to_contain_text("One text, two methods: B reads")
    cells = page.locator("#compare-table tr").first.locator("td").all_text_contents()
    methods: list[dict[str, Any]] = [{"method": "sliding"}, {"method": "sliding", "max_length": 8, "stride": 4}]
    answers = [ask(url, "/v1/perplexity", input=STORY * 3, **method) for method in methods]
    assert cells[:2] == [figure(answer["data"][0]["perplexity"]) for answer in answers]
    page.uncheck("#same-text")
    assert page.locator("#b-text").input_value() == other


def test_every_method_of_the_menu_is_taken(open_page: Open) -> None:
    page = open_page()
    open_tab(page, "score")
    page.fill("#score-text", STORY * 4)
    page.fill('[data-method="score"] [name="max_length"]', "16")
    for method in ("sliding", "rolling", "chunks"):
        page.select_option('[data-method="score"] [name="method"]', method)
        run(page, "score")
        expect(page.locator("#announce")).to_contain_text("Perplexity")
        expect(page.locator("#score-error")).to_be_empty()
        assert page.locator("#score-map").text_content() == STORY * 4
    assert page.locator("#score-map .unscored").count() > 16  # chunks: the first halves
    expect(page.locator("#score-bits-per-byte")).to_have_text("\N{EN DASH}")  # there is none, of a part of the bytes
    page.select_option('[data-method="score"] [name="method"]', "full")
    run(page, "score")
    expect(page.locator("#score-error")).to_contain_text("longer than one window")
    expect(page.locator("#score-form")).to_have_class(re.compile("stale"))
    page.get_by_role("button", name="Use sliding windows").click()
    expect(page.locator("#score-form")).not_to_have_class(re.compile("stale"))
    expect(page.locator("#score-error")).to_be_empty()
    expect(page.locator('[data-method="score"] [name="method"]')).to_have_value("sliding")
    page.fill('[data-method="score"] [name="max_length"]', "5000")
    run(page, "score")
    expect(page.locator("#score-error")).to_contain_text("Window: ")
    page.get_by_role("button", name="Use the default").click()
    expect(page.locator("#score-error")).to_be_empty()


def test_a_long_text_has_figures(open_page: Open) -> None:
    page = open_page()
    open_tab(page, "score")
    for repeats, note, drawn in ((500, "The first 5,000 of 7,", 5000), (4000, "is not drawn", 0)):
        page.fill("#score-text", STORY * repeats)
        run(page, "score")
        expect(page.locator("#score-note")).to_contain_text(note)
        assert page.locator("#score-map .token").count() == drawn
        assert 1 < float(page.locator("#score-perplexity").text_content() or "") < 1000


def test_keyboard_is_enough(open_page: Open) -> None:
    page = open_page()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED) == "prompt":
            break
    assert page.evaluate(FOCUSED) == "prompt"
    page.keyboard.press("Control+A")
    page.keyboard.type("The captain looked at")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#completion.streaming .token").nth(2)).to_be_visible()
    assert page.evaluate(FOCUSED) == "prompt"
    page.keyboard.press("Escape")
    expect(page.locator("#run")).to_have_text("Complete")
    assert (page.locator("#completion").text_content() or "").startswith("The captain looked at")
    for _ in range(40):
        page.keyboard.press("Tab")
        if "token" in page.evaluate("document.activeElement.className"):
            break
    expect(page.locator("#completion .token").first).to_be_focused()
    expect(page.locator("#card")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#completion .token").nth(1)).to_be_focused()
    page.keyboard.press("End")
    expect(page.locator("#completion .token").last).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#card")).to_be_hidden()
    for _ in range(40):
        page.keyboard.press("Shift+Tab")
        if page.evaluate(FOCUSED) == "complete-tab":
            break
    page.keyboard.press("ArrowRight")
    assert page.evaluate(FOCUSED) == "score-tab"
    expect(page.locator("#score")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(FOCUSED) == "batches-tab"


def test_a_server_with_a_key_asks_for_it_once(open_page: Open, tmp_path: Path) -> None:
    with serving(tmp_path, "--api-key", "secret") as url:
        page = open_page(at=url, ready=False)
        dialog = page.locator("#key-dialog")
        expect(dialog).to_contain_text("This server wants one.")
        page.keyboard.press("Escape")
        expect(page.locator("#complete-error")).to_contain_text("This server wants an API key.")
        page.get_by_role("button", name="Give a key").click()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("The server does not know this key.")
        expect(page.locator("#key")).to_have_attribute("aria-invalid", "true")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("lpa-tiny")
        expect(dialog).to_be_hidden()
        expect(page.locator("#completion .token").last).to_be_visible()  # the first result, now that it may
        idle(page, "complete")
        complete(page, max_tokens=4)
        page.click("#key-button")
        page.fill("#key", "wrong again")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("The server does not know this key.")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        page.reload()
        expect(page.locator("#model")).to_have_text("lpa-tiny")
        expect(dialog).to_be_hidden()
        expect(page.locator("#live-running")).to_have_text("0")
        page.goto("about:blank")


def test_live_strip_backs_off_when_refused_and_rests_while_hidden(open_page: Open) -> None:
    page = open_page()
    expect(page.locator("#live-running")).to_have_text("0")
    asked: list[float] = []
    page.on("request", lambda request: asked.append(time.monotonic()) if request.url.endswith("/metrics") else None)
    page.evaluate("Object.defineProperty(document, 'hidden', { get: () => true, configurable: true })")
    page.wait_for_timeout(2500)
    assert len(asked) <= 1
    page.route("**/metrics", lambda route: route.fulfill(status=401, json={}))
    asked.clear()
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#live-running")).to_have_text("\N{EN DASH}")
    expect(page.locator("#live")).to_have_attribute("title", "Shown once a key is given")
    page.wait_for_timeout(6500)
    gaps = [later - sooner for sooner, later in itertools.pairwise(asked)]
    assert gaps[0] > 1.8
    assert gaps[-1] > 1.5 * gaps[0]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_looks(device: str, theme: str, open_page: Open, tmp_path: Path) -> None:
    page = open_page(WIDTHS[device], theme)
    expect(page.locator("#model")).to_be_visible()
    for tab in ("complete", "score", "compare"):
        open_tab(page, tab)
        page.screenshot(path=tmp_path / f"{tab}-{device}-{theme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate(LOW_CONTRAST) == {}
        page.locator(f"#{tab} textarea").first.fill("Another text.")
        expect(page.locator(f"#{tab}-form")).to_have_class(re.compile("stale"))
        assert page.evaluate(LOW_CONTRAST) == {}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("device", ["phone", "desktop"])
def test_axe_finds_nothing(device: str, theme: str, open_page: Open) -> None:
    page = open_page(WIDTHS[device], theme, bypass_csp=True)  # axe is no part of the page

    def check(state: str) -> None:
        page.wait_for_timeout(300)  # colours that change slowly
        assert page.evaluate(VIOLATIONS) == [], state

    page.evaluate(AXE.read_text())
    for tab in ("complete", "score", "compare"):
        open_tab(page, tab)
        check(tab)
        page.locator(f"#{tab} .token").nth(3).focus()
        check(f"{tab}, card")
        page.keyboard.press("Enter")
        check(f"{tab}, alternative")
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        page.locator(f"#{tab} .share").click()
        expect(page.locator("#share-code")).to_contain_text("curl")
        check(f"{tab}, share")
        page.keyboard.press("Escape")
        page.locator(f"#{tab} textarea").first.fill("Another text.")
        check(f"{tab}, changed")
        page.route("**/v1/**", lambda route: route.abort())
        run(page, tab)
        expect(page.locator(f"#{tab}-error")).to_contain_text("The server does not answer.")
        check(f"{tab}, failed")
        page.unroute("**/v1/**")
    page.click("#complete-tab")
    page.click(".more summary")
    check("all controls")
    page.click("#key-button")
    check("key")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_in_the_documents(theme: str, open_page: Open, url: str) -> None:
    page = open_page(WIDTHS["phone"], theme, bypass_csp=True)
    for path in sorted(DOCS_PATHS):
        page.goto(f"{url}{path}")
        page.evaluate(AXE.read_text())
        assert page.evaluate(VIOLATIONS) == [], path
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path


def test_a_first_visit_shows_what_there_is(open_page: Open, url: str) -> None:
    page = open_page()
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        [card] = json.load(answer)["data"]
    assert page.locator("#about").text_content() == card["description"]
    expect(page.locator("#top_p")).to_be_hidden()
    expect(page.locator("#temperature")).to_be_visible()
    chip = page.locator("#chips button").nth(2)
    text = chip.text_content() or ""
    chip.click()
    expect(page.locator("#completion .before")).to_have_text(text)
    idle(page, "complete")
    assert page.locator("#prompt").input_value() == text
    complete(page, top_k=5, seed=1)
    expect(page.locator(".more summary small")).to_have_text("2 changed")


def test_results_are_dimmed_until_they_are_of_the_text_again(open_page: Open) -> None:
    page = open_page()
    open_tab(page, "score")
    form, text = page.locator("#score-form"), page.locator("#score-text")
    first = text.input_value()
    text.fill("Another text.")
    expect(form).to_have_class(re.compile("stale"))
    text.fill(first)
    expect(form).not_to_have_class(re.compile("stale"))
    page.fill('[data-method="score"] [name="stride"]', "7")
    expect(form).to_have_class(re.compile("stale"))
    page.get_by_role("button", name="Score again").click()
    expect(form).not_to_have_class(re.compile("stale"))


def test_a_run_that_fails_destroys_nothing(open_page: Open) -> None:
    page = open_page()
    for tab in ("complete", "score", "compare"):
        open_tab(page, tab)
        results = "#completion", "#complete-facts", "#score-result", "#compare-result"
        before = [page.locator(result).text_content() for result in results]
        page.route("**/v1/**", lambda route: route.abort())
        run(page, tab)
        expect(page.locator(f"#{tab}-error")).to_contain_text("The server does not answer.")
        assert [page.locator(result).text_content() for result in results] == before
        page.unroute("**/v1/**")
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(f"#{tab}-error")).to_be_empty()
        idle(page, tab)


def test_scoring_shows_its_progress_and_stops(open_page: Open, url: str) -> None:
    page = open_page()
    open_tab(page, "score")
    perplexity = page.locator("#score-perplexity").text_content()
    page.fill("#score-text", STORY * 4000)
    page.click("#score-form .primary")
    expect(page.locator("#score .progress")).to_contain_text(re.compile(r"\d of 5\d,\d\d\d tokens"))
    assert 0 < page.locator("#score progress").evaluate("bar => bar.value") < 1
    page.click("#score-form .primary")
    idle(page, "score")
    expect(page.locator("#score .progress")).to_be_hidden()
    expect(page.locator("#score-error")).to_be_empty()
    assert page.locator("#score-perplexity").text_content() == perplexity
    for _ in range(200):
        if running(url) == 0:
            break
        time.sleep(0.05)
    assert running(url) == 0


def test_tokens_that_show_nothing_have_names(open_page: Open) -> None:
    page = open_page()
    text = "One line.\n\n\tTwo \u00a0\u200b lines."
    score(page, text)
    assert page.locator("#score-map").text_content() == text
    blank = page.locator("#score-map .token").filter(has_not_text=re.compile(r"[^\s\u200b]"))
    names = [name for token in blank.all() if (name := token.get_attribute("aria-label"))]
    assert blank.count() == len(names) > 0
    for name in names:
        assert re.fullmatch(r"((\d+ )?(space|new line|tab|no-break space|zero-width space)s?(, )?)+", name), name
    page.locator("#score-map .token[aria-label*='new line']").first.focus()
    expect(page.locator("#card b")).to_contain_text("new line")


def test_after_continue_the_caret_is_at_the_end_of_the_text(open_page: Open) -> None:
    page = open_page()
    complete(page, max_tokens=5)
    page.click("#continue")
    assert page.evaluate(FOCUSED) == "prompt"
    assert page.evaluate("document.activeElement.selectionStart === document.activeElement.value.length")


def test_theme_button_overrules_the_system(open_page: Open) -> None:
    page = open_page(theme="dark")
    dark = page.evaluate(GROUND)
    page.click("#theme-button")
    light = page.evaluate(GROUND)
    assert light != dark
    page.reload()
    assert page.evaluate(GROUND) == light
    page.click("#theme-button")
    assert page.evaluate(GROUND) == dark
    expect(page.locator("#theme-button")).to_have_attribute("aria-label", "Theme: dark")


def test_pieces_are_whole_characters(open_page: Open) -> None:
    page = open_page()

    @settings(max_examples=60, deadline=None)
    @given(text=st.text(min_size=1, max_size=20), cuts=st.sets(st.integers(1, 79)))
    def check(text: str, cuts: set[int]) -> None:
        raw = text.encode()
        ends = [*sorted(cut for cut in cuts if cut < len(raw)), len(raw)]
        parts = [list(raw[start:end]) for start, end in itertools.pairwise([0, *ends])]
        pieces = page.evaluate(PIECES, parts)
        boundaries = {len(text[:i].encode()) for i in range(len(text) + 1)}
        cut_at = [0, *(end for end in ends if end in boundaries)]
        assert pieces == [raw[start:end].decode() for start, end in itertools.pairwise(cut_at)]

    check()


# --- branches, links, pictures, code, ranks, chats, the cache --------------------------------------------------------


def opened(page: Page, fragment: str) -> Page:
    """A new page of the same context at a link."""
    other = page.context.new_page()
    other.goto(f"{page.url.split('#')[0]}#{fragment}")
    return other


def text_of(page: Page, selector: str) -> str:
    return page.locator(selector).text_content() or ""


def test_an_alternative_is_branched_to_and_back(open_page: Open) -> None:
    page = open_page()
    complete(page, temperature=0, max_tokens=12)
    whole, facts = text_of(page, "#completion"), text_of(page, "#complete-facts")
    before = text_of(page, "#completion .before")
    tokens = page.evaluate("[...document.querySelectorAll('#completion .token')].map((span) => span.textContent)")
    page.locator("#completion .token").nth(2).click()
    choice = page.locator("#card button").nth(1)
    alternative = choice.get_attribute("value") or ""
    choice.click()
    idle(page, "complete")
    prompt = page.locator("#prompt").input_value()
    assert prompt.endswith(alternative)
    kept = prompt.removesuffix(alternative)
    assert whole.startswith(kept)
    assert kept.startswith(before)
    assert kept.split()[-2:] == [token.strip() for token in tokens[:2]]
    expect(page.locator("#completion .before")).to_have_text(prompt)

    expect(page.locator("#prompt")).to_be_focused()
    page.locator("#completion .token").nth(1).focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    second = page.evaluate("document.activeElement.value")
    page.keyboard.press("Escape")
    expect(page.locator("#completion .token").nth(1)).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_have_value(re.compile(re.escape(second) + "$"))
    idle(page, "complete")
    page.click("#back")
    expect(page.locator("#prompt")).to_have_value(prompt)
    page.click("#back")
    expect(page.locator("#back")).to_be_hidden()
    assert (text_of(page, "#completion"), text_of(page, "#complete-facts")) == (whole, facts)
    assert page.locator("#complete-form.stale").count() == 0


def test_a_scored_text_is_branched_from(open_page: Open) -> None:
    page = open_page()
    score(page, STORY)
    page.locator("#score-map .token", has_text="fire").click()
    choice = page.locator("#card button").first
    alternative = choice.get_attribute("value") or ""
    choice.click()
    expect(page.locator("#complete")).to_be_visible()
    expect(page.locator("#prompt")).to_have_value(STORY[: STORY.index(" fire")] + alternative)
    idle(page, "complete")
    expect(page.locator("#completion .before")).to_have_text(STORY[: STORY.index(" fire")] + alternative)


def test_a_link_opens_with_text_settings_and_seed(open_page: Open) -> None:
    page = open_page()
    complete(page, prompt="A fox, 50 % & more #1?\nÄ 🙂", max_tokens=16, top_k=7, stop="zzz\nyyy")
    page.click("#complete .share")
    link = page.locator("#share-link").input_value()
    other = opened(page, link.split("#", 1)[1])
    expect(other.locator("#completion .token").last).to_be_visible()
    idle(other, "complete")
    assert text_of(other, "#completion") == text_of(page, "#completion")
    for name in ("prompt", "max_tokens", "top_k", "stop", "temperature"):
        assert other.locator(f"#{name}").input_value() == page.locator(f"#{name}").input_value()

    page.keyboard.press("Escape")
    open_tab(page, "compare")
    page.fill("#a-text", STORY * 2)
    page.check("#same-text")
    page.select_option('[data-method="b"] [name="method"]', "rolling")
    run(page, "compare")
    page.click("#compare .share")
    third = opened(page, page.locator("#share-link").input_value().split("#", 1)[1])
    expect(third.locator("#b-map .token").last).to_be_visible()
    idle(third, "compare")
    assert text_of(third, "#compare-table") == text_of(page, "#compare-table")
    assert third.locator("#same-text").is_checked()
    third.evaluate("location.hash = '#score?score-text=Another.'")  # as when a link is pasted there
    expect(third.locator("#score-map .token").last).to_be_visible()
    expect(third.locator("#score-text")).to_have_value("Another.")


def test_a_text_that_no_link_can_hold_is_said(open_page: Open) -> None:
    page = open_page()
    open_tab(page, "score")
    page.fill("#score-text", STORY * 2000)
    page.click("#score .share")
    expect(page.locator("#share-why")).to_have_text("The text is too long for a link.")
    expect(page.locator("#share-copy-link")).to_be_disabled()


@settings(max_examples=60, deadline=None)
@given(entries=st.lists(st.tuples(st.text(max_size=5), st.text(max_size=20)), max_size=4))
def check_links(page: Page, entries: list[tuple[str, str]]) -> None:
    found = page.evaluate(LINK, {"tab": "score", "entries": entries})
    assert found == {"tab": "score", "entries": [list(entry) for entry in entries]}


def test_links_are_read_as_they_were_written(open_page: Open) -> None:
    check_links(open_page())


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(), other=JSON_VALUES, key=st.booleans())
def check_code(page: Page, prompt: str, other: Any, key: bool) -> None:
    body = {"model": "lpa-tiny", "prompt": prompt, "top_k": other}
    curl, python = page.evaluate(CODE, {"base": "http://a/", "requests": [["v1/completions", body]], "key": key})
    words = shlex.split(curl.replace("\\\n", ""))
    assert words[:2] == ["curl", "http://a/v1/completions"]
    assert json.loads(words[-1]) == body
    assert ("Authorization: Bearer $LPA_API_KEY" in words) == key
    calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    [create] = [node for node in calls if ast.unparse(node.func) == "client.completions.create"]
    fields = {keyword.arg: ast.literal_eval(keyword.value) for keyword in create.keywords}
    assert fields == {"model": "lpa-tiny", "prompt": prompt, "extra_body": {"top_k": other}}


def test_code_says_what_the_request_does(open_page: Open) -> None:
    check_code(open_page())


def test_code_runs_and_gives_what_the_page_shows(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    complete(page, prompt="'It\\'s \"a\" $HOME fox", max_tokens=12, top_k=9)
    text = text_of(page, "#completion").removeprefix(page.locator("#prompt").input_value())
    page.click("#complete .share")
    answer = subprocess.run(["bash", "-c", text_of(page, "#share-code")], capture_output=True, check=True).stdout
    assert json.loads(answer)["choices"][0]["text"] == text
    page.check('[name="language"][value="python"]')
    assert python_prints(text_of(page, "#share-code")) == f"{text}\n"
    page.keyboard.press("Escape")

    score(page, STORY)
    page.click("#score .share")
    printed = ast.literal_eval(python_prints(text_of(page, "#share-code")))
    assert figure(printed["data"][0]["perplexity"]) == text_of(page, "#score-perplexity")


def python_prints(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True, cwd="/").stdout


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_heat_map_is_saved_as_it_is_shown(theme: str, open_page: Open, tmp_path: Path) -> None:
    page = open_page(theme=theme)
    score(page, "One & two <three>.\n\n" + STORY * 3)
    page.click("#score .share")
    for kind in ("svg", "png"):
        with page.expect_download() as download:
            page.click(f"#share-{kind}")
        assert download.value.suggested_filename == f"score.{kind}"
        download.value.save_as(tmp_path / f"map.{kind}")
    svg = ElementTree.parse(tmp_path / "map.svg").getroot()
    names = {child.tag.rpartition("}")[2] for child in svg}
    assert names == {"rect", "text"}
    drawn = "".join(child.text or "" for child in svg if child.text and child.get("font-size") == "18")
    assert drawn.replace(" ", "") == re.sub(r"\s", "", text_of(page, "#score-map"))
    fills = [child.get("fill") for child in svg if child.tag.endswith("rect")]
    shown = page.evaluate(FILLS)
    assert fills[0] == shown["paper"]
    assert set(shown["tokens"]) <= set(fills)
    sizes = [round(float(svg.get(name) or 0)) for name in ("width", "height")]
    header = (tmp_path / "map.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert list(struct.unpack(">2I", header[16:24])) == [2 * size for size in sizes]


def test_tokens_are_shaded_by_rank(open_page: Open, url: str) -> None:
    page = open_page()
    assert page.evaluate(RANKS, [1, 2, 3, 4, 5, 6, 10, 11, 20, 21, 5000, None]) == [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6]
    score(page, STORY)
    [scored] = ask(url, "/v1/perplexity", input=STORY, return_tokens=True)["data"]
    steps = page.evaluate(RANKS, [token["rank"] for token in scored["tokens"][1:]])
    page.locator("#score .legend select").select_option(label="Rank")
    depths = page.evaluate(
        "[...document.querySelectorAll('#score-map .token:not(.unscored)')]"
        ".map((span) => Math.round(6 * getComputedStyle(span).getPropertyValue('--s')))"
    )
    assert depths == steps
    labels = [label.replace("\N{EN DASH}", "-") for label in page.locator("#score .legend li").all_text_contents()]
    assert labels == ["1", "2", "3", "4-5", "6-10", "11-20", "> 20"]
    page.click("#complete-tab")
    assert page.locator("#complete .legend li").first.text_content() == "1"
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("#complete .legend select")).to_have_value("rank")
    page.locator("#complete .legend select").select_option(label="Probability, %")
    assert page.locator("#score .legend li").last.text_content() == "≥ 12"


def test_the_cache_grows_with_the_text(open_page: Open, url: str) -> None:
    page = open_page()
    assert page.evaluate(SIZES, [0, 999, 1000, 12_345, 7_864_320, 2e10]) == [
        *("0 bytes", "999 bytes", "1.00 KB", "12.3 KB", "7.86 MB", "20.0 GB"),
    ]
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        [card] = json.load(answer)["data"]
    assert card["cache_bytes_per_token"] < card["dense_cache_bytes_per_token"]

    def shows(tokens: int) -> None:
        for name, each in (("own", card["cache_bytes_per_token"]), ("dense", card["dense_cache_bytes_per_token"])):
            expect(page.locator(f"#cache-{name}")).to_have_text(page.evaluate(SIZES, [each * tokens])[0])
        share = float(page.locator("#cache-dense-bar").evaluate("bar => bar.style.getPropertyValue('--p')"))
        assert share == pytest.approx(tokens / card["max_model_len"])

    page.fill("#prompt", STORY)
    count = ask(url, "/tokenize", prompt=STORY)["count"]
    shows(count)
    complete(page, max_tokens=9)
    shows(count + 9)


def test_chat_is_that_of_the_api_and_keeps_its_history(open_page: Open, tmp_path: Path) -> None:
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    (tmp_path / "serve").mkdir()
    with serving(tmp_path / "serve", "--chat-template", str(template)) as url:
        page = open_page(WIDTHS["phone"], at=url, bypass_csp=True)
        expect(page.locator("#complete-tab")).to_have_attribute("aria-selected", "true")
        page.click("#chat-tab")
        page.evaluate(AXE.read_text())
        assert page.evaluate(VIOLATIONS) == []
        page.fill("#chat-system", "Be short.")
        page.fill("#chat-max_tokens", "8")
        page.fill("#chat-seed", "3")
        messages = [{"role": "system", "content": "Be short."}]
        for question in ("Who are you?", "And you?"):
            page.fill("#chat-text", question)
            page.keyboard.press("Enter")
            expect(page.locator("#chat-text")).to_have_value("")
            idle(page, "chat")
            messages.append({"role": "user", "content": question})
            body = {"messages": messages, "max_tokens": 8, "seed": 3, "temperature": 0.7}
            [choice] = ask(url, "/v1/chat/completions", **body)["choices"]
            messages.append(choice["message"])
            assert text_of(page, "#chat-log li:last-child .prose") == choice["message"]["content"]
        assert page.locator("#chat-log li").count() == 4
        assert page.locator("#chat-log .token[tabindex='0']").count() == 1  # the keyboard's way to all of them
        assert page.evaluate(VIOLATIONS) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

        page.click("#chat .share")
        shared = opened(page, page.locator("#share-link").input_value().split("#", 1)[1])
        expect(shared.locator("#chat-log li")).to_have_count(4)
        assert text_of(shared, "#chat-log") == text_of(page, "#chat-log")
        expect(shared.locator("#chat-system")).to_have_value("Be short.")
        answer = subprocess.run(["bash", "-c", text_of(page, "#share-code")], capture_output=True, check=True).stdout
        assert json.loads(answer)["choices"][0]["message"]["content"] == messages[-1]["content"]
        page.keyboard.press("Escape")

        page.locator("#chat-log li:nth-child(2) .token").nth(3).click()  # of the first answer
        alternative = page.locator("#card button").nth(1).get_attribute("value") or ""
        page.locator("#card button").nth(1).click()
        expect(page.locator("#chat-log li")).to_have_count(2)
        idle(page, "chat")
        prefix = text_of(page, "#chat-log li:last-child .before")
        assert prefix.endswith(alternative)
        body["messages"] = [*messages[:2], {"role": "assistant", "content": prefix}]
        [choice] = ask(url, "/v1/chat/completions", **body, continue_final_message=True)["choices"]
        assert text_of(page, "#chat-log li:last-child .prose") == prefix + choice["message"]["content"]

        page.fill("#chat-max_tokens", "900")
        page.fill("#chat-text", "Go on.")
        page.keyboard.press("Enter")
        expect(page.locator("#chat-log li:nth-child(4) .token").nth(3)).to_be_visible()
        page.click("#chat-form .primary")
        idle(page, "chat")
        expect(page.locator("#chat-facts")).to_contain_text("stopped")
        page.route("**/v1/**", lambda route: route.abort())
        page.fill("#chat-text", "Once more.")
        run(page, "chat")
        expect(page.locator("#chat-error")).to_contain_text("The server does not answer.")
        assert page.locator("#chat-log li").count() == 4
        expect(page.locator("#chat-text")).to_have_value("Once more.")
        page.unroute("**/v1/**")
        page.fill("#chat-max_tokens", "1000")
        run(page, "chat")
        expect(page.locator("#chat-error")).to_contain_text("more than the model can read at once")
        page.click("#chat-error .remedy")
        expect(page.locator("#chat-max_tokens")).to_have_value("")
        expect(page.locator("#chat-log li:nth-child(6) .token").first).to_be_visible()
        page.click("#chat-new")  # in the middle of an answer
        idle(page, "chat")
        assert page.locator("#chat-log li").count() == 0
        assert page.locator("#chat-messages").input_value() == ""
        page.goto("about:blank")
        shared.goto("about:blank")


def test_a_model_without_a_template_has_no_chat(open_page: Open) -> None:
    page = open_page()
    expect(page.locator("#chat-tab")).to_be_hidden()
    other = opened(page, "chat")
    expect(other.locator("#completion .token").last).to_be_visible()
    expect(other.locator("#chat")).to_be_hidden()
