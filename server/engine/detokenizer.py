"""Incremental text of one sequence: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from server.engine.tokenizer import Tokenizer

LONGEST_CHARACTER = 4  # bytes of UTF-8


def unfinished_bytes(tokenizer: Tokenizer, token_ids: Sequence[int]) -> bytes:
    """The bytes at the end of a prompt that begin a character and do not finish it; a special token ends characters."""
    raw = b""
    for token_id in reversed(token_ids):
        if token_id in tokenizer.special_ids or len(raw) >= LONGEST_CHARACTER:
            break
        raw = tokenizer.token_bytes(token_id) + raw
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(raw)
    return decoder.getstate()[0]


class Detokenizer:
    """Feed it token ids, take the text that is certain.

    Bytes of an unfinished character are held back, and so is the longest end of the text that could begin a stop
    string. When a stop string is complete, `stopped` names it and the text ends before it, or with it if
    `include_stop`.

    Args:
        prefix: bytes of a character that the prompt began (`unfinished_bytes`); the text begins with that character.
        min_tokens: stop strings do not count during so many tokens.
        skip_special: special tokens are silent; one whose name is a stop string ends the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        min_tokens: int = 0,
        *,
        include_stop: bool = False,
        skip_special: bool = True,
        prefix: bytes = b"",
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._silent = tokenizer.special_ids if skip_special else frozenset()
        self._unstoppable = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(prefix)
        self._held = ""
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """The text that this token makes certain."""
        self._unstoppable -= 1
        if token_id in self._silent:
            name = self._tokenizer.token_text(token_id)
            return self._stop_at(name) if name in self._stop and self._unstoppable < 0 else ""
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def _stop_at(self, name: str) -> str:
        """A special token that has no text ends it all the same where its name is a stop string."""
        text = self.finish()
        if self.stopped is None:
            self.stopped = name
            text += name if self._include_stop else ""
        return text

    def finish(self) -> str:
        """The text that was held back; an unfinished character becomes U+FFFD. Nothing after a stop string."""
        if self.stopped is not None:
            return ""
        text = self._release(self._decoder.decode(b"", True)) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        stops = self._stop if self._unstoppable < 0 else ()
        if not stops and not self._held:
            return new
        self._held += new
        found = [(at, stop) for stop in stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found)
            text, self._held = self._held[: at + len(self.stopped) if self._include_stop else at], ""
            return text
        cut = len(self._held) - max((_overlap(self._held, stop) for stop in stops), default=0)
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
