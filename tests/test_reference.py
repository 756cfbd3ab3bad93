"""The API reference: every example is run as it is printed, and gives the answer that stands below it.

`python -m tests.test_reference` records the answers anew, with the embedded model.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from lpa_model.config import Architecture
from server.batches.store import Store
from server.protocol.body import RequestBody
from server.routes import responses
from server.routes.docs import command, recorded
from server.settings import embedded_checkpoint
from tests.serving import Served, serving, until

FILE = Path(__file__).parent.parent / "server/routes/examples.json"
PAGE = "/docs/reference"
KEYS = {"KEY": "mine", "ADMIN_KEY": "boss"}
# what another machine, day or version answers otherwise
VOLATILE = {
    *("id", "created", "system_fingerprint", "version", "backend", "batch_invariant", "refused_backends"),
    *("freed_blocks", "before"),  # hang on what was done until then
    *("created_at", "completed_at", "expires_at", "cancelling_at"),
}
CONTROL = ("/v1/requests/{request_id}/cancel", "/reset_prefix_cache", "/log_level")  # with an admin's key
TOLERANCE = 2e-3  # nats, bits and the like: of other kernels
OWN_PAGE = ("GET", PAGE)
TO_CANCEL = "my-request-1"
STORED = "resp_example"

MODEL = {"model": "lpa-tiny"}
STORY = "Once upon a time"
FILE_ID, BATCH_ID = "file-8d5fae2c1b7a4c90e3f1a2b4", "batch_1f0d3c5b7a9e2468ace01357"
OWNER = hashlib.sha256(KEYS["KEY"].encode()).hexdigest()[:32]
LINE = {
    "custom_id": "first",
    "method": "POST",
    "url": "/v1/completions",
    "body": {**MODEL, "prompt": STORY, "max_tokens": 8},
}
SENTENCE = "Once upon a time there was a king."
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "POST /v1/completions": [
        {"body": {**MODEL, "prompt": STORY, "max_tokens": 16, "temperature": 0}},
        {"body": {**MODEL, "prompt": STORY, "max_tokens": 3, "temperature": 0, "stream": True}},
    ],
    "POST /v1/chat/completions": [
        {
            "body": {
                **MODEL,
                "messages": [{"role": "user", "content": "Tell me a story."}],
                "max_tokens": 16,
                "temperature": 0,
            }
        }
    ],
    "POST /v1/responses": [
        {"body": {**MODEL, "input": "Tell me a story.", "max_output_tokens": 16, "temperature": 0, "store": False}},
    ],
    "GET /v1/responses/{response_id}": [{"path": {"response_id": STORED}}],
    "GET /v1/responses/{response_id}/input_items": [{"path": {"response_id": STORED}}],
    "POST /v1/responses/{response_id}/cancel": [{"path": {"response_id": STORED}}],
    "DELETE /v1/responses/{response_id}": [{"path": {"response_id": STORED}}],
    "POST /v1/embeddings": [{"body": {**MODEL, "input": SENTENCE, "dimensions": 3}}],
    "POST /v1/hidden_states": [{"body": {**MODEL, "input": "king", "layers": [0], "positions": [-1]}}],
    "POST /v1/perplexity": [
        {"body": {**MODEL, "input": [SENTENCE, "King a was there time a upon once."]}},
        {"body": {**MODEL, "input": STORY, "return_tokens": True, "top_logprobs": 1}},
        {
            "query": {**MODEL, "method": "rolling", "stream": "true"},
            "lines": [SENTENCE, {"text": "The sea was calm."}],
        },
    ],
    "POST /v1/loglikelihood": [
        {"body": {**MODEL, "context": "The sun was shining and the sky was", "continuations": [" blue.", " table."]}},
        {
            "query": {**MODEL, "stream": "true"},
            "lines": [
                {"context": "The sun was", "continuations": [" bright.", " a table."]},
                {"context": "The sea was", "continuations": [" calm.", " a chair."]},
            ],
        },
    ],
    "POST /v1/files": [{"file": [LINE]}],
    "GET /v1/files": [{"query": {"limit": 1}}],
    "GET /v1/files/{file_id}": [{"path": {"file_id": FILE_ID}}],
    "GET /v1/files/{file_id}/content": [{"path": {"file_id": FILE_ID}}],
    "DELETE /v1/files/{file_id}": [{"path": {"file_id": FILE_ID}}],
    "POST /v1/batches": [
        {"body": {"input_file_id": FILE_ID, "endpoint": "/v1/completions", "completion_window": "24h"}}
    ],
    "GET /v1/batches": [{"query": {"limit": 1}}],
    "GET /v1/batches/{batch_id}": [{"path": {"batch_id": BATCH_ID}}],
    "POST /v1/batches/{batch_id}/cancel": [{"path": {"batch_id": BATCH_ID}}],
    "GET /v1/models": [{}],
    "GET /v1/models/{name}": [{"path": {"name": "lpa-tiny"}}],
    "POST /tokenize": [{"body": {"prompt": STORY, "return_token_strs": True}}],
    "POST /detokenize": [{"body": {"tokens": [47, 1347, 562, 259, 573]}}],
    "GET /tokenizer_info": [{}],
    "GET /health": [{}],
    "GET /ready": [{}],
    "GET /version": [{}],
    "GET /metrics": [{"then": " | grep '^lpa:num_requests'"}],
    "POST /reset_prefix_cache": [{}],
    "POST /log_level": [{"body": {"level": "debug"}}],
    "POST /v1/requests/{request_id}/cancel": [{"path": {"request_id": TO_CANCEL}}],
}


@contextmanager
def embedded() -> Iterator[Served]:
    """The embedded model behind keys, with a folder for batches."""
    with (
        TemporaryDirectory() as folder,
        serving(
            embedded_checkpoint(),
            data_dir=folder,
            served_model_name="lpa-tiny",
            kv_cache_memory=32 << 20,
            api_key=KEYS["KEY"],
            admin_api_key=KEYS["ADMIN_KEY"],
        ) as served,
    ):
        jobs = served.server.config.app.state.batches  # type: ignore[union-attr]
        jobs._task.get_loop().call_soon_threadsafe(jobs._task.cancel)  # batches stay as they were started
        served.client.headers["authorization"] = f"Bearer {KEYS['ADMIN_KEY']}"
        yield served


@contextmanager
def something_to_cancel(served: Served) -> Iterator[None]:
    """A request that runs until it is cancelled."""
    body = {**MODEL, "prompt": "x", "max_tokens": 1000, "n": 8, "ignore_eos": True}
    headers = {"x-request-id": TO_CANCEL}
    thread = threading.Thread(target=lambda: served.client.post("/v1/completions", json=body, headers=headers))
    thread.start()
    until(lambda: served.engine.has_work)
    yield
    thread.join(600)
    assert not thread.is_alive()


def keep(store: Store) -> None:
    """A file, and a batch over it."""
    written = store.new_path()
    written.write_text(json.dumps(LINE) + "\n")
    store.add_file(written, OWNER, "requests.jsonl", "batch", FILE_ID)
    store._db.execute("DELETE FROM batches WHERE id = ?", (BATCH_ID,))
    added = store.add_batch(OWNER, FILE_ID, "/v1/completions", None)
    store._db.execute("UPDATE batches SET id = ? WHERE id = ?", (BATCH_ID, added))


def drop(store: Store) -> None:
    """Let no batch read the file."""
    store._db.execute("UPDATE batches SET status = 'cancelled'")


def run(served: Served, line: str) -> str:
    """What a shell prints."""
    if "/v1/files" in line or "/v1/batches" in line:
        store = served.server.config.app.state.batches.store  # type: ignore[union-attr]
        keep(store)
        if "-X DELETE" in line or "-d " in line:
            drop(store)
        try:
            return _run(line)
        finally:
            drop(store)
    if TO_CANCEL in line:
        with something_to_cancel(served):
            return _run(line)
    if STORED in line:
        store_a_response(served)
    return _run(line)


def store_a_response(served: Served) -> None:
    """One whose ids are as examples have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responses, "_new_id", "{}_example".format)
        body = {**MODEL, "input": "Tell me a story.", "max_output_tokens": 8, "temperature": 0}
        assert served.client.post("/v1/responses", json=body).json()["id"] == STORED


