"""POST /v1/completions: every combination of its forms against the plain forward, whole and streamed."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lpa_model.config import Architecture
from lpa_model.model import LPAForCausalLM
from server.engine.tokenizer import Tokenizer as EngineTokenizer
from tests.serving import Served, serving
from tests.tiny import END_OF_TEXT_ID, VOCAB_SIZE, byte_tokenizer, random_model, tiny_config

TEXTS = ['The robot said: "çava, 你好 🙂"', "waves"]
FORMS = list(itertools.product([False, True], [None, 0, 2], [1, 2], [1, 2], [False, True], [0, 4]))


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


@pytest.fixture(scope="module")
def model() -> LPAForCausalLM:
    return random_model(tiny_config("setting2"))


@pytest.fixture(scope="module")
def wrapped() -> EngineTokenizer:
    return EngineTokenizer(byte_tokenizer(), tiny_config())


def logprob_rows(model: LPAForCausalLM, ids: list[int]) -> torch.Tensor:
    """[len(ids), vocab]: row i is the distribution of the token after ids[i]; no cache, one sequence."""
    with torch.inference_mode():
        return torch.log_softmax(model.logits(model(torch.tensor([ids]))[0]), -1)


def joined(chunks: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The choices that a stream tells, put together as the API's documentation says."""
    found: list[dict[str, Any]] = [{"index": i, "text": "", "logprobs": None} for i in range(count)]
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = found[part["index"]]
            assert "finish_reason" not in choice, "something came after the end"
            choice["text"] += part["text"]
            if part["logprobs"] is not None:
                columns = choice["logprobs"] or {name: [] for name in part["logprobs"]}
                choice["logprobs"] = {name: columns[name] + part["logprobs"][name] for name in columns}
            if part["finish_reason"] is not None:
                choice |= {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
    return found


def greedy(model: LPAForCausalLM, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logprob_rows(model, ids)[-1].argmax()))
    return ids[-count:]


