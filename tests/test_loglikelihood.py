"""POST /v1/loglikelihood: numbers against plain forwards, the split of a pair, what is shared, and what is refused."""

from __future__ import annotations

import http.client
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lpa_model.checkpoint import save_checkpoint
from lpa_model.config import Architecture
from lpa_model.model import LPAForCausalLM
from server.routes import loglikelihood as route
from tests.serving import Served, serving, until
from tests.test_limits import Threads
from tests.tiny import CORPUS, END_OF_TEXT_ID, VOCAB_SIZE, byte_tokenizer, random_model, tiny_config

PATH = "/v1/loglikelihood"
CONTEXT = 128


@pytest.fixture(scope="module", params=["setting1", "setting2"])
def both(request: pytest.FixtureRequest, tiny_checkpoints: dict[Architecture, Path]) -> Iterator[tuple[Served, Any]]:
    """A server of each setting, and its model."""
    with serving(tiny_checkpoints[request.param]) as server:
        yield server, random_model(tiny_config(request.param))


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


def ask(served: Served, **body: Any) -> dict[str, Any]:
    return served.answer(PATH, **body)


def plain(model: LPAForCausalLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Sum of log-probabilities and whether each token was the most probable; a forward per token."""
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        ids = torch.tensor([context + continuation[:i]])
        row = model.logits(model(ids))[0, -1].double().log_softmax(-1)
        total += float(row[token])
        greedy &= int(row.argmax()) == token
    return total, greedy


def split(context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The harness' rule, written from its description: white space moves over, then one text is cut."""
    while context and context[-1].isspace():
        context, continuation = context[:-1], context[-1] + continuation
    before = byte_tokenizer().encode(context).ids
    return before, byte_tokenizer().encode(context + continuation).ids[len(before) :]


PAIRS = [
    ("The robot liked the sound", " of the waves"),
    ("The robot liked the sound ", "of the waves"),
    ("The robot liked the sound \n ", " of the"),
    ("a gull th", "ought"),  # a token would reach over the cut
    ("What do the", " 你好 🙂"),
    (CORPUS[:200], "."),
]


def test_pairs_equal_plain_forwards(both: tuple[Served, LPAForCausalLM]) -> None:
    server, model = both
    answer = ask(server, pairs=[list(pair) for pair in PAIRS])
    (data,) = answer["data"]
    assert (answer["object"], answer["add_bos"], data["index"]) == ("loglikelihood", False, 0)
    assert [entry["index"] for entry in data["continuations"]] == list(range(len(PAIRS)))
    for entry, (context, continuation) in zip(data["continuations"], PAIRS, strict=True):
        before, after = split(context, continuation)
        logprob, greedy = plain(model, before, after)
        size = len(continuation.encode())
        assert (entry["num_tokens"], entry["num_bytes"], entry["is_greedy"]) == (len(after), size, greedy)
        assert entry["logprob"] == pytest.approx(logprob, rel=1e-5)
        assert entry["logprob_per_token"] == pytest.approx(logprob / len(after), rel=1e-5)
        assert entry["logprob_per_byte"] == pytest.approx(logprob / size, rel=1e-5)
    for name, best in data["best"].items():
        numbers = [entry[name] for entry in data["continuations"]]
        assert best == numbers.index(max(numbers))
    assert len(set(data["best"].values())) > 1
    tokens = [split(*pair) for pair in PAIRS]
    contexts = {tuple(before) for before, _ in tokens}
    assert len(contexts) == 4
    assert answer["usage"]["prompt_tokens"] == sum(map(len, contexts)) + sum(len(after) for _, after in tokens)


def test_the_most_probable_continuation_is_greedy(both: tuple[Served, LPAForCausalLM]) -> None:
    server, model = both
    context = byte_tokenizer().encode("Once upon a time").ids
    likely = list(context)
    for _ in range(4):
        likely.append(int(model.logits(model(torch.tensor([likely])))[0, -1].argmax()))
    best = likely[len(context) :]
    other = [*best[:-1], (best[-1] + 1) % VOCAB_SIZE]
    (data,) = ask(server, context=context, continuations=[other, best])["data"]
    assert [entry["is_greedy"] for entry in data["continuations"]] == [False, True]
    assert data["best"]["logprob"] == 1


def test_the_three_forms_say_the_same(served: Served) -> None:
    context, continuations = "The robot liked the", [" sound", " gull and the sea", "."]
    (one,) = ask(served, context=context, continuations=continuations)["data"]
    (pairs,) = ask(served, pairs=[[context, continuation] for continuation in continuations])["data"]
    other = {"context": "The sea", "continuations": [" was", " said"]}
    first, second = ask(served, sets=[{"context": context, "continuations": continuations}, other])["data"]
    for form in (pairs, first):
        assert form["best"] == one["best"]
        for entry, expected in zip(form["continuations"], one["continuations"], strict=True):
            assert entry == {key: pytest.approx(value, rel=1e-5) for key, value in expected.items()}
    assert (second["index"], len(second["continuations"])) == (1, 2)


def test_token_ids_are_taken_by_themselves(served: Served) -> None:
    model = random_model(tiny_config("setting2"))
    encode = byte_tokenizer().encode
    context, continuation = encode("a gull th").ids, encode("ought").ids
    expected, _ = plain(model, context, continuation)
    for pair in ([context, continuation], ["a gull th", continuation], [context, "ought"]):
        (data,) = ask(served, pairs=[pair])["data"]
        (entry,) = data["continuations"]
        assert entry["logprob"] == pytest.approx(expected, rel=1e-5)
        assert (entry["num_tokens"], entry["num_bytes"]) == (len(continuation), 5)


def test_before_an_empty_context_stands_eos_or_the_continuations_own(served: Served) -> None:
    model = random_model(tiny_config("setting2"))
    ids = byte_tokenizer().encode("the sea").ids
    expected, _ = plain(model, [END_OF_TEXT_ID], ids)
    for context, continuation in (("", "the sea"), ([], ids), ("", "<|endoftext|>the sea"), ([END_OF_TEXT_ID], ids)):
        (data,) = ask(served, context=context, continuations=[continuation])["data"]
        assert data["continuations"][0]["num_tokens"] == len(ids)
        assert data["continuations"][0]["logprob"] == pytest.approx(expected, rel=1e-5)
    spaces, _ = plain(model, [END_OF_TEXT_ID], byte_tokenizer().encode(" the sea").ids)
    (data,) = ask(served, context=" ", continuations=["the sea"])["data"]
    assert data["continuations"][0]["logprob"] == pytest.approx(spaces, rel=1e-5)


def test_bos_stands_before_a_context_once(tmp_path: Path) -> None:
    config = tiny_config("setting2", bos_token_id=7, eos_token_id=END_OF_TEXT_ID)
    model = random_model(config)
    save_checkpoint(tmp_path / "model", model, byte_tokenizer(), torch.float32)
    with serving(tmp_path / "model") as server:
        ids = byte_tokenizer().encode("The sea").ids
        continuation = byte_tokenizer().encode(" was").ids
        bare, _ = plain(model, ids, continuation)
        expected, _ = plain(model, [7, *ids], continuation)
        assert bare != pytest.approx(expected, rel=1e-4)
        for context, add_bos, number in (
            ("The sea", None, bare),
            ("The sea", True, expected),
            ([7, *ids], True, expected),
            ("", None, plain(model, [7], continuation)[0]),
            ("", True, plain(model, [7], continuation)[0]),
        ):
            answer = ask(server, context=context, continuations=[" was"], add_bos=add_bos)
            assert answer["add_bos"] == bool(add_bos)
            assert answer["data"][0]["continuations"][0]["logprob"] == pytest.approx(number, rel=1e-5)


def test_a_shared_context_is_computed_once(served: Served) -> None:
    draw = random.Random(4)
    sets = [
        {
            "context": draw.choices(range(1, VOCAB_SIZE), k=80),
            "continuations": [draw.choices(range(1, VOCAB_SIZE), k=draw.randint(1, 10)) for _ in range(4)],
        }
        for _ in range(12)
    ]
    usage = ask(served, sets=sets)["usage"]
    assert usage["prompt_tokens"] == sum(80 + sum(map(len, entry["continuations"])) for entry in sets)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    again = ask(served, pairs=[[entry["context"], [5]] for entry in sets])["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == 12 * 64  # whole blocks of 32 before token 79


def test_continuations_that_do_not_fit_behind_one_context_share_its_blocks(served: Served) -> None:
    model = random_model(tiny_config("setting2"))
    draw = random.Random(6)
    context = draw.choices(range(1, VOCAB_SIZE), k=70)
    continuations = [draw.choices(range(1, VOCAB_SIZE), k=draw.randint(1, 25)) for _ in range(20)]
    answer = ask(served, context=context, continuations=continuations)
    (data,) = answer["data"]
    for entry, continuation in zip(data["continuations"], continuations, strict=True):
        logprob, _ = plain(model, context, continuation)
        assert (entry["num_tokens"], entry["logprob"]) == (len(continuation), pytest.approx(logprob, rel=1e-5))
    packs, rest = divmod(answer["usage"]["prompt_tokens"] - sum(map(len, continuations)), 70)
    assert (packs >= 4, rest) == (True, 0)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == (packs - 1) * 64


def test_many_sets_and_many_continuations_on_a_small_engine(tiny_checkpoints: dict[Architecture, Path]) -> None:
    model = random_model(tiny_config("setting2"))
    with serving(tiny_checkpoints["setting2"], max_num_seqs=2, max_queue=1, kv_cache_memory=1 << 17) as server:
        words = CORPUS.split()
        sets = [{"context": CORPUS[: 10 + i], "continuations": [f" {w}" for w in words[i : i + 7]]} for i in range(30)]
        data = ask(server, sets=sets)["data"]
        assert [entry["index"] for entry in data] == list(range(30))
        for i in (0, 11, 29):
            for entry, continuation in zip(data[i]["continuations"], sets[i]["continuations"], strict=True):
                logprob, _ = plain(model, *split(str(sets[i]["context"]), continuation))
                assert entry["logprob"] == pytest.approx(logprob, rel=1e-5)
        until(server.idle)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "context"),
        ({"context": "a", "continuations": ["b"], "pairs": [["a", "b"]]}, "context"),
        ({"pairs": [["a", "b"]], "sets": []}, "context"),
        ({"context": "a"}, "continuations"),
        ({"continuations": ["a"]}, "context"),
        ({"context": "a", "continuations": []}, "continuations"),
        ({"context": "a", "continuations": "b"}, "continuations"),
        ({"context": "a", "continuations": ["", "b\ud800"]}, "continuations[1]"),
        ({"context": "a", "continuations": ["", []]}, "continuations[0]"),  # nothing at all can be scored
        ({"context": "a", "continuations": ["b", "\ud800"]}, "continuations[1]"),
        ({"context": "\ud800", "continuations": ["b"]}, "context"),
        ({"context": 5, "continuations": ["b"]}, "context"),
        ({"context": "a", "continuations": [[5, "x"]]}, "continuations[0]"),
        ({"context": "a", "continuations": [[VOCAB_SIZE]]}, "continuations[0]"),
        ({"context": [-1], "continuations": ["b"]}, "continuations[0]"),
        ({"pairs": []}, "pairs"),
        ({"pairs": ["ab"]}, "pairs[0]"),
        ({"pairs": [["a", "b"], ["a"]]}, "pairs[1]"),
        ({"pairs": [["a", ""]]}, "pairs[0][1]"),
        ({"pairs": [[None, "b"]]}, "pairs[0][0]"),
        ({"pairs": [["", [END_OF_TEXT_ID]]]}, "pairs[0][1]"),  # it is its own context
        ({"sets": [{"context": "a", "continuations": ["b"]}, {"context": "a"}]}, "sets[1].continuations"),
        ({"sets": [{"continuations": ["b"]}]}, "sets[0].context"),
        ({"sets": ["a"]}, "sets[0]"),
        ({"sets": [{"context": "a", "continuations": ["b", 5]}]}, "sets[0].continuations[1]"),
        ({"context": "a", "continuations": ["b"], "add_bos": True}, "add_bos"),
        ({"context": "a", "continuations": ["b"], "add_bos": 1}, "add_bos"),
        ({"context": "a", "continuations": ["b"], "model": 5}, "model"),
        ({"context": "a", "continuations": ["b"], "modle": "tiny"}, "modle"),
        ({"context": [5] * CONTEXT, "continuations": ["b"]}, "continuations[0]"),
    ],
)
def test_what_cannot_be_is_a_400_that_names_it(served: Served, body: dict[str, Any], param: str) -> None:
    content = json.dumps({"model": "tiny", **body})
    response = served.client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert (error["code"] == "context_length_exceeded") == (body.get("context") == [5] * CONTEXT)
    until(served.idle)


