"""Text to token ids and back, the bytes behind every token, and conversations to text."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from lpa_model import checkpoint
from lpa_model.config import LPAConfig
from server.engine.chat_template import (
    DEFAULT_STOP,
    DEFAULT_TEMPLATE,
    compile_template,
    read_template,
    render_chat,
    shows_tools,
    template_of,
)
from server.engine.generation_config import load_generation_config
from server.engine.tool_syntax import syntax_of
from server.errors import InvalidRequest

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PIECE = 1 << 18  # characters, about
WORD_END = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """A `tokenizers.Tokenizer` with the model's special tokens, chat template and a table of every token's bytes.

    Byte-level BPE (GPT-2's alphabet) and SentencePiece-style BPE with byte fallback (LLaMA) are supported: for
    these a token's bytes do not depend on its neighbours, so that text can be streamed byte by byte.

    `tokenizer_config` is the contents of tokenizer_config.json; `special_tokens` are the texts of its bos_token,
    eos_token and so on. Without a `chat_template` (Jinja source) there is the default for base models, under which
    an answer is to end before `chat_stop`.

    A text ends at any of `eos_token_ids`: the tokenizer's own `eos_token`, those of config.json, and those given here.
    `eos_token_id` is the first of them, or None, and stands for the end of a text where one has to be written.

    A tokenizer may know more tokens than the model: `check` refuses those where they are used.

    Raises:
        ValueError: the tokenizer is of another kind, or the template is no Jinja.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: LPAConfig,
        *,
        tokenizer_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.backend = backend
        self.vocab_size = config.vocab_size
        self.bos_token_id = config.bos_token_id
        self.tokenizer_config = dict(tokenizer_config or {})
        self.special_tokens = _special_tokens(self.tokenizer_config, backend, config)
        named = backend.token_to_id(self.special_tokens["eos_token"]) if "eos_token" in self.special_tokens else None
        ends = dict.fromkeys(i for i in (named, *config.eos_token_ids, *eos_token_ids) if i is not None)
        if lacking := [i for i in ends if i >= config.vocab_size]:
            logger.warning(
                "EOS tokens %s are beyond the model's %d tokens: it never gives them", lacking, config.vocab_size
            )
        self.eos_token_ids = tuple(i for i in ends if i < config.vocab_size)
        self.eos_token_id = next(iter(self.eos_token_ids), None)
        self.has_chat_template = chat_template is not None
        self.chat_template = DEFAULT_TEMPLATE if chat_template is None else chat_template
        self.chat_stop = DEFAULT_STOP if chat_template is None else ()
        compile_template(self.chat_template)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_by_name = {added[i].content: i for i in self.special_ids if i < config.vocab_size}
        self.call_syntax = syntax_of(self.chat_template)
        self.shows_tools = shows_tools(self.chat_template)
        description = json.loads(backend.to_str())
        if _spare_spaces(description["post_processor"]):
            self.backend = tokenizers.Tokenizer.from_str(json.dumps(description))
        self.hash = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        self.drops_first_space = _drops_first_space(description["decoder"])
        self._words_are_apart = _words_are_apart(description)
        to_bytes = _token_to_bytes(description["decoder"])
        self._bytes = [b""] * config.vocab_size
        self._lacking: dict[int, str] = {}  # tokens that were added to the tokenizer and never to the model
        for token, token_id in backend.get_vocab().items():
            if token_id < config.vocab_size:
                self._bytes[token_id] = token.encode() if token_id in added else to_bytes(token)
            else:
                self._lacking[token_id] = token

    @cached_property
    def word_beginnings(self) -> NDArray[np.int64]:
        """The tokens that begin with a space, ascending, but for those that were added to the vocabulary."""
        added = self.backend.get_added_tokens_decoder()
        return np.array([i for i, raw in enumerate(self._bytes) if raw.startswith(b" ") and i not in added], np.int64)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written out in the text become their ids.

        Other threads run meanwhile. A long text is tokenized in pieces where that gives the same ids.
        """
        ids: list[int] = []
        for piece in self._pieces(text):
            # a batch of one, since encode() would hold the GIL
            (encoding,) = self.backend.encode_batch_fast([piece], add_special_tokens=add_special_tokens)
            ids += encoding.ids
        return ids

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """Token ids as `encode` gives them, and for each the character of `text` at which it begins.

        Tokens that share a character begin at it, and so does what a normalizer makes of it. A token that the
        tokenizer adds begins where the text before it has ended.
        """
        ids: list[int] = []
        offsets: list[int] = []
        start = end = 0
        for piece in self._pieces(text):
            (encoding,) = self.backend.encode_batch([piece], add_special_tokens=add_special_tokens)
            ids += encoding.ids
            for (first, last), added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
                offsets.append(end if added else start + first)
                end = end if added else start + last
            start += len(piece)
        return ids, offsets

    def check(self, ids: Sequence[int], where: str) -> None:
        """Refuse tokens that the model has not, be it that the tokenizer has them.

        Raises:
            InvalidRequest: there is one; the message names it, and `where` it is.
        """
        token_id = self._first_foreign(ids)
        if token_id is None:
            return
        if token_id in self._lacking:
            raise InvalidRequest(
                f"{where}: the text has the token {self._lacking[token_id]!r}, whose id {token_id} the model lacks: "
                f"its vocabulary is {self.vocab_size}",
                param=where,
            )
        raise InvalidRequest(
            f"{where}: token id {token_id} is outside the vocabulary of {self.vocab_size}", param=where
        )

    def _first_foreign(self, ids: Sequence[int]) -> int | None:
        """The first id that is not the model's. Other threads run between the parts."""
        for start in range(0, len(ids), PIECE):
            part = ids[start : start + PIECE]
            if min(part) < 0 or max(part) >= self.vocab_size:
                return next(i for i in part if not 0 <= i < self.vocab_size)
        return None

    def _pieces(self, text: str) -> Iterator[str]:
        """The library needs some 150 bytes for each character at a time."""
        start, at = 0, PIECE
        while self._words_are_apart and at < len(text):
            # other threads run between the searches; a match may look at one character more
            if cut := WORD_END.search(text, at, at + PIECE + 1):
                yield text[start : cut.start()]
                start = cut.start()
                at = start
            at += PIECE
        yield text[start:]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; bytes that are no character become U+FFFD, one for each attempt at a character.

        The space that SentencePiece puts before the first word is left out.
        """
        silent = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join(self._bytes[i] for i in ids if i not in silent).decode(errors="replace")
        return text.removeprefix(" ") if self.drops_first_space else text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as `chat_template.render_chat` writes it, with this model's template and special tokens.

        Encode it with add_special_tokens=False: a template that wants a BOS writes one.
        """
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            special_tokens=self.special_tokens,
            tools=tools,
            kwargs=kwargs,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        r"""The text of one token, or OpenAI's `bytes:\xf0\x9f` form where its bytes alone are not UTF-8."""
        raw = self._bytes[token_id]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def load_tokenizer(folder: Path, config: LPAConfig, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder; `chat_template`, a file's path or a template, replaces the folder's.

    Raises:
        CheckpointError, ValueError: a file is broken, or not of a supported kind; the message names it.
    """
    tokenizer_config = checkpoint.load_tokenizer_config(folder)
    if chat_template is not None:
        template: str | None = read_template(chat_template)
    else:
        file = folder / "chat_template.jinja"
        template = template_of(tokenizer_config, read_template(str(file)) if file.is_file() else None)
    backend = checkpoint.load_tokenizer(folder)
    return Tokenizer(
        backend,
        config,
        tokenizer_config=tokenizer_config,
        chat_template=template,
        eos_token_ids=load_generation_config(folder).eos_token_ids,
    )


def _special_tokens(
    tokenizer_config: Mapping[str, Any], backend: tokenizers.Tokenizer, config: LPAConfig
) -> dict[str, str]:
    """Texts by name; BOS and EOS come from config.json where tokenizer_config.json has none."""
    found: dict[str, str] = {}
    ids = {"bos_token": config.bos_token_id, "eos_token": next(iter(config.eos_token_ids), None)}
    for name in SPECIAL_TOKENS:
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None and (token_id := ids.get(name)) is not None:
            text = backend.id_to_token(token_id)
        if isinstance(text, str):
            found[name] = text
    return found


def _words_are_apart(description: Mapping[str, Any]) -> bool:
    """Whether a text may be cut between a word and the space after it: it is split there before anything else.

    Known of GPT-2's pre-tokenizer, with nothing around it that looks further.
    """
    splits = description["pre_tokenizer"] or {}
    return (
        (splits.get("type"), splits.get("use_regex"), splits.get("add_prefix_space")) == ("ByteLevel", True, False)
        and description["normalizer"] is None
        and (description["post_processor"] or {"type": "ByteLevel"})["type"] == "ByteLevel"
        and not any(
            " " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
            for token in description["added_tokens"]
        )
    )


def _spare_spaces(processor: Any) -> bool:
    """Switch off `trim_offsets`, after which a token would begin behind its own spaces; whether it was on."""
    found = False
    for part in _parts(processor, "processors"):
        if part.get("trim_offsets"):
            part["trim_offsets"], found = False, True
    return found


def _drops_first_space(decoder: Any) -> bool:
    return any(
        (part["type"] == "Strip" and part["content"] == " " and part["start"] > 0)
        or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in _parts(decoder, "decoders")
    )


def _parts(part: Any, key: str) -> list[Any]:
    """The parts of a Sequence, which are under `key`, or the part itself; none for null."""
    if part is None:
        return []
    return [inner for one in part[key] for inner in _parts(one, key)] if part["type"] == "Sequence" else [part]


def _token_to_bytes(decoder: dict[str, Any] | None) -> Any:
    kinds = {part["type"] for part in _parts(decoder, "decoders")}
    if "ByteLevel" in kinds:
        table = _byte_level_alphabet()

        def byte_level(token: str) -> bytes:
            try:
                return bytes([table[character] for character in token])
            except KeyError:
                return token.encode()  # as the library decodes what is not in the alphabet

        return byte_level
    if "ByteFallback" in kinds or "Metaspace" in kinds:

        def sentencepiece(token: str) -> bytes:
            byte = BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()

        return sentencepiece
    raise ValueError(
        f"tokenizer.json: decoder {sorted(kinds) or None} is not supported (ByteLevel, or Metaspace or ByteFallback)"
    )


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
