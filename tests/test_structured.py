"""Structured output over HTTP: what the official client asks for, and grammars that cannot be compiled."""

from __future__ import annotations

import datetime
import enum
import json
import re
import uuid
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal

import openai
import pytest
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel, ConfigDict, Field

from server.engine.schema_forms import DECIMAL
from tests.serving import Served, serving
from tests.tiny import byte_tokenizer, tiny_config, write_checkpoint

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["calm", "stormy"]}, "waves": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["mood", "waves"],
    "additionalProperties": False,
}


class Kind(enum.Enum):
    """Of a wave."""

    SWELL = "swell"
    CHOP = "chop"


class Sea(BaseModel):
    """What the client parses an answer into."""

    model_config = ConfigDict(extra="forbid")

    mood: Literal["calm", "stormy"]
    waves: int


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_checkpoint(tmp_path_factory.mktemp("long") / "tiny", tiny_config(max_position_embeddings=1024))
    with serving(folder) as server:
        yield server


def formatted(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "sea", "schema": schema, "strict": True}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_follows_a_schema(served: Served, stream: bool) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        for seed in range(3):
            settings: dict[str, Any] = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "How is the sea?"}],
                "max_completion_tokens": 90,
                "seed": seed,
            }
            if stream:
                chunks = client.chat.completions.create(**settings, response_format=formatted(SCHEMA), stream=True)
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                assert Sea.model_validate_json(text).waves <= 99
            else:
                parsed = client.chat.completions.parse(**settings, response_format=Sea)
                assert isinstance(parsed.choices[0].message.parsed, Sea)
                assert parsed.choices[0].finish_reason == "stop"


NUMBER = r"^-?[0-9]{1,9}(\.[0-9]{1,4})?$"  # Pydantic 2.14 gives the text of a Decimal no pattern of its own


class Wave(BaseModel):
    """Inside of Deep."""

    height: Annotated[Decimal, Field(json_schema_extra={"pattern": NUMBER})]
    kind: Kind


class Deep(BaseModel):
    """The types that people give to the client's helper."""

    lasted: datetime.timedelta
    mood: Literal["calm", "stormy"]
    level: float
    count: int
    name: Annotated[str, Field(max_length=4)]
    wind: Annotated[str, Field(pattern="^[NESW]{1,2}$")] | None
    id: uuid.UUID
    waves: Annotated[list[Wave], Field(max_length=2)]
    pair: tuple[int, bool]


def test_the_clients_helper_parses_its_types(served: Served) -> None:
    schema = to_strict_json_schema(Deep)
    parsed = 0
    for seed in range(4):
        answer = served.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "How?"}],
            response_format=formatted(schema),
            max_tokens=900,
            seed=seed,
        ).json()["choices"][0]
        if answer["finish_reason"] == "stop":
            deep = Deep.model_validate_json(answer["message"]["content"])
            assert len(str(abs(deep.count))) <= 16 and set(json.loads(answer["message"]["content"])) == set(
                Deep.model_fields
            )
            parsed += 1
    assert parsed


@pytest.mark.parametrize("inside", [False, True])
def test_a_decimal_comes_as_a_number_and_as_a_text(served: Served, inside: bool) -> None:
    """With the pattern beside both, or inside of the text's, as Pydantic before 2.14 had it."""
    schema = to_strict_json_schema(Wave)
    if inside:
        height = schema["properties"]["height"]
        del height["pattern"]
        height["anyOf"] = [{"type": "number"}, {"type": "string", "pattern": rf"{DECIMAL}\d*\.?\d*$"}]
    answer = served.answer(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "How?"}],
        response_format=formatted(schema),
        max_tokens=120,
        n=24,
        seed=1,
        logit_bias={str(byte_tokenizer().token_to_id('"')): 4},  # a random model hardly ever begins a text
    )
    ended = [c["message"]["content"] for c in answer["choices"] if c["finish_reason"] == "stop"]
    waves = [Wave.model_validate_json(text) for text in ended]
    assert {type(json.loads(text)["height"]) is str for text in ended} == {True, False} and all(waves)


def test_a_strict_schema_is_closed_whatever_the_seed(served: Served) -> None:
    schema = {"type": "object", "properties": {"waves": {"type": "integer"}, "mood": {"enum": ["calm", "stormy"]}}}
    for seed in range(8):
        answer = served.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "How is the sea?"}],
            response_format=formatted(schema),
            seed=seed,
        ).json()["choices"][0]
        assert answer["finish_reason"] == "stop"
        assert set(json.loads(answer["message"]["content"])) == {"waves", "mood"}


def test_a_text_that_is_cut_off_says_so(served: Served) -> None:
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.LengthFinishReasonError),
    ):
        client.chat.completions.parse(
            model="tiny",
            messages=[{"role": "user", "content": "How is the sea?"}],
            response_format=Sea,
            max_completion_tokens=3,
        )


def test_completions_follow_every_form(served: Served) -> None:
    body: dict[str, Any] = {"prompt": "The sea is", "max_tokens": 100, "seed": 1}
    text = served.complete(**body, structured_outputs={"regex": "[a-f]{3,8}-[0-9]{2}"})["choices"][0]["text"]
    assert re.fullmatch("[a-f]{3,8}-[0-9]{2}", text)
    choices = served.complete(**body, n=4, structured_outputs={"choice": ["calm", "stormy"]})["choices"]
    assert {choice["text"] for choice in choices} <= {"calm", "stormy"}
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    lark = 'start: "sea" ("," "sea")~1..3 "."'
    text = served.complete(**body, structured_outputs={"grammar": lark})["choices"][0]["text"]
    assert re.fullmatch(r"sea(,sea){1,3}\.", text)
    for structured in ({"json": SCHEMA}, {"json": json.dumps(SCHEMA)}):
        text = served.complete(**body, structured_outputs=structured)["choices"][0]["text"]
        assert set(json.loads(text)) == {"mood", "waves"}
    # one token a time is at best what a constrained text needs, so an object may not be finished at max_tokens
    answer = served.complete(**body, structured_outputs={"json_object": True})["choices"][0]
    assert answer["text"].startswith("{")
    if answer["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["text"]), dict)


def test_constrained_and_free_requests_share_a_batch(served: Served) -> None:
    free: dict[str, Any] = {"prompt": "The robot", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    alone = served.complete(**free)["choices"][0]["text"]
    answer = served.complete(prompt=["The sea is"] * 6, structured_outputs={"choice": ["calm", "stormy"]})
    assert {choice["text"] for choice in answer["choices"]} <= {"calm", "stormy"}
    assert served.complete(**free)["choices"][0]["text"] == alone


@pytest.mark.parametrize(
    ("field", "value", "param", "says"),
    [
        (
            "response_format",
            formatted({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "colour"}}}}),
            "response_format.json_schema.schema",
            "/properties/a/items",
        ),
        (
            "response_format",
            formatted({"type": "string", "pattern": "(?=x)y"}),
            "response_format.json_schema.schema",
            "",
        ),
        ("structured_outputs", {"json": "{"}, "structured_outputs.json", "not JSON"),
        ("structured_outputs", {"regex": "a(b"}, "structured_outputs.regex", "character 2"),
        ("structured_outputs", {"grammar": 'start: "a" missing'}, "structured_outputs.grammar", "missing"),
    ],
)
def test_what_cannot_be_compiled_is_a_400_that_says_where(
    served: Served, field: str, value: dict[str, Any], param: str, says: str
) -> None:
    response = served.post("/v1/completions", prompt="x", **{field: value})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert says in error["message"]
    assert served.complete(prompt="x", max_tokens=2)["choices"]
