"""Calls out of a text that follows a grammar of `tool_grammar`, piece by piece. The grammar gives the text its form, so
this only finds where its parts end."""

from __future__ import annotations

import re
from dataclasses import dataclass

from server.engine.tool_syntax import CallSyntax

NAME_END = re.compile(r"[^a-zA-Z0-9_-]")
MARKS = re.compile(r'["\\{}]')


@dataclass
class Call:
    """A call as far as it has been generated."""

    id: str
    name: str
    arguments: str = ""  # JSON


@dataclass
class CallDelta:
    """What a piece of text adds to a call; `name` with the first one only."""

    index: int
    name: str | None
    arguments: str


class ToolReader:
    """Feed it text, take what is certain: content, and parts of calls.

    `content` is all text outside of calls, `calls` are all calls whose names are complete, and `complete` says whether
    the last one has come to its end. White space before a call is dropped.
    """

    def __init__(self, syntax: CallSyntax) -> None:
        self._syntax = syntax
        self._held = ""
        self._state = "text"
        self._depth = 0
        self._quoted = self._escaped = False
        self.content = ""
        self.calls: list[Call] = []
        self.complete = False

    def feed(self, text: str, *, last: bool = False) -> tuple[str, list[CallDelta]]:
        """Content and parts of calls that `text` adds; what could become a call is held back until the `last` text."""
        self._held += text
        content = ""
        deltas: list[CallDelta] = []
        while self._held:
            if self._state == "text":
                content += self._take_text(last)
                if self._state == "text":
                    break
            elif self._state == "name":
                if (end := NAME_END.search(self._held)) is None:
                    break
                self.calls.append(Call(self._syntax.new_id(), self._held[: end.start()]))
                self._held = self._held[end.start() :]
                deltas.append(CallDelta(len(self.calls) - 1, self.calls[-1].name, ""))
                self._state = "middle"
            elif self._state == "middle":
                if not self._skip(self._syntax.middle):
                    break
                self._state = "arguments"
            elif self._state == "arguments":
                arguments, index = self._take_arguments(), len(self.calls) - 1
                self.calls[-1].arguments += arguments
                if deltas and deltas[-1].index == index:
                    deltas[-1].arguments += arguments
                else:
                    deltas.append(CallDelta(index, None, arguments))
            else:
                if not self._skip(self._syntax.between):
                    break
                self.complete = False
                self._state = "name"
        if self._state == "between":
            self.complete = self._held == self._syntax.end
        self.content += content
        return content, deltas

    def _skip(self, literal: str) -> bool:
        if not self._held.startswith(literal):
            return False
        self._held = self._held[len(literal) :]
        return True

    def _take_text(self, last: bool) -> str:
        """Text that belongs to no call; changes the state where one begins."""
        begin = self._syntax.begin
        if self._syntax.after_text:
            at = self._held.find(begin)
        else:
            self._held = self._held.removeprefix(self._syntax.prefix) if not self.content else self._held
            at = 0 if not self.content and self._held.startswith(begin) else -1
        if at >= 0:
            text, self._held = self._held[:at].rstrip(), self._held[at + len(begin) :]
            self._state = "name"
            return text
        keep = 0 if last else self._undecided()
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _undecided(self) -> int:
        """Length of the end of the text that may be the beginning of a call, with white space before it."""
        begin, held = self._syntax.begin, self._held
        if not self._syntax.after_text:
            starts = (begin, self._syntax.prefix)
            return len(held) if not self.content and any(start.startswith(held) for start in starts) else 0
        overlap = next((n for n in range(min(len(begin) - 1, len(held)), 0, -1) if held.endswith(begin[:n])), 0)
        before = held[: len(held) - overlap]
        return overlap + len(before) - len(before.rstrip())

    def _take_arguments(self) -> str:
        """Of the text, what belongs to the JSON object; changes the state at its end."""
        at = int(self._escaped)
        self._escaped = False
        while (found := MARKS.search(self._held, at)) is not None:
            mark, at = found[0], found.end()
            if self._quoted:
                if mark == "\\":
                    self._escaped = at == len(self._held)
                    at += 1
                elif mark == '"':
                    self._quoted = False
            elif mark == '"':
                self._quoted = True
            else:
                self._depth += 1 if mark == "{" else -1
                if not self._depth:
                    self._state = "between"
                    break
        else:
            at = len(self._held)
        taken, self._held = self._held[:at], self._held[at:]
        return taken