def test_a_greedy_completion_is_the_plain_forwards(served: Served, model: LPAForCausalLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The robot liked").ids
    expected = greedy(model, ids, 12)
    answer = served.complete(prompt="The robot liked", temperature=0, max_tokens=12, ignore_eos=True)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert abs(answer["created"] - time.time()) < 60
    assert answer["choices"] == [
        {
            "index": 0,
            "text": tokenizer.decode(expected),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 12,
        "total_tokens": len(ids) + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_the_four_forms_of_a_prompt_are_the_same(served: Served, tokenizer: Tokenizer) -> None:
    texts = ["a gull", "The robot liked the sound"]
    ids = [tokenizer.encode(text).ids for text in texts]
    settings = {"temperature": 0, "max_tokens": 6}
    alone = [served.complete(prompt=text, **settings)["choices"][0]["text"] for text in texts]
    assert [served.complete(prompt=i, **settings)["choices"][0]["text"] for i in ids] == alone
    for prompt in (texts, ids):
        choices = served.complete(prompt=prompt, **settings)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert [choice["text"] for choice in choices] == alone


def test_n_and_several_prompts_are_numbered_and_counted(served: Served, tokenizer: Tokenizer) -> None:
    prompts = ["the sea", "every day it went"]
    answer = served.complete(prompt=prompts, n=3, seed=7, max_tokens=5, ignore_eos=True)
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert len({choice["text"] for choice in choices}) > 3  # choices of one seed differ
    for p, prompt in enumerate(prompts):
        single = served.complete(prompt=prompt, n=3, seed=7, max_tokens=5, ignore_eos=True)
        assert [c["text"] for c in single["choices"]] == [c["text"] for c in choices[3 * p : 3 * p + 3]]
    assert answer["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(prompt).ids) for prompt in prompts)
    assert answer["usage"]["completion_tokens"] == 6 * 5


def test_special_tokens_in_a_prompt_are_parsed_and_echoed(served: Served) -> None:
    logprobs = served.complete(prompt="a<|endoftext|>b", echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "<|endoftext|>", "b"]
    assert logprobs["text_offset"] == [0, 1, 14]
    ids = served.complete(prompt=[65, END_OF_TEXT_ID, 66], echo=True, max_tokens=0)["choices"][0]["text"]
    assert "<|endoftext|>" in ids


def test_a_stream_without_usage_has_none(served: Served) -> None:
    assert all("usage" not in chunk for chunk in served.stream(prompt="x", max_tokens=3))


def test_max_tokens_zero_streams_the_prompt(served: Served) -> None:
    choices = [chunk["choices"][0] for chunk in served.stream(prompt="the sea", echo=True, max_tokens=0)]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [("the sea", None), ("", "length")]


def test_stop_strings_and_stop_tokens_end_a_completion(
    served: Served, model: LPAForCausalLM, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("The robot liked").ids
    expected = greedy(model, ids, 12)
    whole = tokenizer.decode(expected)
    stop = next(whole[i] for i in range(4, len(whole)) if whole[i] != "\ufffd" and whole[i] not in whole[:i])
    body: dict[str, Any] = {"prompt": "The robot liked", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    for form in (stop, [stop, "never"]):
        (choice,) = served.complete(**body, stop=form)["choices"]
        assert choice["text"] == whole[: whole.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    last = next(token for i, token in enumerate(expected) if i > 3 and token not in expected[:i])
    (choice,) = served.complete(**body, stop_token_ids=[last])["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", last)
    assert whole.startswith(choice["text"].rstrip("\ufffd"))


def test_a_prompt_seen_before_is_counted_as_cached(served: Served) -> None:
    prompt = [random.Random(11).randrange(1, VOCAB_SIZE) for _ in range(40)]
    assert served.complete(prompt=prompt, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert served.complete(prompt=prompt, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


@pytest.mark.parametrize(("echo", "logprobs", "n", "prompts", "as_ids", "max_tokens"), FORMS)
def test_every_form_whole_and_streamed(
    served: Served,
    model: LPAForCausalLM,
    tokenizer: Tokenizer,
    wrapped: EngineTokenizer,
    echo: bool,
    logprobs: int | None,
    n: int,
    prompts: int,
    as_ids: bool,
    max_tokens: int,
) -> None:
    ids = [tokenizer.encode(text).ids for text in TEXTS[:prompts]]
    forms: list[Any] = ids if as_ids else TEXTS[:prompts]
    body = {
        "prompt": forms if prompts > 1 else forms[0],
        "echo": echo,
        "logprobs": logprobs,
        "n": n,
        "max_tokens": max_tokens,
        "seed": 5,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if max_tokens == 0 and not echo:
        assert served.post("/v1/completions", **body).json()["error"]["param"] == "max_tokens"
        return
    answer = served.complete(**body)
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(prompts * n))
    for index, choice in enumerate(choices):
        own, generated = ids[index // n], choice["token_ids"]
        assert choice["prompt_token_ids"] == own
        assert len(generated) == max_tokens
        assert choice["finish_reason"] == "length"
        raw = b"".join(wrapped.token_bytes(i) for i in generated if i != END_OF_TEXT_ID)
        text = (TEXTS[index // n] if echo else "") + raw.decode(errors="replace")
        assert choice["text"] == text
        if logprobs is None:
            assert choice["logprobs"] is None
            continue
        check_columns(choice["logprobs"], model, wrapped, own, generated, echo=echo, top=logprobs)
    if max_tokens and n > 1:
        assert choices[0]["token_ids"] != choices[1]["token_ids"]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] == prompts * n * max_tokens

    chunks = served.stream(**body, stream_options={"include_usage": True})
    *chunks, last = chunks
    assert last["choices"] == []
    cached = "prompt_tokens_details"  # the prompt has been seen by now
    assert {k: v for k, v in last["usage"].items() if k != cached} == {
        k: v for k, v in answer["usage"].items() if k != cached
    }
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {(chunk["id"], chunk["created"], chunk["object"]) for chunk in [*chunks, last]} == {
        (last["id"], last["created"], "text_completion")
    }
    streamed = joined(chunks, prompts * n)
    for choice, part in zip(choices, streamed, strict=True):
        if logprobs is not None:
            numbers, others = choice["logprobs"].pop("token_logprobs"), part["logprobs"].pop("token_logprobs")
            assert others == pytest.approx(numbers, abs=1e-4)
            tops, others = choice["logprobs"].pop("top_logprobs"), part["logprobs"].pop("top_logprobs")
            assert [top and list(top) for top in others] == [top and list(top) for top in tops]
        assert part == {key: choice[key] for key in part}


def check_columns(
    columns: dict[str, list[Any]],
    model: LPAForCausalLM,
    wrapped: EngineTokenizer,
    prompt: list[int],
    generated: list[int],
    *,
    echo: bool,
    top: int,
) -> None:
    everything = prompt + generated
    rows = logprob_rows(model, everything)
    first = 0 if echo else len(prompt)
    told = everything[first:]
    assert columns["tokens"] == [wrapped.token_text(i) for i in told]
    for place, (token, value, best) in enumerate(
        zip(told, columns["token_logprobs"], columns["top_logprobs"], strict=True), first
    ):
        if place == 0:
            assert (value, best) == (None, None)
            continue
        assert value == pytest.approx(float(rows[place - 1, token]), abs=1e-4)
        assert top <= len(best) <= top + 1
        assert best[wrapped.token_text(token)] == value
        assert max(best.values()) == pytest.approx(float(rows[place - 1].max()) if top else value, abs=1e-4)
    # a character's offset is the number of characters that were complete before the token
    raw = [b"" if i == END_OF_TEXT_ID else wrapped.token_bytes(i) for i in everything]
    for place, offset in enumerate(columns["text_offset"], first):
        complete = b"".join(raw[:place]).decode(errors="replace")
        unfinished = complete.endswith("\ufffd") and complete.encode() != b"".join(raw[:place])
        assert offset in ({len(complete), len(complete) - 1} if unfinished else {len(complete)})


def test_best_of_returns_the_most_probable(served: Served, model: LPAForCausalLM, tokenizer: Tokenizer) -> None:
    body: dict[str, Any] = {"prompt": "The robot", "max_tokens": 5, "seed": 11, "ignore_eos": True}
    every = served.complete(**body, n=6, logprobs=0)["choices"]
    means = [sum(choice["logprobs"]["token_logprobs"]) / 5 for choice in every]
    ranking = sorted(range(6), key=lambda i: -means[i])
    answer = served.complete(**body, n=2, best_of=6)
    assert [choice["text"] for choice in answer["choices"]] == [every[i]["text"] for i in ranking[:2]]
    assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
    assert answer["usage"]["completion_tokens"] == 30
    assert served.post("/v1/completions", **body, n=1, best_of=2, stream=True).json()["error"]["param"] == "best_of"


def test_prompt_logprobs_are_vllms(served: Served, model: LPAForCausalLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[0]).ids
    rows = logprob_rows(model, ids)
    for max_tokens in (0, 3):
        answer = served.complete(prompt=[TEXTS[0], "x"], prompt_logprobs=2, n=2, max_tokens=max_tokens)
        first, second = (answer["choices"][i]["prompt_logprobs"] for i in (0, 1))
        assert first == second
        assert answer["choices"][2]["prompt_logprobs"] == [None]
        assert first[0] is None
        for place, (token, entry) in enumerate(zip(ids[1:], first[1:], strict=True)):
            assert entry[str(token)]["logprob"] == pytest.approx(float(rows[place, token]), abs=1e-4)
            assert entry[str(token)]["rank"] == int((rows[place] > rows[place, token]).sum()) + 1
            assert {int(i) for i in entry} == {token, *rows[place].topk(2).indices.tolist()}
            assert next(iter(entry)) == str(token)  # clients such as Inspect AI take the first for the prompt's own
            assert sorted(e["rank"] for e in entry.values())[:2] == [1, 2]


def test_a_prompt_that_is_not_given_is_the_start_of_a_document(served: Served) -> None:
    expected = served.complete(prompt=[END_OF_TEXT_ID], temperature=0)["choices"][0]["text"]
    assert served.complete(prompt=None, temperature=0)["choices"][0]["text"] == expected
    assert served.complete(temperature=0)["choices"][0]["text"] == expected


def test_a_prompt_is_truncated_from_the_left(served: Served, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[0]).ids
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "return_token_ids": True}
    answer = served.complete(prompt=TEXTS[0], truncate_prompt_tokens=5, echo=True, **settings)["choices"][0]
    assert answer["prompt_token_ids"] == ids[-5:]
    assert answer["text"].startswith(tokenizer.decode(ids[-5:]).strip("\ufffd"))
    long = served.complete(prompt=[7] * 500, truncate_prompt_tokens=-1, **settings)["choices"][0]
    assert len(long["prompt_token_ids"]) == 128 - 4
    assert served.complete(prompt="x", truncate_prompt_tokens=5, **settings)["usage"]["prompt_tokens"] == 1


def test_the_text_that_ended_it_can_be_kept(served: Served, tokenizer: Tokenizer) -> None:
    body: dict[str, Any] = {"prompt": "The robot", "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    text = served.complete(**body)["choices"][0]["text"]
    stop = text[4:7]
    at = text.index(stop)
    without = served.complete(**body, stop=stop)["choices"][0]
    kept = served.complete(**body, stop=stop, include_stop_str_in_output=True)["choices"][0]
    assert (without["text"], kept["text"]) == (text[:at], text[: at + len(stop)])
    assert (without["finish_reason"], without["stop_reason"]) == ("stop", stop)
    ids = served.complete(**body, return_token_ids=True)["choices"][0]["token_ids"]
    token = next(i for i in ids[1:] if i != END_OF_TEXT_ID)
    without = served.complete(**body, stop_token_ids=[token], logprobs=0)["choices"][0]
    kept = served.complete(**body, stop_token_ids=[token], include_stop_str_in_output=True)["choices"][0]
    assert without["stop_reason"] == kept["stop_reason"] == token
    assert kept["text"].startswith(without["text"])
    assert len(without["logprobs"]["tokens"]) == ids.index(token) + 1


def test_special_tokens_can_be_kept(served: Served) -> None:
    forced: dict[str, Any] = {"prompt": "x", "max_tokens": 3, "ignore_eos": True, "logit_bias": {"0": 100}}
    assert served.complete(**forced)["choices"][0]["text"] == ""
    kept = served.complete(**forced, skip_special_tokens=False, logprobs=0)["choices"][0]
    assert kept["text"] == "<|endoftext|>" * 3
    assert kept["logprobs"]["text_offset"] == [1 + 13 * i for i in range(3)]


def test_words_and_tokens_that_may_and_may_not_come(served: Served, tokenizer: Tokenizer) -> None:
    body: dict[str, Any] = {"prompt": "The robot", "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    free = served.complete(**body, temperature=0)["choices"][0]["token_ids"]
    allowed = served.complete(**body, seed=1, allowed_token_ids=[30, 40, 41])["choices"][0]["token_ids"]
    assert set(allowed) <= {30, 40, 41}
    word = tokenizer.id_to_token(free[3])
    assert word is not None
    biased = served.complete(**body, temperature=0, logit_bias={str(free[0]): -100})["choices"][0]["token_ids"]
    assert biased[0] != free[0]
    frequent = served.complete(**body, temperature=0, frequency_penalty=2.0, presence_penalty=2.0)["choices"][0]
    assert len(set(frequent["token_ids"])) >= len(set(free))
    text = tokenizer.decode([42])
    pair = served.complete(**body, seed=1, allowed_token_ids=[42, 43], bad_words=[text])["choices"][0]["token_ids"]
    assert pair == [43] * 12


@given(ids=st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=12), cut=st.integers(1, 11))
def test_prompt_and_completion_together_are_the_text_of_all_tokens(
    served: Served, wrapped: EngineTokenizer, ids: list[int], cut: int
) -> None:
    """Also where the prompt ends inside a character."""
    prompt, rest = ids[:cut], ids[cut:]
    raw = b"".join(wrapped.token_bytes(i) for i in ids)
    echoed = ""
    for token in rest:  # teacher forcing, a token at a time
        choice = served.complete(prompt=prompt, max_tokens=1, allowed_token_ids=[token], echo=True)["choices"][0]
        echoed = choice["text"]
        prompt = [*prompt, token]
    if rest:
        assert echoed == raw.decode(errors="replace")


def test_a_character_that_the_prompt_began_is_finished_by_the_completion(
    served: Served, wrapped: EngineTokenizer
) -> None:
    of_byte = {wrapped.token_bytes(i): i for i in range(VOCAB_SIZE)}
    smile = [of_byte[bytes([byte])] for byte in "🙂".encode()]
    body: dict[str, Any] = {"prompt": [of_byte[b"a"], *smile[:3]], "max_tokens": 1, "allowed_token_ids": [smile[3]]}
    assert served.complete(**body)["choices"][0]["text"] == "🙂"
    assert served.complete(**body, echo=True)["choices"][0]["text"] == "a🙂"
    scored = served.complete(**body, logprobs=0)["choices"][0]["logprobs"]
    assert scored["text_offset"] == [1]
    assert scored["tokens"] == ["bytes:\\x82"]


def test_usage_so_far_in_every_chunk(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = served.stream(prompt="x", max_tokens=5, ignore_eos=True, logprobs=0, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2] == 5
    assert chunks[-1]["choices"] == []


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_n_choices_share_one_computation_of_the_prompt(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch, prefix_caching: bool
) -> None:
    with serving(tiny_checkpoints["setting2"], enable_prefix_caching=prefix_caching) as served:
        run, computed = served.engine.runner.run, 0

        def counted(batch: Any) -> Any:
            nonlocal computed
            computed += batch.num_prompt_tokens
            return run(batch)

        monkeypatch.setattr(served.engine.runner, "run", counted)
        body: dict[str, Any] = {"prompt": [*range(1, 61)], "seed": 1, "max_tokens": 6, "ignore_eos": True}
        answer = served.complete(**body, n=4, echo=True, logprobs=0)
        assert computed == 60
        assert answer["usage"]["prompt_tokens"] == 60
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        again = served.complete(**body, n=1)
        assert again["choices"][0]["text"] == answer["choices"][0]["text"].removeprefix(
            byte_tokenizer().decode([*range(1, 61)]).removesuffix("\ufffd")
        )
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == (32 if prefix_caching else 0)