def test_what_has_no_token_of_its_own_has_an_error_and_the_others_their_numbers(served: Served) -> None:
    merged = next((a, b) for a in ("th", " t", " th", "an", " s", "sa") for b in ("e", "he", "d", "y", "a", "t")
                  if not split("x" + a, b)[1])  # fmt: skip
    good = [["a", "b"], ["the", " sea"]]
    bad = [["x" + merged[0], merged[1]], ["a", ""], ["a", []], ["a", "b" * CONTEXT], ["", [END_OF_TEXT_ID]]]
    (expected,) = served.post(PATH, pairs=good).json()["data"]
    (found,) = served.post(PATH, pairs=[bad[0], good[0], *bad[1:], good[1]]).json()["data"]
    entries = found["continuations"]
    assert [entry["index"] for entry in entries] == list(range(7))
    for entry, alone in zip((entries[1], entries[6]), expected["continuations"], strict=True):
        assert {**entry, "index": 0} == {**alone, "index": 0}
    for i, code in ((0, None), (2, None), (3, None), (4, "context_length_exceeded"), (5, None)):
        assert entries[i]["error"]["param"] == f"pairs[{i}][1]"
        assert (entries[i]["error"]["type"], entries[i]["error"]["code"]) == ("invalid_request_error", code)
        assert entries[i]["logprob"] is entries[i]["is_greedy"] is None
    assert found["best"]["logprob"] == (1, 6)[expected["best"]["logprob"]]
    sets = [{"context": "a", "continuations": [""]}, {"context": "a", "continuations": ["b"]}]
    first, second = served.post(PATH, sets=sets).json()["data"]
    assert first["best"] == {"logprob": None, "logprob_per_token": None, "logprob_per_byte": None}
    assert second["continuations"][0]["logprob"] == expected["continuations"][0]["logprob"]


