"""POST /v1/perplexity over sockets: every method against plain loops, tokens, lines in and out, and the edges."""

from __future__ import annotations

import http.client
import json
import math
import random
import re
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from tokenizers import Tokenizer, processors

from lpa_model.checkpoint import save_checkpoint
from lpa_model.config import Architecture
from lpa_model.model import LPAForCausalLM
from server.routes import perplexity as route
from tests.serving import Served, serving, slow_steps, until
from tests.test_perplexity import NAIVE, convention
from tests.tiny import CORPUS, END_OF_TEXT_ID, VOCAB_SIZE, byte_tokenizer, random_model, tiny_config

PATH = "/v1/perplexity"
CONTEXT = 128
TEXT = 'The robot said: "çava, 你好 🙂" and the waves'


@pytest.fixture(scope="module", params=["setting1", "setting2"])
def both(request: pytest.FixtureRequest, tiny_checkpoints: dict[Architecture, Path]) -> Iterator[tuple[Served, Any]]:
    """A server of each setting, and its model."""
    with serving(tiny_checkpoints[request.param]) as server:
        yield server, random_model(tiny_config(request.param))


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


@pytest.fixture(scope="module")
def model() -> LPAForCausalLM:
    return random_model(tiny_config("setting2"))


def with_bos() -> Tokenizer:
    """The byte tokenizer, whose post-processor puts <|endoftext|> first."""
    tokenizer = Tokenizer.from_str(byte_tokenizer().to_str())
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.post_processor = template  # type: ignore[assignment]  # its stub has a narrower type
    return tokenizer


@pytest.fixture(scope="module")
def bos_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model with a BOS token, whose tokenizer adds it."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    config = tiny_config("setting2", bos_token_id=END_OF_TEXT_ID)
    save_checkpoint(folder, random_model(config), with_bos(), torch.float32)
    with serving(folder) as server:
        yield server


def ask(served: Served, **body: Any) -> dict[str, Any]:
    return served.answer(PATH, **body)


def refused(served: Served, **body: Any) -> dict[str, Any]:
    response = served.client.post(
        PATH, content=json.dumps({"model": "tiny", **body}), headers={"content-type": "application/json"}
    )
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return {"status": response.status_code, **error}


class LineClient:
    """A connection that sends lines and reads lines at the same time, as curl -T - does."""

    def __init__(self, served: Served, request_id: str = "", **query: Any) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", served.server.port, timeout=600)
        self.connection.putrequest("POST", f"{PATH}?{urlencode({'model': 'tiny', **query})}")
        self.connection.putheader("content-type", "application/x-ndjson")
        self.connection.putheader("transfer-encoding", "chunked")
        self.connection.putheader("x-request-id", request_id)
        self.connection.putheader("authorization", served.client.headers.get("authorization", ""))
        self.connection.endheaders()

    def send(self, piece: bytes) -> None:
        self.connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))

    def end(self) -> None:
        self.connection.send(b"0\r\n\r\n")

    def response(self) -> http.client.HTTPResponse:
        return self.connection.getresponse()


@contextmanager
def line_client(served: Served, request_id: str = "", **query: Any) -> Iterator[LineClient]:
    client = LineClient(served, request_id, **query)
    try:
        yield client
    finally:
        client.connection.close()


def post_lines(served: Served, lines: Iterable[Any], **query: Any) -> tuple[int, list[dict[str, Any]]]:
    """Status, and every line of the answer; `lines` are made JSON unless they are bytes."""
    body = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    response = served.client.post(
        PATH, params={"model": "tiny", **query}, content=body, headers={"content-type": "application/x-ndjson"}
    )
    return response.status_code, [json.loads(line) for line in response.text.splitlines()]


