"""What a process of the tests is made to do before its command runs: to be slow where a signal comes, or to break."""

from __future__ import annotations

import time
from typing import Any

import server.engine.engine as engine
from server.engine.model_runner import ModelRunner
from server.engine.tokenizer import Tokenizer

LONG = 300  # seconds; nothing waits for it
HUGE = 20_000  # characters


def slow_steps() -> None:
    run = ModelRunner.run

    def slow(self: ModelRunner, *arguments: Any) -> Any:
        time.sleep(0.3)
        return run(self, *arguments)

    ModelRunner.run = slow  # type: ignore[method-assign]


def broken_steps() -> None:
    def broken(self: ModelRunner, *_: Any) -> Any:
        raise RuntimeError("no more")

    ModelRunner.run = broken  # type: ignore[method-assign]


def slow_huge_texts() -> None:
    encode = Tokenizer.encode

    def slow(self: Tokenizer, text: str, **options: Any) -> Any:
        if len(text) > HUGE:
            print("tokenizing", flush=True)
            time.sleep(LONG)
        return encode(self, text, **options)

    Tokenizer.encode = slow  # type: ignore[method-assign]


def slow_loading() -> None:
    def load(*_: Any) -> Any:
        print("loading", flush=True)
        time.sleep(LONG)

    engine._build_engine = load
