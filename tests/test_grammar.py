"""Grammars: what random models write under them is valid, and what cannot be compiled is refused with its place."""

from __future__ import annotations

import gc
import json
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import llguidance
import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers

from lpa_model.config import Architecture
from server.engine import grammar
from server.engine.grammar import GrammarCompiler, GrammarFailed, GrammarState
from server.engine.request import FinishReason, GrammarSpec, Request, RequestOutput, SamplingParams
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest
from tests.conftest import END_OF_TEXT_ID, byte_tokenizer, tiny_config, write_checkpoint
from tests.test_engine import drain, ids_of, make_engine, random_model, run

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]
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


def spec(kind: Kind, text: str = "", param: str = "response_format") -> GrammarSpec:
    return GrammarSpec(kind, text, param)


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
def test_a_complete_text_ends_whatever_else_is_asked(tiny_checkpoint: Path, name: str, keys: dict[str, Any]) -> None:
    outputs = run(
        make_engine(tiny_checkpoint), [Request(f"r{i}", prompt(i, 5), constrained(name, i, **keys)) for i in range(4)]
    )
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
    bytes_per_token = 2 * 2 * 32 * 4
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


class _Late(Executor):
    """A pool whose jobs run when they are told to."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, fn))
        return future

    def run(self) -> None:
        for future, fn in self.jobs:
            future.set_result(fn())
        self.jobs.clear()


def test_a_late_mask_holds_nobody_up(tiny_checkpoint: Path) -> None:
    """The constrained request waits, alone and with its text unchanged, while the others go on."""

    def pair() -> list[Request]:
        free = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        return [Request("c", prompt(1, 9), constrained("regex", 5)), Request("f", prompt(2, 4), free)]

    expected = run(make_engine(tiny_checkpoint), pair())
    engine = make_engine(tiny_checkpoint)
    late = _Late()
    engine.runner._mask_pool = late  # type: ignore[assignment]
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
    late = _Late()
    engine.runner._mask_pool = late  # type: ignore[assignment]
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
    monkeypatch.setattr(grammar, "LIMITS", llguidance.LLParserLimits(max_items_in_row=25, verbose_errors=False))
    # fine at first; after the x more ways are open than the limit has
    ways = " | ".join(f'"{c}" "z"' for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHI")
    spec_ = spec("grammar", f'start: "x" way\nway: {ways}')
    engine.runner.compiler.compile(spec_)
    params = SamplingParams(temperature=0, max_tokens=9, grammar=spec_)
    free = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    outputs = run(engine, [Request("bad", prompt(1, 5), params), Request("good", prompt(2, 5), free)])
    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
    assert "response_format" in str(outputs["bad"][-1].error)
    assert len(ids_of(outputs["good"])) == 9


def test_a_panic_in_a_mask_is_the_requests_own(compiler: GrammarCompiler) -> None:
    class Panic(BaseException):
        pass

    state = GrammarState(compiler, spec("regex", "a+"))
    job: Future[None] = Future()
    job.set_exception(Panic("index out of bounds"))
    state._job = job
    with pytest.raises(GrammarFailed, match="response_format: Panic: index out of bounds"):
        state.take()


@pytest.fixture
def compiler() -> GrammarCompiler:
    return GrammarCompiler(Tokenizer(byte_tokenizer(), tiny_config()))


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json_schema", '{"type": "object"', r"is not JSON: .*line 1 column 18"),
        ("json_schema", "[1]", "an object or a boolean"),
        ("json_schema", '{"type": "strin"}', "at the top: Invalid type: strin"),
        (
            "json_schema",
            {"properties": {"a": {"items": {"anyOf": [{"type": "null"}, {"type": "string", "format": "sea"}]}}}},
            "at /properties/a/items/anyOf/1: Unknown format: sea",
        ),
        ("json_schema", {"properties": {"a/b": {"uniqueItems": True}}}, "at /properties/a~1b: .*uniqueItems"),
        (
            "json_schema",
            {"$defs": {"x": {"not": {}}}, "properties": {"p": {"$ref": "#/$defs/x"}}},
            r"at /\$defs/x: .*not",
        ),
        (
            "json_schema",
            {"properties": {"p": {"$ref": "#/$defs/y"}}},
            r"at /properties/p: .*'/\$defs/y' does not exist",
        ),
        (
            "json_schema",
            {"properties": {"p": {"pattern": "a(b", "type": "string"}}},
            "at /properties/p: .*unclosed group",
        ),
        ("json_schema", {"minLength": 5, "maxLength": 2, "type": "string"}, "at the top: Unsatisfiable"),
        ("json_schema", "[" * 100000, "is not JSON"),
        ("regex", "ab(c", "unclosed group at character 3"),
        ("regex", r"\bsea", "lookarounds not supported"),
        ("regex", "a" * (grammar.MAX_TEXT + 1), f"at most {grammar.MAX_TEXT}"),
        ("choice", "[]", "at least one"),
        ("choice", '["a", ""]', "choice 1 is empty"),
        ("choice", '["a", 3]', "choice 1 is not a string"),
        ("choice", '"a"', "list of at least one"),
        ("grammar", 'start: "a" item', "line 1, column 8: unknown name"),
        ("grammar", 'start: "a"\nitem: "b" )', "line 2, column 11"),
        ("grammar", "root = x", "neither Lark .* nor GBNF: Expected ::="),
        ("grammar", "root ::= item", "nor GBNF: Rule 'item' not found"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_its_place(
    compiler: GrammarCompiler, kind: Kind, text: str | dict[str, Any], says: str
) -> None:
    whole = text if isinstance(text, str) else json.dumps(text)
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(spec(kind, whole, "response_format.json_schema"))
    assert re.match(f"response_format.json_schema: .*{says}", caught.value.message), caught.value.message
    assert caught.value.param == "response_format.json_schema"
    assert "\n" not in caught.value.message


def test_what_is_too_complex_is_refused(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "LIMITS", llguidance.LLParserLimits(max_lexer_states=20))
    compiler.compile(spec("regex", "[a-z]"))
    with pytest.raises(InvalidRequest, match=r"structured_outputs.regex: cannot be compiled: .*too many states"):
        compiler.compile(spec("regex", "robot|gull|shore|waves|thing", "structured_outputs.regex"))


def test_compiling_twice_is_compiling_once_and_old_grammars_go(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "CACHED_GRAMMARS", 3)
    for i in (0, 1, 2, 0, 3):
        compiler.compile(spec("regex", f"a{i}"))
    assert list(compiler._cache) == [("regex", "a2"), ("regex", "a0"), ("regex", "a3")]
    kept = compiler._cache["regex", "a0"]
    assert not kept.deep_copy().is_stopped()
    compiler.compile(spec("regex", "a0", "another field"))
    assert compiler._cache["regex", "a0"] is kept


def test_many_threads_compile_at_once(compiler: GrammarCompiler) -> None:
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            for i in range(20):
                matcher = compiler.matcher(spec("regex", f"[a-f]{{{1 + (number + i) % 7}}}"))
                assert not matcher.is_error()
                if i % 5 == 0:
                    with pytest.raises(InvalidRequest):
                        compiler.compile(spec("regex", "("))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def llama_tokenizer(eos: int | None) -> Tokenizer:
    """SentencePiece style: specials, 256 byte tokens, a few pieces; a space is put before every text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "é", "A", "ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return Tokenizer(backend, tiny_config(vocab_size=288, eos_token_id=eos))