def test_numbers_that_are_none_name_their_continuation(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"]) as server:
        run = server.engine.runner.run

        def breaks_at_a_token(batch: Any) -> Any:
            result = run(batch)
            for item in batch.items:
                if 77 in item.request.token_ids:  # behind a context of two; the first tokens of branches come first
                    result.prompt_logprobs[item.request.id].logprobs[item.request.token_ids.index(77) - 2] = math.nan
            return result

        monkeypatch.setattr(server.engine.runner, "run", breaks_at_a_token)
        response = server.post(PATH, context=[5, 6], continuations=[[7], [77], [8]])
        assert response.status_code == 500
        assert response.json()["error"]["message"].startswith("continuations[1]: ")
        assert ask(server, context=[5, 6], continuations=[[7], [8]])["data"]
        until(server.idle)


def test_a_step_that_fails_fails_its_request(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"]) as server:
        run, steps = server.engine.runner.run, 0

        def fails_once(batch: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 1:
                raise RuntimeError("out of luck")
            return run(batch)

        monkeypatch.setattr(server.engine.runner, "run", fails_once)
        response = server.post(PATH, context="The sea", continuations=[" was", " said", "."])
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")
        assert ask(server, context="The sea", continuations=[" was", " said", "."])["data"]
        until(server.idle)


def lines(served: Served, body: bytes, **query: Any) -> list[dict[str, Any]]:
    response = served.client.post(
        PATH, params={"model": "tiny", **query}, content=body, headers={"content-type": "application/x-ndjson"}
    )
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def asked(sets: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(of_set).encode() + b"\n" for of_set in sets)


def some_sets(count: int) -> list[dict[str, Any]]:
    return [
        {"context": CORPUS[10 * i : 10 * i + 30], "continuations": [" of the", "", " waves and more", [7, i + 1]]}
        for i in range(count)
    ]


def test_sets_come_and_go_as_lines(served: Served) -> None:
    sets = some_sets(150)
    whole = ask(served, sets=sets)
    *of_lines, last = lines(served, asked(sets), stream="true")
    (answer,) = lines(served, asked(sets))  # without stream: one object
    assert [{"object": "loglikelihood.set", **entry} for entry in answer["data"]] == of_lines
    for number, (entry, of_body) in enumerate(zip(of_lines, whole["data"], strict=True), 1):
        error = entry["continuations"][1].pop("error")
        assert error["message"] == f"line {number}.continuations[1]: is empty; there is nothing to score"
        del of_body["continuations"][1]["error"]
        assert entry == {"object": "loglikelihood.set", **of_body}
    assert last["object"] == "loglikelihood" and "data" not in last
    assert last["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"] and answer["object"] == "loglikelihood"
    streamed = served.post(PATH, sets=sets[:3], stream=True)
    assert streamed.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["best"] for line in streamed.text.splitlines()[:-1]] == [e["best"] for e in of_lines[:3]]
    until(served.idle)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"{", "line 3: is not valid JSON"),
        (b'["a", "b"]', "line 3: must be an object with context and continuations"),
        (b'{"context": "a"}', "line 3.continuations: must be a list that is not empty"),
        (b'{"context": "a", "continuations": ["b"], "colour": 1}', "line 3.colour: is unknown"),
        (b'{"context": "a", "continuations": ["b", 3]}', "line 3.continuations[1]: must be a text or a list"),
    ],
)
def test_a_bad_line_comes_after_the_sets_before_it(served: Served, bad: bytes, says: str) -> None:
    good = asked(some_sets(1))
    first, second, error = lines(served, good + good + bad + b"\n" + good, stream="true")
    assert (first["index"], second["index"]) == (0, 1) and first["continuations"][0] == second["continuations"][0]
    assert error["error"]["message"].startswith(says)
    until(served.idle)


