"""POST /v1/perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from lpa_model.perplexity import Method, perplexity
from server.protocol.body import RequestBody
from server.protocol.inputs import Inputs


class PerplexityRequest(RequestBody):
    """How well the model predicts each text: its negative log-likelihood in nats, and exp of its mean per token."""

    model: str = Field(description="Name of the model.", examples=["lpa-tiny"])
    input: Inputs = Field(
        description="A text, a list of texts, a list of token ids or a list of lists; at least two tokens each.",
        examples=["Once upon a time there was a little robot."],
    )
    method: Method = Field(
        "full",
        description="full: one window, an error if the text does not fit. sliding: windows of max_length tokens that "
        "begin stride tokens after one another; every token is scored once.",
    )
    max_length: int | None = Field(
        None, ge=2, description="Tokens of a window, context included (default: the model's context)."
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="Tokens between the beginnings of sliding windows, below max_length (default: half of it).",
    )


@dataclass(frozen=True)
class TextScore:
    """The sum of the negative log-likelihoods of `num_tokens` scored tokens, in nats."""

    nll_sum: float
    num_tokens: int


def perplexity_response(model: str, scores: list[TextScore], prompt_tokens: int) -> dict[str, Any]:
    """The answer; `aggregate` is weighted by tokens."""
    total = TextScore(math.fsum(score.nll_sum for score in scores), sum(score.num_tokens for score in scores))
    return {
        "object": "perplexity",
        "model": model,
        "data": [{"index": i, **_fields(score)} for i, score in enumerate(scores)],
        "aggregate": _fields(total),
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def _fields(score: TextScore) -> dict[str, Any]:
    value = perplexity(score.nll_sum, score.num_tokens)
    return {
        "nll_sum": score.nll_sum,
        "num_tokens": score.num_tokens,
        "perplexity": value if math.isfinite(value) else None,  # JSON has no infinity
    }