class _Walk:
    """A grammar followed by hand."""

    def __init__(self, tokenizer: Tokenizer, what: GrammarSpec) -> None:
        self.state = GrammarState(GrammarCompiler(tokenizer), what)
        self.pool = _Late()

    def allowed(self) -> set[int] | None:
        job = self.state.start(self.pool)
        assert self.state.start(self.pool) is job
        self.pool.run()
        mask = self.state.take()
        return None if mask is None else {i for i in range(288) if mask[i // 8] >> i % 8 & 1}


@pytest.mark.parametrize("eos", [2, None])
def test_masks_are_exact_for_every_token(eos: int | None) -> None:
    """Against the definition, over all tokens: byte fallbacks, spaces, specials and unused ids."""
    tokenizer = llama_tokenizer(eos)
    texts = [" ab", "aé", "A", "abab"]
    walk = _Walk(tokenizer, spec("choice", json.dumps(texts)))

    def expected(before: bytes) -> set[int]:
        ends = [text.encode() for text in texts]
        fitting = {
            i
            for i in range(288)
            if i not in tokenizer.special_ids
            and (raw := tokenizer.token_bytes(i))
            and any(end.startswith(before + raw) for end in ends)
        }
        return fitting | ({eos} if eos is not None and before in ends else set())

    assert walk.allowed() == expected(b"")
    so_far = b""
    for byte in "aé".encode():
        complete = walk.state.advance(3 + byte)  # as a byte token
        so_far += bytes([byte])
        assert complete == (so_far == "aé".encode())
        if so_far == b"a":
            assert walk.allowed() == expected(so_far)
    assert walk.allowed() == (None if eos is None else {eos})


def test_forced_text_is_tokenized_as_in_the_middle_of_a_text() -> None:
    """Not with the space that this tokenizer puts before a text; and with the pieces that it would use."""
    tokenizer = llama_tokenizer(2)
    walk = _Walk(tokenizer, spec("regex", "abé"))
    written = b""
    while (allowed := walk.allowed()) != {2}:
        assert allowed is not None
        (token,) = allowed
        written += tokenizer.token_bytes(token)
        assert len(written) >= 2
        walk.state.advance(token)
    assert written.decode() == "abé"


def test_a_vocabulary_that_cannot_write_a_text_says_so() -> None:
    tokenizer = llama_tokenizer(2)
    for i in (3 + ord("q"), 3 + ord("r")):  # nothing spells a q or an r
        tokenizer._bytes[i] = b""
    walk = _Walk(tokenizer, spec("regex", "a?[qr]"))
    with pytest.raises(GrammarFailed, match=r"response_format: no token of the vocabulary"):
        for _ in range(2):
            allowed = walk.allowed()
            assert allowed == {3 + ord("a"), 260}
            walk.state.advance(260)
