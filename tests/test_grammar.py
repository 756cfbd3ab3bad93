"""Grammars compiled and followed: what is refused with its place, masks that are exact, what is kept."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, Literal

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from server.engine import grammar
from server.engine.grammar import GrammarCompiler, GrammarFailed, GrammarState
from server.engine.grammar_source import MAX_TEXT, source_of
from server.engine.grammar_workers import GrammarWorkers
from server.engine.request import GrammarSpec
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest
from tests.tiny import byte_tokenizer, tiny_config

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]


def spec(kind: Kind, text: str = "", param: str = "response_format") -> GrammarSpec:
    return GrammarSpec(kind, text, param)


class Late(Executor):
    """A pool whose jobs run when they are told to."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, functools.partial(fn, *args, **kwargs)))
        return future

    def run(self) -> None:
        for future, fn in self.jobs:
            try:
                future.set_result(fn())
            except Exception as error:
                future.set_exception(error)
        self.jobs.clear()


def test_a_panic_in_a_mask_is_the_requests_own(compiler: GrammarCompiler) -> None:
    class Panic(BaseException):
        pass

    state = GrammarState(compiler, spec("regex", "a+"))
    job: Future[None] = Future()
    job.set_exception(Panic("index out of bounds"))
    state._job = job
    with pytest.raises(GrammarFailed, match="response_format: Panic: index out of bounds"):
        state.take()


@pytest.fixture(scope="module")
def workers() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(Tokenizer(byte_tokenizer(), tiny_config()))
    yield compiler
    compiler.close()


@pytest.fixture
def compiler(workers: GrammarCompiler) -> GrammarCompiler:
    """With nothing in its cache; its processes are those of the other tests."""
    workers._cache.clear()
    workers._cached_bytes = 0
    return workers


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json_schema", '{"type": "object"', r"is not JSON: .*line 1 column 18"),
        ("json_schema", "[1]", "an object or a boolean"),
        ("json_schema", '{"type": "strin"}', "at the top: Invalid type: strin"),
        (
            "json_schema",
            {"properties": {"a": {"items": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "a("}]}}}},
            "at /properties/a/items/anyOf/1: ",
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
        ("regex", "a" * (MAX_TEXT + 1), f"at most {MAX_TEXT}"),
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


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (
            "grammar",
            "start: A\nA: /(a|b)*a(a|b){30}/ & /(a|b)*b(a|b){37}/ & /(a|b)*a(a|b){43}/",
            "too complex: .*too many",
        ),
        (
            "grammar",
            f"start: {'|'.join(f'r{i}' for i in range(2500))}\n"
            + "\n".join(f'r{i}: "a" r{i} "b"|"{i}"' for i in range(2500)),
            "row has .* items",
        ),
    ],
)
def test_what_is_too_complex_is_refused(compiler: GrammarCompiler, kind: Kind, text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^field: .*{says}"):
        compiler.compile(spec(kind, text, "field"))


def test_compiling_twice_is_compiling_once_and_old_grammars_go(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "CACHED_GRAMMARS", 3)
    tried: list[str] = []
    try_out = GrammarWorkers.try_out
    monkeypatch.setattr(GrammarWorkers, "try_out", lambda self, spec: tried.append(spec.text) or try_out(self, spec))
    for i in (0, 1, 2, 0, 3):
        compiler.compile(spec("regex", f"a{i}"))
    assert list(compiler._cache) == [("regex", "a2"), ("regex", "a0"), ("regex", "a3")]
    compiler.compile(spec("regex", "a0", "another field"))
    assert tried == ["a0", "a1", "a2", "a3"]
    for param in ("a field", "another"):  # a refusal is kept, too, and names the field that is at fault now
        with pytest.raises(InvalidRequest, match=f"^{param}: cannot be compiled: unclosed group"):
            compiler.compile(spec("regex", "(", param))
    assert tried == ["a0", "a1", "a2", "a3", "("]
    assert compiler.knows(spec("regex", "(")) and not compiler.knows(spec("regex", "a1"))


def test_what_is_kept_has_a_limit_in_bytes(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "CACHED_GRAMMAR_BYTES", 1000)
    monkeypatch.setattr(GrammarWorkers, "try_out", lambda _, spec: (source_of(spec), int(spec.text)))
    for size in ("400", "600", "1", "2000", "500", "400"):
        compiler.compile(spec("regex", size))
    assert [key[1] for key in compiler._cache] == ["500", "400"]
    assert compiler._cached_bytes == 900


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
        self.pool = Late()

    def allowed(self) -> set[int] | None:
        job = self.state.start(self.pool)
        assert self.state.start(self.pool) is job
        self.pool.run()
        mask = self.state.take()
        return None if mask is None else {i for i in range(288) if mask[i // 8] >> i % 8 & 1}

    def follow(self, token: int) -> bool:
        followed = self.state.advance(token, self.pool)
        self.pool.run()
        return followed.result()


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
        complete = walk.follow(3 + byte)  # as a byte token
        so_far += bytes([byte])
        assert complete == (so_far == "aé".encode())
        if so_far == b"a":
            assert walk.allowed() == expected(so_far)
    assert walk.allowed() is None


def test_forced_text_is_tokenized_as_in_the_middle_of_a_text() -> None:
    """Not with the space that this tokenizer puts before a text; and with the pieces that it would use."""
    tokenizer = llama_tokenizer(2)
    walk = _Walk(tokenizer, spec("regex", "abé"))
    written = b""
    while (allowed := walk.allowed()) is not None:
        (token,) = allowed
        written += tokenizer.token_bytes(token)
        assert len(written) >= 2
        walk.follow(token)
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
            walk.follow(260)