def alike(found: Any, expected: Any) -> bool:
    """Equal, but for what the company in a batch does to the last digits of numbers."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(alike(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(alike, found, expected))
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, rel=1e-5))
    return bool(found == expected)


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "sliding", "rolling", "chunks"])
def test_every_method_equals_its_plain_loop(both: tuple[Served, LPAForCausalLM], method: Any) -> None:
    server, model = both
    asked: dict[str, Any] = {"full": {}, "sliding": {"max_length": 24, "stride": 10}}.get(method, {"max_length": 24})
    texts = [CORPUS[:140], CORPUS[100:230] + " é"]
    how = convention(method, asked.get("max_length", CONTEXT), asked.get("stride"), 0 if method == "rolling" else None)
    ids = [byte_tokenizer().encode(text).ids for text in texts]
    expected = [NAIVE[method](model, of_text, how) for of_text in ids]
    for form in (texts, ids):
        answer = ask(server, input=form, method=method, **asked)
        shown = {key: answer[key] for key in ("method", "max_length", "stride", "add_bos", "prefix_token_id")}
        assert shown == {
            "method": method,
            "max_length": how.max_length,
            "stride": how.stride,
            "add_bos": False,
            "prefix_token_id": how.prefix_token_id,
        }
        for text, entry, nlls in zip(texts, answer["data"], expected, strict=True):
            assert entry["num_tokens"] == len(nlls)
            assert entry["nll_sum"] == pytest.approx(math.fsum(nlls), rel=1e-5)
            assert entry["perplexity"] == pytest.approx(math.exp(math.fsum(nlls) / len(nlls)), rel=1e-5)
            assert (entry["num_words"], entry["num_bytes"]) == (len(text.split()), len(text.encode()))
            if method == "chunks":
                assert entry["bits_per_byte"] is None
            else:
                bits = math.fsum(nlls) / math.log(2) / len(text.encode())
                assert entry["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        aggregate = answer["aggregate"]
        assert aggregate["num_texts"] == 2
        assert aggregate["nll_sum"] == math.fsum(entry["nll_sum"] for entry in answer["data"])
        means = [math.exp(math.fsum(nlls) / len(nlls)) for nlls in expected]
        assert aggregate["mean_perplexity"] == pytest.approx(sum(means) / 2, rel=1e-5)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert server.idle()


@pytest.mark.parametrize("method", ["full", "sliding", "rolling", "chunks"])
def test_bos_is_the_tokenizers_own_setting(bos_served: Served, model: LPAForCausalLM, method: Any) -> None:
    ids = byte_tokenizer().encode(CORPUS[:120]).ids
    asked: dict[str, Any] = {"method": method} | ({} if method == "full" else {"max_length": 24})
    if method == "sliding":
        asked["stride"] = 7
    how = convention(method, asked.get("max_length", CONTEXT), asked.get("stride"), END_OF_TEXT_ID)
    expected = NAIVE[method](model, ids, how)
    answer = ask(bos_served, input=CORPUS[:120], **asked)
    assert (answer["add_bos"], answer["prefix_token_id"]) == (True, END_OF_TEXT_ID)
    assert answer["aggregate"]["num_tokens"] == len(expected)
    assert answer["aggregate"]["nll_sum"] == pytest.approx(math.fsum(expected), rel=1e-5)
    if method != "rolling":
        for twice in (f"<|endoftext|>{CORPUS[:120]}", [END_OF_TEXT_ID, *ids]):
            assert alike(ask(bos_served, input=twice, **asked)["aggregate"]["nll_sum"], answer["aggregate"]["nll_sum"])
        bare = NAIVE[method](model, ids, convention(method, how.max_length, how.stride))
        without = ask(bos_served, input=ids, add_bos=False, **asked)["aggregate"]
        assert (without["num_tokens"], without["nll_sum"]) == (
            len(bare),
            pytest.approx(math.fsum(bare), rel=1e-5),
        )


def test_what_cannot_be_is_refused_by_name(served: Served, bos_served: Served) -> None:
    for body, param in [
        ({"add_bos": True}, "add_bos"),
        ({"method": "rolling", "add_bos": True}, "add_bos"),
        ({"method": "rolling", "stride": 3}, "stride"),
        ({"method": "chunks", "max_length": 2}, "max_length"),
        ({"method": "chunks", "max_length": 64}, "input"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"return_tokens": True, "top_logprobs": 257}, "top_logprobs"),
        ({"return_tokens": 1}, "return_tokens"),
    ]:
        error = refused(served, input="two tokens", **body)
        assert (error["status"], error["param"]) == (400, param)
        assert param in error["message"]
    error = refused(bos_served, input="two", method="rolling", add_bos=False)
    assert (error["status"], error["param"]) == (400, "add_bos")


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_have_places_ranks_and_alternatives(served: Served, model: LPAForCausalLM) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(TEXT).ids
    with torch.inference_mode():
        rows = torch.log_softmax(model.logits(model(torch.tensor([ids]))[0]), -1)
    for form in (TEXT, ids):
        answer = ask(served, input=form, return_tokens=True, top_logprobs=4)
        (entry,) = answer["data"]
        tokens = entry["tokens"]
        assert [token["id"] for token in tokens] == ids
        assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == TEXT
        assert {key: tokens[0][key] for key in ("logprob", "rank", "top_logprobs")} == {
            "logprob": None,
            "rank": None,
            "top_logprobs": None,
        }
        assert -math.fsum(token["logprob"] for token in tokens[1:]) == entry["nll_sum"]
        for i, token in enumerate(tokens):
            begun = b"".join(bytes(t["bytes"]) for t in tokens[:i])
            assert token["offset"] == len(begun.decode(errors="ignore"))
            if token["text"].startswith("bytes:"):
                assert len(bytes(token["bytes"]).decode(errors="ignore")) == 0
            else:
                assert TEXT.startswith(token["text"], token["offset"])
            if i:
                row = rows[i - 1]
                assert token["logprob"] == pytest.approx(float(row[ids[i]]), abs=1e-4)
                assert token["rank"] == 1 + int((row > row[ids[i]]).sum())
                best = row.topk(4)
                assert [top["id"] for top in token["top_logprobs"]] == best.indices.tolist()
                assert [top["logprob"] for top in token["top_logprobs"]] == pytest.approx(
                    best.values.tolist(), abs=1e-4
                )
                first = token["top_logprobs"][0]
                assert bytes(first["bytes"]) == (first["text"].encode() if first["text"][:6] != "bytes:" else
                                                 bytes.fromhex(first["text"][6:].replace("\\x", "")))  # fmt: skip
    assert any(token["text"].startswith("bytes:") for token in tokens)  # a character was split


@pytest.mark.parametrize("method", ["sliding", "rolling", "chunks"])
def test_tokens_of_many_windows_are_the_texts_tokens_in_order(served: Served, method: str) -> None:
    ids = byte_tokenizer().encode(CORPUS).ids
    asked = {"input": CORPUS, "method": method, "max_length": 20, "return_tokens": True}
    (entry,) = ask(served, **asked)["data"]
    assert [token["id"] for token in entry["tokens"]] == ids
    scored = [token["logprob"] for token in entry["tokens"] if token["logprob"] is not None]
    assert len(scored) == entry["num_tokens"]
    assert -math.fsum(scored) == entry["nll_sum"]
    if method == "chunks":
        wanted = [i for i in range(len(ids) // 20 * 20) if i % 20 > 10]
        assert [i for i, token in enumerate(entry["tokens"]) if token["logprob"] is not None] == wanted


def test_special_tokens_in_a_text_are_parsed_and_have_their_place(served: Served, bos_served: Served) -> None:
    (entry,) = ask(served, input="a<|endoftext|>b", return_tokens=True)["data"]
    assert [(t["text"], t["offset"]) for t in entry["tokens"]] == [("a", 0), ("<|endoftext|>", 1), ("b", 14)]
    assert entry["num_bytes"] == 15
    (same,) = ask(served, input=[token["id"] for token in entry["tokens"]], return_tokens=True)["data"]
    assert alike([same["tokens"], same["num_bytes"]], [entry["tokens"], 15])
    (entry,) = ask(bos_served, input="<|endoftext|>the sea", return_tokens=True)["data"]
    assert entry["tokens"][0]["offset"] == 13
    assert all(token["logprob"] is not None for token in entry["tokens"])


def test_tokens_have_a_limit(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "MAX_TOKEN_ENTRIES", 60)
    ids = [[5] * 20, [6] * 20, [7] * 20]
    assert len(ask(served, input=ids, return_tokens=True)["data"]) == 3
    error = refused(served, input=ids, return_tokens=True, top_logprobs=1)
    assert (error["status"], error["param"]) == (400, "return_tokens")
    assert "input[1]" in error["message"]
    streamed = served.post(PATH, input=ids, return_tokens=True, top_logprobs=2, stream=True)  # 60 in each line
    assert len(streamed.text.splitlines()) == 4
    assert refused(served, input=ids, return_tokens=True, top_logprobs=3, stream=True)["status"] == 400


# --- lines -----------------------------------------------------------------------------------------------------------

TEXTS = [CORPUS[i : i + 7 + 11 * i % 60] for i in range(40)]


def test_a_stream_is_the_answer_in_lines(served: Served) -> None:
    body = {"input": TEXTS, "method": "sliding", "max_length": 16, "return_tokens": True}
    whole = ask(served, **body)
    response = served.post(PATH, **body, stream=True)
    assert response.headers["content-type"] == "application/x-ndjson"
    *lines, last = [json.loads(line) for line in response.text.splitlines()]
    assert alike(lines, whole.pop("data"))
    assert alike(last, whole)


def test_a_stream_tells_how_far_a_text_is(served: Served) -> None:
    """A line per window but the last; they change nothing else."""
    body: dict[str, Any] = {"input": ["x" * 50, "short"], "method": "sliding", "max_length": 16, "stride": 8}
    plain = [json.loads(line) for line in served.post(PATH, **body, stream=True).text.splitlines()]
    told = [json.loads(line) for line in served.post(PATH, **body, stream=True, stream_progress=True).text.splitlines()]
    progress = [line for line in told if line["object"] == "perplexity.progress"]
    assert [line for line in told if line not in progress] == plain
    assert told[: len(progress)] == progress  # all of the first text's, which has several windows
    assert [line["done_tokens"] for line in progress] == list(range(16, 50, 8))
    assert {(line["index"], line["prompt_tokens"]) for line in progress} == {(0, 50)}
    assert refused(served, input="x", stream_progress=True)["param"] == "stream_progress"


def test_a_body_of_lines_is_the_list_of_texts(served: Served) -> None:
    whole = ask(served, input=TEXTS, method="rolling", max_length=16)
    forms: list[Any] = [
        text if i % 4 == 0 else {"text": text} if i % 4 == 1 else {"id": 7, "input": text} if i % 4 == 2 else
        byte_tokenizer().encode(text).ids for i, text in enumerate(TEXTS)
    ]  # fmt: skip
    status, (answer,) = post_lines(served, forms, method="rolling", max_length=16)
    assert status == 200
    assert alike(answer, whole)
    last_open = [*forms[:-1], b"\n  \r\n", json.dumps(forms[-1]).encode()]  # blank lines, and no line end at the end
    status, lines = post_lines(served, last_open, method="rolling", max_length=16, stream="true")
    assert status == 200
    assert alike(lines[:-1], whole.pop("data"))
    assert alike(lines[-1], whole)


def test_lines_cut_anywhere_are_the_same_lines(served: Served) -> None:
    body = b"".join(json.dumps(text, ensure_ascii=False).encode() + b"\n" for text in [*TEXTS[:9], TEXT])
    expected = ask(served, input=[*TEXTS[:9], TEXT])["data"]
    draw = random.Random(1)
    for size in (1, 7, 4000):
        with line_client(served, stream=True) as client:
            at = 0
            while at < len(body):
                step = draw.randint(1, size)
                client.send(body[at : at + step])
                at += step
            client.end()
            found = [json.loads(line) for line in client.response().read().splitlines()]
        assert alike(found[:-1], expected)


def test_an_answer_comes_before_the_next_line_is_sent(served: Served) -> None:
    with line_client(served, stream="true") as client:
        response = None
        for i, text in enumerate(TEXTS[:5]):
            client.send(json.dumps(text).encode() + b"\n")
            response = response or client.response()
            assert json.loads(response.readline())["index"] == i
        client.end()
        assert response is not None
        assert json.loads(response.readline())["aggregate"]["num_texts"] == 5
        assert response.read() == b""


def test_texts_in_flight_are_bounded_and_come_in_order(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=4) as server:
        go = threading.Event()
        run, encode = server.engine.runner.run, server.engine.tokenizer.encode
        tokenized = 0

        def waits(batch: Any) -> Any:
            assert go.wait(600)
            return run(batch)

        def counted(text: str, **options: Any) -> list[int]:
            nonlocal tokenized
            tokenized += 1
            return encode(text, **options)

        monkeypatch.setattr(server.engine.runner, "run", waits)
        monkeypatch.setattr(server.engine.tokenizer, "encode", counted)
        line = json.dumps("the sea " * 8).encode() + b" " * 9_900 + b"\n"
        with line_client(server, stream=True) as client:
            client.connection.sock.settimeout(0.5)  # the server reads until its buffers are full, then no more
            sent = 0
            with pytest.raises(TimeoutError):
                while sent < 10_000:
                    client.send(line)
                    sent += 1
            held = tokenized
            assert held < 8 + 2 * (65536 // len(line)) + 4  # in flight, and the pieces that came beside them
        until(lambda: tokenized == held)
        go.set()
        until(server.idle)

        count = 300
        with line_client(server, stream=True) as client:
            sender = threading.Thread(target=lambda: ([client.send(line) for _ in range(count)], client.end()))
            sender.start()
            response = client.response()
            lines = [json.loads(answer) for answer in response.read().splitlines()]
            sender.join()
        assert [answer.get("index") for answer in lines] == [*range(count), None]
        assert alike([answer["nll_sum"] for answer in lines[:-1]], [lines[0]["nll_sum"]] * count)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": "x"\n', "line 4: is not valid JSON"),
        (b"[" * 5000 + b"\n", "line 4: "),
        (b'"\xff"\n', "line 4: is not UTF-8 at byte 1"),
        (b'"\\ud800"\n', "line 4: half a surrogate"),
        (b"{}\n", 'line 4: .*"text" or "input"'),
        (b'{"text": "a", "input": "b"}\n', 'line 4: .*"text" or "input"'),
        (b"5\n", "line 4: must be a text or"),
        (b"null\n", "line 4: must be a text or"),
        (b'["x", "y"]\n', "line 4: 'x' is not a token id"),
        (b"[5, 300]\n", "line 4: token id 300 is outside"),
        (json.dumps("a" * 3 * CONTEXT).encode() + b"\n", "line 4: has .* tokens; method 'full' takes at most 128"),
    ],
)
def test_a_bad_line_comes_after_the_answers_before_it(served: Served, bad: bytes, message: str) -> None:
    status, lines = post_lines(served, ["the sea", "a gull", b"\n", bad, "the waves"], stream=True)
    assert status == 200
    *answers, last = lines
    assert [answer["index"] for answer in answers] == [0, 1]
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert last["error"]["type"] == "invalid_request_error"
    assert re.match(message, last["error"]["message"])
    status, (body,) = post_lines(served, [bad, "the sea"], stream=True)  # before the first line, it has a status
    assert (status, body["error"]["param"]) == (400, "line 1")
    status, (body,) = post_lines(served, ["the sea", "a gull", "the shore", bad])
    assert (status, body["error"]["param"]) == (400, "line 4")
    until(served.idle)


def test_parameters_beside_lines_are_checked_like_those_of_a_body(served: Served) -> None:
    for query, status, param in [
        ({"model": "other"}, 404, "model"),
        ({"method": "other"}, 400, "method"),
        ({"max_length": "x"}, 400, "max_length"),
        ({"max_length": CONTEXT + 1}, 400, "max_length"),
        ({"stride": 3}, 400, "stride"),
        ({"stream": "perhaps"}, 400, "stream"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
    ]:
        found, (body,) = post_lines(served, ["the sea"], **query)
        assert (found, body["error"]["param"]) == (status, param)
    response = served.client.post(PATH, content=b'"the sea"\n', headers={"content-type": "application/x-ndjson"})
    assert (response.status_code, response.json()["model"]) == (200, "tiny")


def test_a_body_of_lines_has_no_limit_but_a_line_has(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"], max_body_bytes=2000) as server:
        status, (answer,) = post_lines(server, ["the sea " * 10] * 100)
        assert (status, answer["aggregate"]["num_texts"]) == (200, 100)
        for line in (b'"' + b"x" * 3000 + b'"\n', b'"' + b"x" * 3000):
            status, lines = post_lines(server, ["the sea", line])
            assert (status, lines[0]["error"]["message"][:7]) == (413, "line 2:")
        head = f"POST {PATH}?model=tiny HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.server.port), timeout=600) as connection:
            connection.sendall(f"{head}content-length: 3000\r\n\r\n".encode())
            assert b" 413 " in connection.recv(4096)
        other = server.client.post(
            "/v1/completions", content=b"x" * 3000, headers={"content-type": "application/x-ndjson"}
        )
        assert other.status_code == 413


@pytest.mark.parametrize("whole_body", [True, False])
def test_a_client_that_leaves_ends_its_corpus(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch, whole_body: bool
) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=2) as server:
        slow_steps(server, monkeypatch, 0.05)
        with line_client(server, stream=True) as client:
            client.send(b"".join(json.dumps(f"the sea {i}").encode() + b"\n" for i in range(400)))
            if whole_body:
                client.end()
            assert client.response().readline()
        until(server.idle)
        assert server.metric('lpa:request_success_total{finished_reason="length",model_name="tiny"}') < 100


def test_a_corpus_can_be_cancelled_by_its_id(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=2, admin_api_key="boss") as server:
        server.client.headers["authorization"] = "Bearer boss"
        slow_steps(server, monkeypatch, 0.1)
        with line_client(server, "first", stream=True) as client:
            client.send(b"".join(json.dumps(f"the sea {i}").encode() + b"\n" for i in range(400)))
            response = client.response()
            assert json.loads(response.readline())["index"] == 0
            assert server.client.post("/v1/requests/first/cancel").json()["cancelled"] == 1
            *_, last = response.read().splitlines()
            assert json.loads(last)["error"]["code"] == "request_cancelled"
        until(server.idle)
        with line_client(server, "mine", stream=True) as client:
            client.send(b'"the sea"\n')
            until(lambda: server.engine.has_work)
            assert server.client.post("/v1/requests/mine/cancel").json()["cancelled"] == 1
            response = client.response()
            assert (response.status, json.loads(response.read())["error"]["code"]) == (499, "request_cancelled")
        until(server.idle)


# --- edges -----------------------------------------------------------------------------------------------------------


def test_a_text_with_nothing_to_score_has_no_perplexity(served: Served, bos_served: Served) -> None:
    answer = ask(served, input=["the sea", "", "x"])
    for entry in answer["data"][1:]:
        assert (entry["nll_sum"], entry["num_tokens"], entry["perplexity"], entry["bits_per_byte"]) == (
            0,
            0,
            None,
            None,
        )
    assert answer["aggregate"]["num_tokens"] == answer["data"][0]["num_tokens"]
    assert (
        answer["aggregate"]["mean_perplexity"] == answer["aggregate"]["perplexity"] == answer["data"][0]["perplexity"]
    )
    for nothing in ("", "x", [5], ["x", "y"], [[], [5]]):
        error = refused(served, input=nothing)
        assert (error["status"], error["param"]) == (400, "input")
        assert "BOS" in error["message"]
    assert refused(served, input=[])["status"] == 400
    status, lines = post_lines(served, ["", "x"], stream=True)
    assert (status, [line.get("num_tokens") for line in lines]) == (200, [0, 0, None])
    assert "BOS" in lines[-1]["error"]["message"]
    assert post_lines(served, [])[0] == 400
    assert ask(bos_served, input="x")["aggregate"]["num_tokens"] == 1  # BOS stands before it
    assert ask(served, input="x", method="rolling")["aggregate"]["num_tokens"] == 1
    error = refused(bos_served, input="")
    assert error["status"] == 400
    assert "BOS" not in error["message"]


def test_white_space_and_half_characters(served: Served) -> None:
    (entry,) = ask(served, input=" \n\t \n")["data"]
    assert (entry["num_words"], entry["num_bytes"]) == (2, 5)
    assert entry["num_tokens"] == len(byte_tokenizer().encode(" \n\t \n").ids) - 1
    half = byte_tokenizer().encode("🙂").ids[:-1]
    (entry,) = ask(served, input=half, return_tokens=True)["data"]
    assert entry["num_tokens"] == len(half) - 1
    assert [token["offset"] for token in entry["tokens"]] == [0] * len(half)


def test_what_is_no_text_is_named(served: Served) -> None:
    for value, param in [
        ("\ud800", "input"),
        (["the sea", "\udfff"], "input[1]"),
        (["the sea", [5, 6]], "input[1]"),
        ([5, "x"], "input"),
        ([[5], ["x"]], "input[1]"),
        ([5, VOCAB_SIZE], "input"),
        ([[5, 6], [5, -1]], "input[1]"),
        ([None], "input"),
        (["a", None], "input[1]"),
        ({"text": "x"}, "input"),
    ]:
        error = refused(served, input=value)
        assert (error["status"], error["param"]) == (400, param)


def test_longer_than_the_context(served: Served, bos_served: Served) -> None:
    error = refused(served, input=[[5, 6], [5] * (CONTEXT + 1)])
    assert (error["status"], error["code"], error["param"]) == (400, "context_length_exceeded", "input[1]")
    assert ask(served, input=[5] * CONTEXT)["aggregate"]["num_tokens"] == CONTEXT - 1
    assert refused(bos_served, input=[5] * CONTEXT)["code"] == "context_length_exceeded"
    assert ask(bos_served, input=[5] * (CONTEXT - 1))["aggregate"]["num_tokens"] == CONTEXT - 1
    for method in ("sliding", "rolling"):
        assert ask(served, input=[5] * 1000, method=method)["aggregate"]["num_tokens"] == 1000 - (method == "sliding")


@pytest.mark.parametrize("stream", [False, True])
def test_numbers_that_are_none_name_their_text_and_lose_nothing_else(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=1, max_queue=1) as server:
        run = server.engine.runner.run

        def breaks_at_a_token(batch: Any) -> Any:
            result = run(batch)
            for item in batch.items:
                if 77 in item.request.token_ids:
                    result.prompt_logprobs[item.request.id].logprobs[0] = math.nan
            return result

        monkeypatch.setattr(server.engine.runner, "run", breaks_at_a_token)
        response = server.post(PATH, input=[[5, 6], [7, 8], [9, 77], [5, 6]], stream=stream)
        *lines, error = [json.loads(line) for line in response.text.splitlines()]
        assert [line["index"] for line in lines] == ([0, 1] if stream else [])
        assert response.status_code == (200 if stream else 500)
        assert error["error"]["code"] == "engine_error"
        assert error["error"]["message"].startswith("input[2]: ")
        until(server.idle)
        assert len(ask(server, input=[[5, 6], [7, 8]])["data"]) == 2


def test_a_long_text_and_many_short_ones(served: Served, model: LPAForCausalLM) -> None:
    text = CORPUS * 60
    ids = byte_tokenizer().encode(text).ids
    answer = ask(served, input=text, method="sliding", stride=CONTEXT - 1)
    assert answer["aggregate"]["num_tokens"] == len(ids) - 1
    assert (answer["aggregate"]["num_words"], answer["aggregate"]["num_bytes"]) == (len(text.split()), len(text))
    short = [f"{word} {i}" for i, word in enumerate(CORPUS.split() * 8)]
    data = ask(served, input=short)["data"]
    assert [entry["index"] for entry in data] == list(range(len(short)))
    for i in random.Random(3).sample(range(len(short)), 20):
        nlls = NAIVE["full"](model, byte_tokenizer().encode(short[i]).ids, convention("full", CONTEXT))
        assert data[i]["nll_sum"] == pytest.approx(math.fsum(nlls), rel=1e-5)
    assert served.idle()


def test_a_corpus_that_has_begun_waits_for_a_full_queue(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=2, max_queue=1) as server:
        slow_steps(server, monkeypatch, 0.01)
        statuses: list[int] = []

        def score() -> None:
            statuses.append(server.post(PATH, input=[f"the sea {i}" for i in range(20)]).status_code)

        threads = [threading.Thread(target=score) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) <= {200, 429}
        assert 200 in statuses
        until(server.idle)


def test_a_request_that_takes_too_long_ends(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=1, max_queue=0, request_timeout=0.4) as server:
        slow_steps(server, monkeypatch, 0.1)
        body: dict[str, Any] = {"input": [f"the sea {i}" for i in range(20)]}
        assert server.post(PATH, **body).status_code == 504
        *lines, last = server.post(PATH, **body, stream=True).text.splitlines()
        assert 1 <= len(lines) < 20
        assert json.loads(last)["error"]["code"] == "request_timeout"
        until(server.idle)


# --- load ------------------------------------------------------------------------------------------------------------


def test_a_text_scores_the_same_alone_and_under_load(both: tuple[Served, LPAForCausalLM]) -> None:
    server, _ = both
    body: dict[str, Any] = {"input": [CORPUS, TEXT], "method": "sliding", "max_length": 48}
    alone = ask(server, **body)
    stop = threading.Event()

    def stream() -> None:
        while not stop.is_set():
            server.stream(prompt="The robot", max_tokens=40, ignore_eos=True)

    def score() -> None:
        while not stop.is_set():
            ask(server, input=TEXTS)

    threads = [threading.Thread(target=work) for work in (stream, stream, stream, score, score)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            again = ask(server, **body)
            for entry, expected in zip(again["data"], alone["data"], strict=True):
                assert entry["nll_sum"] == pytest.approx(expected["nll_sum"], rel=1e-6)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