def _run(line: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **KEYS},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def parsed(answer: str) -> Any:
    """JSON, or the text of several lines."""
    try:
        return json.loads(answer)
    except json.JSONDecodeError:
        return answer


def comparable(answer: Any) -> Any:
    """An answer with its numbers as approximations, without what is volatile."""
    if isinstance(answer, dict):
        return {name: comparable(value) for name, value in answer.items() if name not in VOLATILE}
    if isinstance(answer, list):
        return [comparable(value) for value in answer]
    if isinstance(answer, float):
        return pytest.approx(answer, abs=TOLERANCE, rel=TOLERANCE)
    if isinstance(answer, str) and "\n" in answer and answer[0] in "{d":
        lines = [parsed(line.removeprefix("data: ")) for line in answer.splitlines() if line]
        return [comparable(line) for line in joined(lines)]
    return answer


def joined(lines: list[Any]) -> list[Any]:
    """Lines of a stream with the texts that follow each other as one: a slow reader gets several tokens at a time."""
    found: list[Any] = []
    for line in lines:
        texts = [one["choices"][0] for one in (*found[-1:], line) if isinstance(one, dict) and "choices" in one]
        if len(texts) == 2 and all("text" in choice for choice in texts):
            texts[1]["text"] = texts[0]["text"] + texts[1]["text"]
            found.pop()
        found.append(line)
    return found


