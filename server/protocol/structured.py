"""What generated text must match: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from server.engine.request import GrammarSpec
from server.errors import InvalidRequest
from server.protocol.body import RequestBody, refusal

Choice = Annotated[str, StringConstraints(min_length=1)]


class JsonSchemaFormat(RequestBody):
    """A named JSON schema."""

    name: str = Field(min_length=1, max_length=64, description="Name of the schema; not used.", examples=["answer"])
    description: str | None = Field(None, description="Taken and not used.")
    json_schema: dict[str, Any] | None = Field(
        None,
        alias="schema",
        description="JSON schema that the text follows (default: any object).",
        examples=[{"type": "object", "properties": {"mood": {"enum": ["calm", "stormy"]}}, "required": ["mood"]}],
    )
    strict: bool | None = Field(
        None,
        description="true: objects have all of their properties and no other; the schema is followed either way.",
    )


class ResponseFormat(RequestBody):
    """OpenAI's form."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text: free. json_object: any JSON object. json_schema: JSON that follows a schema."
    )
    json_schema: JsonSchemaFormat | None = Field(None, description="Needed by type json_schema.")
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="With type json_object: the JSON schema that it follows, as llama.cpp has it."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refusal("goes with type 'json_schema', which needs it", "json_schema")
        if self.schema_ is not None and self.type != "json_object":
            raise refusal("goes with type 'json_object' only", "schema")
        return self

    def grammar(self) -> GrammarSpec | None:
        """None for free text."""
        if self.type == "text":
            return None
        if self.schema_ is not None:
            return GrammarSpec("json_schema", _dump(self.schema_), "response_format.schema")
        if self.json_schema is None or self.json_schema.json_schema is None:
            return GrammarSpec("json_object", "{}", "response_format")
        kind: Literal["strict_schema", "json_schema"] = "strict_schema" if self.json_schema.strict else "json_schema"
        return GrammarSpec(kind, _dump(self.json_schema.json_schema), "response_format.json_schema.schema")


class StructuredOutputs(RequestBody):
    """vLLM's form: exactly one of the fields."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "structural_tag": (),
        "disable_fallback": (True, False),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
    }

    json_: dict[str, Any] | str | None = Field(
        None, alias="json", description="JSON schema, as an object or as its text."
    )
    json_object: bool | None = Field(None, description="true: any JSON object.")
    regex: str | None = Field(
        None, min_length=1, description="Regular expression that the whole text matches.", examples=["[a-z]{3,8}"]
    )
    choice: list[Choice] | None = Field(
        None, min_length=1, fail_fast=True, description="The text is one of these.", examples=[["yes", "no"]]
    )
    grammar: str | None = Field(None, min_length=1, description="Context-free grammar in Lark's notation.")

    def spec(self) -> GrammarSpec | None:
        """The constraint; None if there is none.

        Raises:
            InvalidRequest: more than one field is given.
        """
        found = []
        if self.json_ is not None:
            text = self.json_ if isinstance(self.json_, str) else _dump(self.json_)
            found.append(GrammarSpec("json_schema", text, "structured_outputs.json"))
        if self.json_object:
            found.append(GrammarSpec("json_object", "{}", "structured_outputs.json_object"))
        if self.regex is not None:
            found.append(GrammarSpec("regex", self.regex, "structured_outputs.regex"))
        if self.choice is not None:
            found.append(GrammarSpec("choice", _dump(self.choice), "structured_outputs.choice"))
        if self.grammar is not None:
            found.append(GrammarSpec("grammar", self.grammar, "structured_outputs.grammar"))
        if len(found) > 1:
            names = " and ".join(spec.param.partition(".")[2] for spec in found)
            raise InvalidRequest(
                f"structured_outputs: takes one of its fields, not {names}", param="structured_outputs"
            )
        return found[0] if found else None


def grammar_of(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> GrammarSpec | None:
    """The grammar of a request.

    Raises:
        InvalidRequest: there are two.
    """
    first = None if response_format is None else response_format.grammar()
    second = None if structured is None else structured.spec()
    if first is not None and second is not None:
        raise InvalidRequest("structured_outputs: does not go with response_format", param="structured_outputs")
    return first or second


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
