"""A short hash of scores, by which others with the same model and backend can check them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from lpa_model.perplexity import Convention
from server.engine.fingerprint import Identity

DIGITS = 16


class Digest:
    """SHA-256, of which 16 hexadecimal digits are shown. What is hashed, in this order:

    1. a line of JSON with sorted names, no blanks and a line feed: `backend`, `convention` (method, max_length, stride,
       add_bos, prefix_token_id), `tokenizer` and `weights`;
    2. of each text in turn: the number of its tokens (uint64), their ids (uint32), and the log-probabilities of those
       that were scored (float32); all little-endian.
    """

    def __init__(self, identity: Identity, convention: Convention) -> None:
        header = {**identity._asdict(), "convention": asdict(convention)}
        self._hash = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode() + b"\n")

    def add(self, token_ids: Sequence[int] | None, logprobs: Sequence[float]) -> None:
        """The scores of a text's next piece; with its token ids if it is the first piece."""
        if token_ids is not None:
            self._hash.update(np.array([len(token_ids)], "<u8").tobytes())
            self._hash.update(np.asarray(token_ids).astype("<u4").tobytes())
        self._hash.update(np.array(logprobs, "<f4").tobytes())

    def digits(self) -> str:
        """The hash of all that was added."""
        return self._hash.hexdigest()[:DIGITS]
