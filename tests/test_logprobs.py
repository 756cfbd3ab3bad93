"""Log-probabilities in the forms of the API: nothing is lost, and JSON has every number."""

from __future__ import annotations

import math

from server.engine.request import Logprobs
from server.engine.tokenizer import Tokenizer as EngineTokenizer
from server.protocol.logprobs import columns, prompt_columns
from tests.tiny import VOCAB_SIZE, byte_tokenizer, tiny_config


def test_two_tokens_with_one_text_do_not_lose_the_better() -> None:
    # the model has two more tokens than the tokenizer: both have the empty text
    tokenizer = EngineTokenizer(byte_tokenizer(), tiny_config(vocab_size=VOCAB_SIZE + 2))
    first, second = VOCAB_SIZE, VOCAB_SIZE + 1
    scores = Logprobs([-2.0], [2], [[second, first]], [[-1.0, -2.0]])
    (top,) = columns(tokenizer.token_text, [first], scores, [0], 2)["top_logprobs"]
    assert top == {"": -1.0, f"token_id:{first}": -2.0}


def test_infinite_and_missing_numbers_become_openais() -> None:
    tokenizer = EngineTokenizer(byte_tokenizer(), tiny_config())
    scores = Logprobs([-math.inf, math.nan], [1, 1], [[5], [6]], [[-0.5], [math.nan]])
    found = prompt_columns(tokenizer.token_text, [7, 8, 9], [0, 1, 2], scores, 1)
    assert found["token_logprobs"] == [None, -9999.0, -9999.0]
    assert set(found["top_logprobs"][2].values()) == {-9999.0}
