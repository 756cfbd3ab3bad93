"""Constrained generation: what random models write is valid, whatever else is asked and whoever is in the batch."""

from __future__ import annotations

import gc
import json
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import llguidance
import pytest
import torch

from lpa_model.config import Architecture
from server.engine import grammar, grammar_source
from server.engine.grammar_workers import GrammarWorkers
from server.engine.request import FinishReason, GrammarSpec, Request, RequestOutput, SamplingParams
from server.engine.vocabulary import Vocabulary
from tests.test_engine import drain, ids_of, make_engine, random_model, run
from tests.test_grammar import Late, spec
from tests.tiny import END_OF_TEXT_ID, byte_tokenizer, tiny_config, write_checkpoint

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6, "pattern": "^[a-z]*$"},
        "size": {"type": "integer", "minimum": -5, "maximum": 120},
        "kinds": {"type": "array", "items": {"enum": ["sea", "shore", 7]}, "maxItems": 2},
        "maybe": {"type": ["boolean", "null"]},
    },
    "required": ["name", "size", "kinds", "maybe"],
    "additionalProperties": False,
}
CHOICES = ["gull", "gulls", "a robot", 'say "hello"', "naïve\t🤖"]
REGEX = r"[A-F0-9]{4}(-[a-z]{1,3})?|é+/x"
LARK = 'start: "(" item ("," item)? ")"\nitem: /[0-9]{1,2}/ | "x" | "(" item ")"'
GBNF = 'root ::= "yes" | "no" ", " reason\nreason ::= [a-c]{1,4}'


def fits_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "size", "kinds", "maybe"]
        and re.fullmatch("[a-z]{0,6}", value["name"]) is not None
        and type(value["size"]) is int
        and -5 <= value["size"] <= 120
        and len(value["kinds"]) <= 2
        and all(kind in ("sea", "shore", 7) for kind in value["kinds"])
        and value["maybe"] in (True, False, None)
    )


def is_item(text: str) -> bool:
    nested = text.startswith("(") and text.endswith(")") and is_item(text[1:-1])
    return nested or re.fullmatch("[0-9]{1,2}|x", text) is not None


def fits_lark(text: str) -> bool:
    items = text[1:-1].split(",")
    return text[0] + text[-1] == "()" and len(items) <= 2 and all(map(is_item, items))


VALID: dict[str, tuple[GrammarSpec, Callable[[str], bool]]] = {
    "json_object": (spec("json_object"), lambda text: isinstance(json.loads(text), dict)),
    "json_schema": (spec("json_schema", json.dumps(SCHEMA)), fits_schema),
    "regex": (spec("regex", REGEX), lambda text: re.fullmatch(REGEX, text) is not None),
    "choice": (spec("choice", json.dumps(CHOICES)), lambda text: text in CHOICES),
    "lark": (spec("grammar", LARK), fits_lark),
    "gbnf": (spec("grammar", GBNF), lambda text: re.fullmatch("yes|no, [a-c]{1,4}", text) is not None),
}


@pytest.fixture(autouse=True, scope="module")
def shared_workers() -> Iterator[None]:
    """One process for the grammars of all these engines, whose tokenizers are alike."""
    workers: list[GrammarWorkers] = []

    def share(vocabulary: Vocabulary) -> GrammarWorkers:
        if not workers:
            workers.append(GrammarWorkers(vocabulary))
        return workers[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "GrammarWorkers", share)
        yield
    for worker in workers:
        worker.close()


BY_NAME = pytest.mark.parametrize("name", VALID)


def constrained(name: str, seed: int, **keys: Any) -> SamplingParams:
    token = byte_tokenizer().token_to_id
    defaults: dict[str, Any] = {
        "max_tokens": 80,
        "temperature": 8.0,  # nearly even
        "logit_bias": tuple((token(character), 30.0) for character in '"}]'),  # or objects never end
    }
    return SamplingParams(grammar=VALID[name][0], seed=seed, **{**defaults, **keys})


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def prompt(seed: int, length: int) -> list[int]:
    """Letters: a prompt that ends within a character would have its rest in the text."""
    letters = [byte_tokenizer().token_to_id(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return random.Random(seed).choices(letters, k=length)


@BY_NAME
def test_what_ends_is_valid(tiny_checkpoint: Path, name: str) -> None:
    engine = make_engine(tiny_checkpoint)
    outputs = run(engine, [Request(f"r{i}", prompt(i, 5), constrained(name, i)) for i in range(12)])
    ended = [text_of(o) for o in outputs.values() if o[-1].finish_reason is FinishReason.STOP]
    assert len(ended) >= 9
    for text in ended:
        assert VALID[name][1](text), text
    assert len(set(ended)) > 1
    assert gc.collect() >= 0 and not engine.runner._grammars and not engine.runner._states


def test_the_length_still_ends_a_text(tiny_checkpoint: Path) -> None:
    endless = replace(constrained("regex", 0, max_tokens=7), grammar=spec("regex", "[ab]{20}"))
    outputs = run(make_engine(tiny_checkpoint), [Request("x", prompt(1, 4), endless)])["x"]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert re.fullmatch("[ab]{7,20}", text_of(outputs))


@BY_NAME
@pytest.mark.parametrize("keys", [{"ignore_eos": True}, {"min_tokens": 70}, {"ignore_eos": True, "min_tokens": 70}])
def test_a_complete_text_ends_whatever_else_is_asked(
    tiny_checkpoints: dict[Architecture, Path], name: str, keys: dict[str, Any]
) -> None:
    engine = make_engine(tiny_checkpoints["setting2"])
    outputs = run(engine, [Request(f"r{i}", prompt(i, 5), constrained(name, i, **keys)) for i in range(4)])
    for name_, output in outputs.items():
        if output[-1].finish_reason is FinishReason.STOP:
            assert VALID[name][1](text_of(output)), name_
        else:
            assert name == "json_object"


@BY_NAME
def test_a_model_without_an_end_of_text(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "m", tiny_config("setting2", eos_token_id=None))
    engine = make_engine(folder)
    outputs = run(engine, [Request(f"r{i}", prompt(i, 5), constrained(name, i)) for i in range(6)])
    stopped = [text_of(o) for o in outputs.values() if o[-1].finish_reason is FinishReason.STOP]
    assert len(stopped) >= 4 or name == "regex"  # é+/x has its end, [A-F0-9]{4} could go on
    for text in stopped:
        assert VALID[name][1](text), text


@pytest.mark.parametrize("eos", [END_OF_TEXT_ID, None])
def test_a_grammar_of_the_empty_text(tmp_path: Path, eos: int | None) -> None:
    engine = make_engine(write_checkpoint(tmp_path / "m", tiny_config("setting2", eos_token_id=eos)))
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, grammar=spec("grammar", 'start: ""'))
    (output,) = run(engine, [Request("x", prompt(1, 5), params)])["x"]
    assert (output.text, output.finish_reason) == ("", FinishReason.STOP)
    assert output.token_ids == ([] if eos is None else [eos])


def test_preemption_and_company_change_nothing(tiny_checkpoint: Path) -> None:
    def requests() -> list[Request]:
        params = [constrained(list(VALID)[i % len(VALID)], i, temperature=1.0) for i in range(8)]
        # an unconstrained one, and long ones that take the blocks
        params[7] = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        params[6] = replace(constrained("regex", 6, max_tokens=60), grammar=spec("regex", "[a-z ]{90}"))
        return [Request(f"r{i}", prompt(i, 14), p) for i, p in enumerate(params)]

    engine = make_engine(tiny_checkpoint)
    alone = {request.id: ids_of(run(engine, [request])[request.id]) for request in requests()}
    bytes_per_token = 2 * 2 * 4 * 32 * 4  # heads of 8 are padded to 32
    engine = make_engine(tiny_checkpoint, kv_cache_layout="full", kv_cache_memory=16 * 8 * bytes_per_token)
    outputs = run(engine, requests())
    assert engine.take_stats().preemptions > 0
    assert {name: ids_of(o) for name, o in outputs.items()} == alone


def test_log_probabilities_are_the_models_own(tiny_checkpoint: Path, architecture: Architecture) -> None:
    params = constrained("choice", 3, temperature=0, logprobs=0)
    free = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2)
    outputs = run(make_engine(tiny_checkpoint), [Request("x", prompt(1, 5), params), Request("y", prompt(1, 5), free)])
    assert all(o.logprobs.top_ids == [[]] for o in outputs["x"] if o.token_ids)
    assert [len(o.logprobs.top_ids[0]) for o in outputs["y"]] == [2] * 5
    model = random_model(tiny_config(architecture))
    ids = prompt(1, 5)
    for output in outputs["x"]:
        logits = model.logits(model(torch.tensor([ids]))[0, -1:])
        exact = float(logits[0].double().log_softmax(-1)[output.token_ids[0]])
        assert output.logprobs.logprobs == pytest.approx([exact], abs=1e-4)
        ids += output.token_ids