@pytest.mark.parametrize("body", [b"", b"\n \r\n"])
@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_body_without_a_line_is_refused(served: Served, body: bytes, stream: str) -> None:
    headers = {"content-type": "application/x-ndjson"}
    for path in (PATH, "/v1/perplexity"):
        response = served.client.post(path, params={"stream": stream}, content=body, headers=headers)
        assert (response.status_code, response.json()["error"]["message"]) == (400, "the body has no line")
    until(served.idle)


def test_parameters_beside_sets_in_lines_are_checked(served: Served) -> None:
    for query, param in (({"add_bos": "red"}, "add_bos"), ({"colour": "red"}, "colour"), ({"sets": "[]"}, "sets")):
        response = served.client.post(
            PATH, params=query, content=asked(some_sets(1)), headers={"content-type": "application/x-ndjson"}
        )
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_an_answer_comes_before_the_next_set_is_sent(served: Served) -> None:
    host = served.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=600)
    connection.putrequest("POST", f"{PATH}?model=tiny&stream=true")
    connection.putheader("content-type", "application/x-ndjson")
    connection.putheader("transfer-encoding", "chunked")
    connection.putheader("connection", "close")
    connection.endheaders()
    line = asked(some_sets(1))
    connection.send(b"%x\r\n%s\r\n" % (len(line), line))
    answer = connection.sock.makefile("rb")
    while answer.readline() not in (b"\r\n", b""):
        pass
    size = int(answer.readline(), 16)
    assert json.loads(answer.read(size))["object"] == "loglikelihood.set"
    connection.send(b"0\r\n\r\n")
    assert b'"object":"loglikelihood"' in answer.read()
    connection.close()


def test_what_grows_with_a_set_is_done_beside_the_event_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(monkeypatch)
    for name in ("set_of_line", "continuation_fields", "failed_fields", "set_fields"):
        threads.watch(route, name)
    sets = [{"context": "The sea", "continuations": ["", *([7 + i % 50, i % 7] for i in range(300))]}]
    (of_body,), (of_lines,) = ask(served, sets=sets)["data"], lines(served, asked(sets))[0]["data"]
    streamed = lines(served, asked(sets), stream="true")[0]
    assert [len(entry["continuations"]) for entry in (of_body, of_lines, streamed)] == [301] * 3
    loop = served.loop_thread()
    assert len(threads.found) == 4 and all(loop not in found for found in threads.found.values())
