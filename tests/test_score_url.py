"""`lpa score --url` against a real server: the numbers of the same command here, texts as they are taken, failures."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lpa_model.config import Architecture
from server.scoring import remote
from server.scoring.texts import Source
from tests.serving import Served, serving, until
from tests.test_cli import assert_one_line, lpa, succeed
from tests.test_score import TEXT, json_lines, write
from tests.tiny import CORPUS

KEY = "the key"


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"], api_key=KEY) as server:
        server.client.headers["authorization"] = f"Bearer {KEY}"
        yield server


def nothing(size: float, tokens: int) -> None:
    """Progress that nobody looks at."""


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "full"),
        ("--max-length", 30, "--stride", 9),
        ("--method", "rolling", "--max-length", 30),
        ("--method", "chunks", "--max-length", 5, "--no-add-bos"),
    ],
    ids=["full", "sliding", "rolling", "chunks"],
)
def test_the_numbers_are_those_of_this_process(
    served: Served, tiny_checkpoints: dict[Architecture, Path], tmp_path: Path, flags: tuple[object, ...]
) -> None:
    texts = [CORPUS[:150], TEXT, f"<|endoftext|>{TEXT}", "the waves of the sea"]
    path = write(tmp_path / "corpus.jsonl.gz", json_lines(*({"text": text} for text in texts)))
    answers, rows = [], []
    for way in (
        ("--model", tiny_checkpoints["setting2"], "--dtype", "float32"),
        ("--url", f"{served.url}/v1", "--api-key", f"{KEY},another"),
    ):
        out = tmp_path / "tokens.jsonl"
        asked = ("score", path, "--field", "text", "--json", "--tokens", out, *flags)
        answers.append(json.loads(succeed(*asked, *way)))
        rows.append([json.loads(line) for line in out.read_text().splitlines()])
    here, there = answers
    assert here.pop("dtype") == "float32"
    assert (here.pop("model"), there.pop("model")) == ("setting2", "tiny")
    pairs = [(here.pop("aggregate"), there.pop("aggregate")), *zip(here.pop("data"), there.pop("data"), strict=True)]
    assert here == there
    told = f"{pairs[0][1]['perplexity']:.4f}"
    for own, other in pairs:
        assert other["nll_sum"] == pytest.approx(own["nll_sum"], rel=1e-7)  # a cache's attention rounds otherwise
        for name, value in own.items():
            assert other.pop(name) == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
        assert other == {}
    assert [row | {"logprob": None} for row in rows[0]] == [row | {"logprob": None} for row in rows[1]]
    assert [row["logprob"] for row in rows[1]] == pytest.approx([row["logprob"] for row in rows[0]], abs=1e-5)
    table = succeed("score", path, "--field", "text", "--url", served.url, "--api-key", KEY, "--model", "tiny", *flags)
    assert told in table
    assert "dtype" not in table


def test_a_corpus_without_end_goes_through_bounded_memory(served: Served) -> None:
    numbers = itertools.count()
    texts = ((Source("endless", i, 1), f"the sea {i} {'and the waves ' * 40}") for i in numbers)
    lines = remote.score_texts(served.url, KEY, {"model": None, "method": "sliding", "max_length": 32}, texts, nothing)
    for i, line in enumerate(itertools.islice(lines, 30)):
        assert (line["file"], line["line"], line["index"]) == ("endless", i, i)
    assert next(numbers) * 600 < 64 << 20  # what sockets hold on the way
    lines.close()  # type: ignore[attr-defined]  # it is a generator
    until(served.idle)


def test_progress_and_tokens_come_with_each_text(served: Served) -> None:
    told: list[tuple[float, int]] = []
    seen: list[tuple[str, list[str]]] = []
    texts = [(Source("a", None, 7), "the sea"), (Source("b", None, 5), "waves")]
    lines = list(
        remote.score_texts(
            served.url,
            KEY,
            {"model": "tiny", "method": "full"},
            iter(texts),
            lambda size, tokens: told.append((size, tokens)),
            lambda source, entries: seen.append((str(source), [entry["text"] for entry in entries])),
        )
    )
    assert told == [(7, lines[0]["num_tokens"]), (5, lines[1]["num_tokens"])]
    assert [(name, "".join(parts)) for name, parts in seen] == [("a", "the sea"), ("b", "waves")]
    assert "tokens" not in lines[0]
    assert lines[-1]["aggregate"]["num_texts"] == 2


# --- failures --------------------------------------------------------------------------------------------------------


def test_what_the_server_refuses_is_told_by_the_names_of_files(served: Served, tmp_path: Path) -> None:
    url = ("--url", served.url, "--api-key", KEY)
    files = [write(tmp_path / name, text) for name, text in (("a.txt", "the sea"), ("b.txt", CORPUS * 2))]
    assert_one_line(lpa("score", *files, *url, "--method", "full"), r"b\.txt: has .* at most 128;")
    assert_one_line(lpa("score", files[1], *url, "--method", "full", "--json"), r"b\.txt: has .* at most 128;")
    rows = [{"text": "the sea"}] * 300 + [{"text": CORPUS * 2}] + [{"text": "the waves"}] * 5000
    path = write(tmp_path / "c.jsonl", json_lines(*rows))
    assert_one_line(lpa("score", path, "--field", "text", *url, "--method", "full"), r"c\.jsonl:301: has .* at most")
    assert_one_line(lpa("score", files[0], *url, "--max-length", 129), "max_length: 129 .* context of 128")
    assert_one_line(lpa("score", files[0], *url, "--model", "other"), "other")
    assert_one_line(lpa("score", write(tmp_path / "e.txt", "x"), *url), "input: has no token to score")
    until(served.idle)


def test_a_wrong_key_is_told_before_anything_is_sent(served: Served, tmp_path: Path) -> None:
    path = write(tmp_path / "long.txt", CORPUS * 5000)  # far more than sockets hold
    for flags in ((), ("--api-key", "wrong"), ("--api-key", "wrong", "--model", "tiny")):
        assert_one_line(lpa("score", path, "--url", served.url, *flags), "[Kk]ey")


def test_a_file_that_cannot_be_read_ends_the_request(served: Served, tmp_path: Path) -> None:
    rows = json_lines(*[{"text": "the sea"}] * 3000)
    path = write(tmp_path / "a.jsonl", rows + "{")
    asked = ("score", path, "--field", "text", "--url", served.url, "--api-key", KEY)
    assert_one_line(lpa(*asked), r"a\.jsonl:3001: not JSON")
    until(served.idle)


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The URL of a server that takes a text, answers with these bytes and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer_one() -> None:
            connection, _ = listening.accept()
            with connection, connection.makefile("rb") as asked:
                while asked.readline().strip():
                    pass
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                asked.readline()
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                with suppress(ConnectionError):
                    asked.read()

        thread = threading.Thread(target=answer_one)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(600)


def with_lines(*lines: dict[str, Any] | str) -> bytes:
    """A whole answer of some lines."""
    body = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    return f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


SCORED = {"object": "perplexity.text", "index": 0, "num_tokens": 3}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "/v1/perplexity: the connection ended before an answer"),
        (b"SSH-2.0-OpenSSH\r\n", "/v1/perplexity: the answer is no HTTP"),
        (b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 9\r\n\r\n<p>oh</p>", "/v1/perplexity: status 502: <p>oh</p>"),
        (with_lines(SCORED, "cut")[:-4], "/v1/perplexity: the connection ended in the middle of the answer"),
        (with_lines(SCORED), ": the answer ended before its last line"),
        (with_lines(SCORED, SCORED), ": the answer has more texts than were sent"),
        (with_lines("<p>oh</p>"), ": not an answer of /v1/perplexity: <p>oh</p>"),
        (with_lines({"ok": True}), ": not an answer of /v1/perplexity"),
    ],
    ids=["nothing", "no HTTP", "a proxy's error", "cut", "no last line", "too many", "no JSON", "another answer"],
)
def test_a_server_that_breaks_off(answer: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "the sea")
    with answering(answer) as url:
        assert_one_line(lpa("score", path, "--url", url, "--model", "tiny", "--json"), f"{url}{message}")


def test_a_server_that_refuses_before_it_is_sent_anything(tmp_path: Path) -> None:
    path = write(tmp_path / "long.txt", CORPUS * 20_000)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                while not connection.recv(1 << 16).endswith(b"\r\n\r\n"):
                    pass
                connection.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\n<p>oh")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert_one_line(lpa("score", path, "--url", url, "--model", "tiny"), f"{url}/v1/perplexity: status 404: ")
        thread.join(600)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "the sea")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    assert_one_line(lpa("score", path, "--url", url), f"{url}/v1/models: ")
    assert_one_line(lpa("score", path, "--url", "localhost:8000"), "localhost:8000: not an http:// or https:// URL")