def test_a_late_mask_holds_nobody_up(tiny_checkpoint: Path) -> None:
    """The constrained request waits, alone and with its text unchanged, while the others go on."""

    def pair() -> list[Request]:
        free = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        return [Request("c", prompt(1, 9), constrained("regex", 5)), Request("f", prompt(2, 4), free)]

    expected = run(make_engine(tiny_checkpoint), pair())
    engine = make_engine(tiny_checkpoint)
    engine.compile_grammar(VALID["regex"][0])
    late = Late()
    engine.runner._mask_pool = late  # type: ignore[assignment]  # a stand-in
    for request in pair():
        engine.add_request(request)
    seen: dict[str, list[int]] = {"c": [], "f": []}
    for step in range(12):
        for output in engine.step():
            seen[output.request_id] += output.token_ids
        if step == 5:
            assert (len(seen["c"]), len(seen["f"])) == (0, 6)
        if step % 3 == 2 and step > 5:
            late.run()
    assert 0 < len(seen["c"]) <= 2 and len(seen["f"]) == 12
    engine.runner._mask_pool = ThreadPoolExecutor(1)
    late.run()
    for name, outputs in drain(engine).items():
        seen[name] += ids_of(outputs)
    assert seen == {name: ids_of(outputs) for name, outputs in expected.items()}


@pytest.mark.parametrize("length", [13, 16])  # in blocks of 8
def test_late_masks_of_choices_that_share_a_prompt(tiny_checkpoint: Path, length: int) -> None:
    def choices() -> list[Request]:
        first = Request("c0", prompt(1, length), constrained("choice", 5))
        others = [Request(f"c{i}", prompt(1, length), constrained("choice", 5), choice=i, leader=first) for i in (1, 2)]
        free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        return [first, *others, *(Request(f"f{i}", prompt(i, 4), free) for i in range(3))]  # not more than half late

    expected = run(make_engine(tiny_checkpoint), choices())
    assert all(text_of(expected[f"c{i}"]) in CHOICES for i in range(3))
    engine = make_engine(tiny_checkpoint)
    engine.compile_grammar(VALID["choice"][0])
    late = Late()
    engine.runner._mask_pool = late  # type: ignore[assignment]  # a stand-in
    for request in choices():
        engine.add_request(request)
    seen: dict[str, list[int]] = {name: [] for name in expected}
    for step in range(20):
        for output in engine.step():
            seen[output.request_id] += output.token_ids
        if step % 4 == 3:
            late.run()
    engine.runner._mask_pool = ThreadPoolExecutor(1)
    late.run()
    for name, outputs in drain(engine).items():
        seen[name] += ids_of(outputs)
    assert seen == {name: ids_of(outputs) for name, outputs in expected.items()}


def test_a_failing_matcher_fails_its_request_only(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny_checkpoint)
    limits = llguidance.LLParserLimits(max_items_in_row=25, verbose_errors=False)
    monkeypatch.setattr(grammar_source, "limits_of", lambda _: limits)  # here, and not where grammars are tried out
    # fine at first; after the x more ways are open than the limit has
    ways = " | ".join(f'"{c}" "z"' for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHI")
    spec_ = spec("grammar", f'start: "x" way\nway: {ways}')
    engine.runner.compiler.compile(spec_)
    params = SamplingParams(temperature=0, max_tokens=9, grammar=spec_)
    free = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    outputs = run(engine, [Request("bad", prompt(1, 5), params), Request("good", prompt(2, 5), free)])
    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
    assert outputs["bad"][-1].invalid_param == "response_format"
    assert str(outputs["bad"][-1].error).startswith("response_format: ")
    assert len(ids_of(outputs["good"])) == 9
