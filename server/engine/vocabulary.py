"""What llguidance reads of a tokenizer. No torch: the grammar workers import this, too."""

from __future__ import annotations

import llguidance
import tokenizers

SENTINEL = "\x02"  # no token holds it together with other characters


class Vocabulary:
    """The bytes of every token, which are special, and how text that is forced would be tokenized. It can be pickled.

    A model without an end-of-text token gets one after its last token; `GrammarState.take` removes it.
    """

    bos_token_id = None

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        tokens: list[bytes],
        special_token_ids: list[int],
        eos_token_id: int | None,
    ) -> None:
        self._backend, self._model_size = backend, len(tokens)
        self.tokens = list(tokens)
        self.special_token_ids = sorted(special_token_ids)
        self.eos_token_id = len(tokens) if eos_token_id is None else eos_token_id
        if eos_token_id is None:
            self.tokens.append(b"<|end of text|>")
        if self.eos_token_id not in self.special_token_ids:
            self.special_token_ids.append(self.eos_token_id)

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text in the middle of another: a tokenizer may put a space before the first character of all."""
        ids: list[int] = self._backend.encode(SENTINEL + text, add_special_tokens=False).ids
        if max(ids, default=0) >= self._model_size:  # a token that the model lacks
            return self._longest_first(text.encode())
        while ids and not self.tokens[ids[0]].endswith(SENTINEL.encode()):
            ids = ids[1:]
        ids = ids[1:]
        # the text of a special token is text here: the token itself fits no grammar
        if set(self.special_token_ids).isdisjoint(ids) and b"".join(self.tokens[i] for i in ids) == text.encode():
            return ids
        return self._longest_first(text.encode())

    def _longest_first(self, raw: bytes) -> list[int]:
        """Tokens by their bytes alone, up to a byte that none begins with: for a tokenizer that rewrites text."""
        by_bytes = {token: i for i, token in enumerate(self.tokens) if token and i not in self.special_token_ids}
        longest = max(map(len, by_bytes))
        ids = []
        while raw:
            length = next((n for n in range(min(longest, len(raw)), 0, -1) if raw[:n] in by_bytes), 0)
            if not length:
                break
            ids.append(by_bytes[raw[:length]])
            raw = raw[length:]
        return ids

    def native(self) -> llguidance.LLTokenizer:
        """llguidance's own form."""
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(self))
