"""What a key may use: its line in the key file, requests per minute, sequences at once, and what is counted for it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lpa_model.config import Architecture
from server.errors import RateLimited
from server.key_file import ClientKey, client_key, read_key_file
from server.quota import RequestRate
from server.settings import SettingsError, load_settings
from tests.serving import Served, serving, slow_steps, until


def test_a_line_has_a_key_or_its_digest_and_what_it_may_do(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret").digest()
    path = tmp_path / "keys"
    path.write_text(
        f"# of everyone\nplain\n\nsha256:{digest.hex()} name=alice\n"
        "other  concurrent_sequences=2 requests_per_minute=60 name=b.o-b@x\n"
    )
    plain, alice, bob = read_key_file(path)
    assert plain == client_key("plain")
    assert alice == ClientKey(digest, "alice") == ClientKey(client_key("secret").digest, "alice")
    assert bob == ClientKey(client_key("other").digest, "b.o-b@x", 60, 2)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("key name", "behind a key come name="),
        ("key rpm=3", "behind a key come name="),
        ("key name=a name=b", "behind a key come name="),
        ("key requests_per_minute=0", "requests_per_minute must be a whole number above 0"),
        ("key concurrent_sequences=-1", "concurrent_sequences must be"),
        ('key name=a"b', "a name has up to 64"),
        ("sha256:12ab", "64 hexadecimal digits"),
    ],
)
def test_a_wrong_line_is_named_and_its_key_is_not_told(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"good\n{line}\n")
    with pytest.raises(SettingsError, match=f"api-key-file.*line 2: .*{reason}") as failed:
        load_settings(api_key_file=path)
    assert "12ab" not in str(failed.value)


def test_a_bucket_gives_a_minutes_requests_at_once_and_fills_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("server.quota.monotonic", lambda: now)
    rate = RequestRate(6)
    for left in (5, 4, 3, 2, 1, 0):
        rate.take()
        assert rate.headers()["x-ratelimit-remaining-requests"] == str(left)
    with pytest.raises(RateLimited) as refused:
        rate.take()
    assert refused.value.headers() == {"Retry-After": "10", "retry-after-ms": "10000"}
    assert rate.headers()["x-ratelimit-reset-requests"] == "60.000s"
    now += 9
    with pytest.raises(RateLimited):
        rate.take()
    now += 1.5
    rate.take()
    now += 1000  # no more than the limit is saved up
    assert rate.headers() == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "6",
        "x-ratelimit-reset-requests": "0.000s",
    }


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("three name=alice requests_per_minute=3\ntwo concurrent_sequences=2\nfree name=free\n")
    with serving(tiny_checkpoints["setting2"], api_key_file=path) as found:
        yield found


def post(served: Served, key: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return served.client.post(path, json={"model": "tiny", **body}, headers=headers)


def test_a_key_that_has_made_its_requests_is_told_when_to_come_back(served: Served) -> None:
    body = {"prompt": "abc", "max_tokens": 1}
    first = post(served, "three", **body)
    assert first.headers["x-ratelimit-limit-requests"] == "3"
    assert first.headers["x-ratelimit-remaining-requests"] == "2"
    for _ in range(20):  # however slowly they come: each takes far less than the 20 s that one more takes to fill
        if (answer := post(served, "three", **body)).status_code == 429:
            break
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(answer.headers["retry-after"]) <= 20
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    client = openai.OpenAI(api_key="three", base_url=f"{served.url}/v1", max_retries=0)
    with client, pytest.raises(openai.RateLimitError, match="3 requests per minute"):
        client.completions.create(model="tiny", **body)  # type: ignore[call-overload]
    assert post(served, "free", **body).status_code == 200  # other keys have their own
    assert "x-ratelimit-limit-requests" not in post(served, "free", **body).headers
    models = served.client.get("/v1/models", headers={"authorization": "Bearer three"})
    assert models.status_code == 200  # reading costs nothing


def test_a_key_runs_no_more_sequences_at_once_than_it_may(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(served, monkeypatch, 0.01)
    most = 0
    step = served.engine.step

    def watched() -> Any:
        nonlocal most
        most = max(most, len(served.engine._requests))
        return step()

    monkeypatch.setattr(served.engine, "step", watched)
    done = post(served, "two", prompt=["a", "b", "c"], n=2, max_tokens=3, ignore_eos=True)
    assert done.status_code == 200  # its sequences wait for one another
    assert len(done.json()["choices"]) == 6
    assert most == 2
    scored = post(served, "two", "/v1/perplexity", input=["abc", "bcd", "cde", "def"])
    assert scored.status_code == 200
    assert most == 2
    assert served.idle()


def test_a_further_request_of_a_key_that_has_all_it_may_is_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(served, monkeypatch, 0.02)
    running = threading.Event()
    with ThreadPoolExecutor(1) as pool:

        def long() -> httpx.Response:
            running.set()
            return post(served, "two", prompt="abc", n=2, max_tokens=100, ignore_eos=True)

        answer = pool.submit(long)
        running.wait()
        until(lambda: len(served.engine._requests) == 2)
        refused = post(served, "two", prompt="abc", max_tokens=1)
        assert refused.status_code == 429
        assert refused.json()["error"]["message"] == "this key may run 2 sequences at once, and does"
        assert refused.headers["retry-after"] == "1"
        assert post(served, "free", prompt="abc", max_tokens=1).status_code == 200
        assert answer.result().status_code == 200
    assert post(served, "two", prompt="abc", max_tokens=1).status_code == 200  # the places are free again


def test_places_of_a_client_that_left_are_free(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(served, monkeypatch, 0.02)
    headers = {"authorization": "Bearer two"}
    body = {"model": "tiny", "prompt": "abc", "n": 2, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with served.client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        next(answer.iter_lines())
    until(lambda: post(served, "two", prompt="abc", max_tokens=1, n=2).status_code == 200)


def test_what_a_key_used_is_counted_by_its_name(served: Served) -> None:
    def used(what: str, key: str) -> float:
        page = served.client.get("/metrics").text
        lines = [line for line in page.splitlines() if line.startswith(f'lpa:key_{what}_total{{key="{key}"')]
        return float(lines[0].split()[-1]) if lines else 0.0

    before = {what: used(what, "free") for what in ("requests", "prompt_tokens", "generation_tokens")}
    post(served, "free", prompt="abcd", max_tokens=3, n=2, ignore_eos=True)
    gained = {what: used(what, "free") - count for what, count in before.items()}
    assert gained == {"requests": 1, "prompt_tokens": 4, "generation_tokens": 6}
    post(served, "two", prompt="abc", max_tokens=1)
    assert used("requests", "key-2") >= 1  # has no name
    post(served, "guessed", prompt="abc")
    assert "guessed" not in served.client.get("/metrics").text