class Examples(HTMLParser):
    """The commands and answers of the page, in pairs, by the operation that they stand under."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.commands: list[str] = []
        self.answers: list[str] = []
        self._into: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = dict(attrs).get("class")
        self._into = {"command": self.commands, "answer": self.answers}.get(kind or "") if tag == "pre" else None
        if self._into is not None:
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with embedded() as server:
        yield server


@pytest.fixture(scope="module")
def page(served: Served) -> str:
    """As it is without a key."""
    answer = served.client.get(PAGE, headers={"authorization": ""})
    assert answer.status_code == 200
    return answer.text


def test_every_route_has_an_example_and_every_example_a_route(served: Served) -> None:
    document = served.client.get("/openapi.json").json()
    routes = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert {tuple(name.split(" ")) for name in recorded()} == routes - {OWN_PAGE}
    sent = {
        name: [{k: v for k, v in one.items() if k != "answer"} for one in all_] for name, all_ in recorded().items()
    }
    assert sent == EXAMPLES, "record the answers again"


def test_every_example_runs_and_shows_its_answer(served: Served, page: str) -> None:
    found = Examples(page)
    assert len(found.commands) == len(found.answers) == sum(map(len, EXAMPLES.values()))
    for line, shown in zip(found.commands, found.answers, strict=True):
        assert served.url in line
        assert comparable(parsed(run(served, line))) == comparable(parsed(shown)), line


def test_the_examples_carry_the_name_of_the_model_that_is_served(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"], served_model_name="mine") as other:
        found = Examples(other.client.get(PAGE).text)
    assert (
        sum('"model": "mine"' in line or "model=mine" in line or "models/mine" in line for line in found.commands) == 13
    )
    assert not any("lpa-tiny" in line for line in found.commands)


def test_required_fields_come_first_and_every_field_is_an_anchor(served: Served, page: str) -> None:
    schemas = served.client.get("/openapi.json").json()["components"]["schemas"]
    for name, schema in schemas.items():
        fields = re.findall(rf'id="{name}\.([^"]+)"', page)
        assert set(fields) == set(schema.get("properties", ()))
        required = [field for field in fields if field in schema.get("required", ())]
        assert fields[: len(required)] == required
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', page)
    assert set(targets) <= set(ids)
    assert "<main>" in page


def test_bodies_of_lines_are_described(page: str) -> None:
    text = html.unescape(page)
    assert "As lines, <code>application/x-ndjson</code>" in text
    assert "each line is a text in JSON" in text


def limits(schema: Any) -> Iterator[int]:
    """Of integers, all of a schema's."""
    if isinstance(schema, dict):
        for name, value in schema.items():
            if name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") and schema["type"] == "integer":
                yield value
            else:
                yield from limits(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from limits(value)


def test_limits_are_exact_integers(served: Served, page: str) -> None:
    """As pydantic has them; FastAPI reads them as floats."""
    schemas = served.client.get("/openapi.json").json()["components"]["schemas"]
    bodies = [body for body in _all(RequestBody) if body.__name__ in schemas]
    assert len(bodies) > 5
    for body in bodies:
        exact = list(limits(body.model_json_schema()["properties"]))
        found = list(limits(schemas[body.__name__]["properties"]))
        assert found == exact
        assert all(isinstance(limit, int) for limit in found)
    text = html.unescape(page)
    assert f"≥ {-(2**63)}, < {2**63}" in text
    assert not re.search(r"[<>≥≤] -?\d[\d.]*e", text)


def _all(kind: type[RequestBody]) -> Iterator[type[RequestBody]]:
    for body in kind.__subclasses__():
        yield body
        yield from _all(body)


def record() -> None:
    """Write what the embedded model answers."""
    with embedded() as served:
        for name, examples in EXAMPLES.items():
            method, path = name.split(" ")
            for example in examples:
                admin = path in CONTROL
                line = command(example, method, served.url + path, [{"AdminKey" if admin else "ApiKey": []}], None)
                example["answer"] = parsed(run(served, line))
    FILE.write_text(json.dumps(EXAMPLES, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
