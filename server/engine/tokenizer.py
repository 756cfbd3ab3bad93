"""Text to token ids and back, and the bytes behind every token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers

from lpa_model.config import LPAConfig

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """A `tokenizers.Tokenizer` with the model's special tokens and a table of every token's bytes.

    Byte-level BPE (GPT-2's alphabet) and SentencePiece-style BPE with byte fallback (LLaMA) are supported: for
    these a token's bytes do not depend on its neighbours, so that text can be streamed byte by byte.

    Raises:
        ValueError: the tokenizer is of another kind, or knows more tokens than the model has logits.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: LPAConfig) -> None:
        self.backend = backend
        self.vocab_size = config.vocab_size
        self.bos_token_id = config.bos_token_id
        self.eos_token_id = config.eos_token_id
        if backend.get_vocab_size() > config.vocab_size:
            raise ValueError(
                f"tokenizer.json has {backend.get_vocab_size()} tokens, the model's vocab_size is {config.vocab_size}"
            )
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        to_bytes = _token_to_bytes(json.loads(backend.to_str())["decoder"])
        self._bytes = [b""] * config.vocab_size
        for token, token_id in backend.get_vocab().items():
            self._bytes[token_id] = token.encode() if token_id in added else to_bytes(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written out in the text become their ids. Releases the GIL."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence, as the tokenizer itself writes it; half characters become U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

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


def _token_to_bytes(decoder: dict[str, Any] | None) -> Any:
    parts = [decoder] if decoder and decoder["type"] != "Sequence" else (decoder or {}).get("decoders", [])
    kinds = {part["type"] for part in parts if part}
    if "ByteLevel" in kinds:
        table = _byte_level_alphabet()
        return lambda token: bytes(table[character] for character in token)
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
