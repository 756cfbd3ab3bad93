"""POST /v1/perplexity."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import Field

from lpa_model.perplexity import Convention, Method, Tally
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
    add_bos: bool | None = Field(None, description="(default: the tokenizer's own setting).")


def perplexity_response(model: str, tallies: list[Tally], convention: Convention, prompt_tokens: int) -> dict[str, Any]:
    """The answer, which says which perplexity it is."""
    total = Tally()
    for tally in tallies:
        total.add_text(tally)
    return {
        "object": "perplexity",
        "model": model,
        **asdict(convention),
        "data": [{"index": i, **tally.metrics(convention.method)} for i, tally in enumerate(tallies)],
        "aggregate": total.metrics(convention.method),
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }
