"""Grammars that crash, hang or take memory cost a process of their own and end as errors that say so."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lpa_model.config import Architecture
from server.engine.grammar_workers import GrammarWorkers
from server.engine.request import GrammarSpec
from server.engine.vocabulary import Vocabulary
from server.errors import EngineError, InvalidRequest, Unavailable
from tests.serving import serving, until
from tests.tiny import byte_tokenizer

OVERFLOWS = '{"const": -9223372036854775807}'
CRASHES = GrammarSpec("grammar", f"start: %json {OVERFLOWS}", "grammar")  # a stack overflow inside llguidance 1.9
MANY_NAMES = json.dumps({"type": "object", "properties": {f"name {i}": {"type": "string"} for i in range(3000)}})


def vocabulary() -> Vocabulary:
    tokens = [b"<|endoftext|>", *(bytes([byte]) for byte in range(256))]
    return Vocabulary(byte_tokenizer(), tokens, [0], 0)


def schema(text: str) -> GrammarSpec:
    return GrammarSpec("json_schema", text, "response_format")


@pytest.fixture(scope="module")
def workers() -> Iterator[GrammarWorkers]:
    workers = GrammarWorkers(vocabulary())
    yield workers
    workers.close()


def refusal(workers: GrammarWorkers, spec: GrammarSpec) -> str:
    with pytest.raises(InvalidRequest) as refused:
        workers.try_out(spec)
    assert refused.value.param == spec.param
    return refused.value.message


def test_a_crash_is_a_refusal_and_the_next_grammar_is_compiled(workers: GrammarWorkers) -> None:
    workers.try_out(schema("{}"))
    pid = workers.pid
    for _ in range(2):
        assert refusal(workers, CRASHES) == "grammar: cannot be compiled: the compiler crashes on it"
    assert workers.try_out(schema('{"const": -9007199254740991}'))[0]
    assert workers.pid == pid


def test_what_takes_too_long_is_ended(workers: GrammarWorkers) -> None:
    assert workers.try_out(schema(MANY_NAMES))[1] > 1 << 20
    hasty = GrammarWorkers(vocabulary(), seconds=0.05)
    assert refusal(hasty, schema(MANY_NAMES)).endswith(
        "cannot be compiled: it takes more than 0.05 seconds of processor time"
    )
    hasty.close()


def test_what_a_busy_machine_does_not_get_done_may_be_tried_again() -> None:
    busy = GrammarWorkers(vocabulary(), patience=0.05)
    with pytest.raises(Unavailable, match=r"response_format: is not compiled after 0\.05 seconds"):
        busy.try_out(schema(MANY_NAMES))
    busy.close()


def test_what_takes_too_much_memory_is_ended() -> None:
    poor = GrammarWorkers(vocabulary(), memory=12 << 20)
    assert "it takes more than 12 MiB of memory" in refusal(poor, schema(MANY_NAMES))
    assert poor.try_out(GrammarSpec("regex", "a", "x"))
    poor.close()


def test_a_slow_grammar_holds_no_other_one_up(workers: GrammarWorkers) -> None:
    done: list[str] = []

    def compile_(name: str, spec: GrammarSpec) -> None:
        workers.try_out(spec)
        done.append(name)

    slow = threading.Thread(target=compile_, args=("slow", schema(MANY_NAMES)))
    slow.start()
    for i in range(3):
        compile_("quick", GrammarSpec("regex", f"a{i}", "x"))
    slow.join()
    assert done[0] == "quick"


def test_a_forker_that_was_killed_is_started_again_and_closing_ends_it() -> None:
    workers = GrammarWorkers(vocabulary())
    workers.try_out(schema("{}"))
    first = workers.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    workers.try_out(schema("{}"))
    second = workers.pid
    assert second not in (None, first)
    workers.close()
    for pid in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(EngineError):
        workers.try_out(schema("{}"))


def test_closing_ends_grammars_in_progress() -> None:
    workers = GrammarWorkers(vocabulary())
    workers.try_out(schema("{}"))
    ended: list[BaseException] = []

    def compile_() -> None:
        try:
            workers.try_out(schema(MANY_NAMES))
        except EngineError as error:
            ended.append(error)

    thread = threading.Thread(target=compile_)
    thread.start()
    until(lambda: len(children_of(workers.pid)) > 0)
    workers.close()
    thread.join(600)
    assert len(ended) == 1


def children_of(pid: int | None) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_forked_workers_leave_nothing_behind(workers: GrammarWorkers) -> None:
    for spec in (schema("{}"), CRASHES, schema('{"type": "x"}')):
        with suppress(InvalidRequest):
            workers.try_out(spec)
    until(lambda: children_of(workers.pid) == [])


def test_the_server_lives_on_and_its_processes_end_with_it(tiny_checkpoints: dict[Architecture, Path]) -> None:
    def ask(**body: Any) -> Any:
        return served.post("/v1/completions", prompt="x", max_tokens=4, **body)

    with serving(tiny_checkpoints["setting2"]) as served:
        began = time.monotonic()
        for kind, source in (("json", json.loads(OVERFLOWS)), ("grammar", CRASHES.text), ("grammar", CRASHES.text)):
            answer = ask(structured_outputs={kind: source})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == f"structured_outputs.{kind}"
        text = ask(structured_outputs={"regex": "[a-c]{2}"}).json()["choices"][0]["text"]
        assert len(text) == 2 and set(text) <= set("abc")
        tools = served.engine.runner.compiler._tools
        assert tools is not None
        pid = tools[0].pid
        assert pid is not None and time.monotonic() > began
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_forker_finds_the_package_however_it_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable installation may be no folder in sys.path, but a hook of `site`."""
    root = str(Path(__file__).parent.parent)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry not in ("", root)])
    workers = GrammarWorkers(vocabulary())
    try:
        assert workers.try_out(schema("{}"))[0]
    finally:
        workers.close()
