"""The page's Batches tab in a real browser: a file goes up, its progress is shown, its answers come down."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.extra.test_playground import AXE, LOW_CONTRAST, VIOLATIONS, WIDTHS, Open, browser, open_page, serving

__all__ = ["browser", "open_page"]  # fixtures

KEY = "secret"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server with a folder, a key and a small limit on files."""
    folder = tmp_path_factory.mktemp("serve")
    flags = ("--data-dir", str(folder / "data"), "--max-file-bytes", "20000", "--root-path", "/lpa")
    with serving(folder, *flags) as found:
        yield f"{found}/lpa"


def line(name: str, url: str = "/v1/completions", **body: Any) -> str:
    asked = {"model": "lpa-tiny", "prompt": "The sea", "max_tokens": 4, "temperature": 0} | body
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": asked})


def written(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def start(page: Page, path: Path) -> None:
    page.click("#batches-tab")
    page.set_input_files("#batches-file", path)
    page.click("#batches-form .primary")


def newest(page: Page, name: str) -> Any:
    return page.locator("#batches-list > li", has_text=name).first


def save(page: Page, button: Any) -> list[dict[str, Any]]:
    with page.expect_download() as found:
        button.click()
    return [json.loads(text) for text in Path(found.value.path()).read_text().splitlines()]


def test_a_file_goes_up_and_its_answers_come_down(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    start(page, written(tmp_path, "two.jsonl", line("a"), line("wrong", max_tokens=-1), line("b", prompt="A gull")))
    item = newest(page, "two.jsonl")
    expect(item).to_contain_text("Done")
    expect(item).to_contain_text("2 of 3 lines answered, 1 failed")
    assert [answer["custom_id"] for answer in save(page, item.get_by_role("button", name="Save answers"))] == ["a", "b"]
    [wrong] = save(page, item.get_by_role("button", name="Save errors"))
    assert wrong["response"]["body"]["error"]["param"] == "max_tokens"
    page.reload()
    expect(newest(page, "two.jsonl")).to_contain_text("Done")


def test_a_batch_shows_its_progress_and_is_cancelled(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    requests = [line(f"r{i}", max_tokens=900, ignore_eos=True) for i in range(100)]
    start(page, written(tmp_path, "long.jsonl", *requests))
    item = newest(page, "long.jsonl")
    expect(item).to_contain_text("Running")
    expect(item).to_contain_text("of 100 lines answered")
    expect(item.locator("progress")).to_be_visible()
    item.get_by_role("button", name="Cancel").click()
    expect(item).to_contain_text("Cancelled")
    expect(item.locator("progress")).to_be_hidden()


def test_the_example_runs(open_page: Open) -> None:
    page = open_page()
    page.click("#batches-tab")
    page.click("#batches-example")
    page.click("#batches-form .primary")
    item = newest(page, "example.jsonl")
    expect(item).to_contain_text("3 of 3 lines answered")
    answers = save(page, item.get_by_role("button", name="Save answers"))
    assert all(answer["response"]["body"]["choices"][0]["text"] for answer in answers)


def test_what_is_wrong_is_said(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    start(page, written(tmp_path, "wrong.jsonl", "{", line("a"), line("a"), line("b", "/v1/models")))
    item = newest(page, "wrong.jsonl")
    expect(item).to_contain_text("Not run")
    expect(item).to_contain_text("Line 1: the line is not valid JSON")
    expect(item).to_contain_text("Line 3: custom_id: 'a' is that of an earlier line, too")
    start(page, written(tmp_path, "route.jsonl", line("a", "/v1/models")))
    expect(page.locator("#batches-error")).to_contain_text(re.compile("^Endpoint: input should be '/v1/completions'"))
    start(page, written(tmp_path, "large.jsonl", *[line(str(i), prompt="x" * 300) for i in range(100)]))
    expect(page.locator("#batches-error")).to_contain_text("the limit is 20000")
    page.route("**/v1/batches*", lambda route: route.abort())
    expect(page.locator("#batches-list-error")).to_contain_text("The server does not answer.", timeout=30_000)
    page.unroute("**/v1/batches*")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#batches-list-error")).to_be_empty()


def test_without_a_folder_the_tab_says_how_to_get_one(open_page: Open, tmp_path: Path) -> None:
    with serving(tmp_path) as plain:
        page = open_page(at=plain)
        page.click("#batches-tab")
        expect(page.locator("#batches-off")).to_contain_text("lpa serve --data-dir FOLDER")
        expect(page.locator("#batches-form")).to_be_hidden()
        page.goto("about:blank")


def test_a_key_is_asked_for(open_page: Open, tmp_path: Path) -> None:
    with serving(tmp_path, "--api-key", KEY, "--data-dir", str(tmp_path / "data")) as guarded:
        page = open_page(at=guarded, ready=False)
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        start(page, written(tmp_path, "one.jsonl", line("a")))
        item = newest(page, "one.jsonl")
        expect(item).to_contain_text("Done")
        assert save(page, item.get_by_role("button", name="Save answers"))
        page.goto("about:blank")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_looks(device: str, theme: str, open_page: Open, tmp_path: Path) -> None:
    page = open_page(WIDTHS[device], theme, bypass_csp=True)  # axe is no part of the page
    page.evaluate(AXE.read_text())
    bad, good = f"bad-{device}-{theme}.jsonl", f"good-{device}-{theme}.jsonl"
    start(page, written(tmp_path, bad, "{", "[]"))
    expect(newest(page, bad)).to_contain_text("Line 2")
    start(page, written(tmp_path, good, *[line(str(i)) for i in range(5)]))
    expect(newest(page, good)).to_contain_text("Done")
    page.set_input_files("#batches-file", written(tmp_path, "next.jsonl", line("a")))
    page.wait_for_timeout(300)  # colours that change slowly
    page.screenshot(path=tmp_path / f"batches-{device}-{theme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(LOW_CONTRAST) == {}
    assert page.evaluate(VIOLATIONS) == []
