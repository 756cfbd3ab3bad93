"""Clients of other projects: OpenAI's for Node, LiteLLM with the errors that its callers catch, LMDeploy's requests."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lpa_model.config import Architecture
from tests.extra.node import run_node
from tests.serving import Served, serving, slow_steps, until

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks GitHub for prices when it is imported
import litellm

pytestmark = pytest.mark.filterwarnings("default")  # LiteLLM's own
FIXED: dict[str, Any] = {"model": "openai/tiny", "temperature": 0, "max_tokens": 12, "num_retries": 0}
MESSAGES = [{"role": "user", "content": "Who is there?"}]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What LiteLLM leaves open is found here, where that is no error, and not in a later test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"], api_key="secret") as server:
        server.client.headers["authorization"] = "Bearer secret"
        yield server
        until(server.idle)


def test_openai_for_node(served: Served) -> None:
    run_node("client.mjs", f"{served.url}/v1", "secret")


def test_files_and_batches_by_openai_for_node(tiny_checkpoints: dict[Architecture, Path], tmp_path: Path) -> None:
    with serving(tiny_checkpoints["setting2"], api_key="secret", data_dir=tmp_path) as served:
        run_node("batches.mjs", f"{served.url}/v1", "secret")


def lite(served: Served, **fields: Any) -> Any:
    where = {"api_base": f"{served.url}/v1", "api_key": "secret"}
    return litellm.completion(**{**FIXED, "messages": MESSAGES, **where, **fields})


def test_litellm_answers_whole_and_in_a_stream(served: Served) -> None:
    whole = lite(served)
    assert whole.usage.completion_tokens > 0
    text = "".join(chunk.choices[0].delta.content or "" for chunk in lite(served, stream=True))
    assert text == whole.choices[0].message.content
    where = {"api_base": f"{served.url}/v1", "api_key": "secret"}
    completed = litellm.text_completion(
        model="text-completion-openai/tiny", prompt="The sea", max_tokens=5, temperature=0, num_retries=0, **where
    )
    expected = served.complete(prompt="The sea", max_tokens=5, temperature=0)
    assert completed.choices[0].text == expected["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"messages": [{"role": "user", "content": "sea " * 500}]}, litellm.ContextWindowExceededError),
        ({"messages": MESSAGES, "max_tokens": 100_000}, litellm.ContextWindowExceededError),
        ({"temperature": 9}, litellm.BadRequestError),
        ({"api_key": "wrong"}, litellm.AuthenticationError),
        ({"model": "openai/nobody"}, litellm.NotFoundError),
    ],
)
def test_litellm_knows_the_kind_of_a_mistake(served: Served, fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        lite(served, **fields)
    assert error is litellm.ContextWindowExceededError or type(raised.value) is error


def test_litellm_knows_a_full_queue_and_a_server_that_stops(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=1, max_queue=0) as served:
        slow_steps(served, monkeypatch, 0.1)
        body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
        running = threading.Thread(target=lambda: served.post("/v1/completions", **body))
        running.start()
        until(lambda: served.engine.has_work)
        with pytest.raises(litellm.RateLimitError):
            lite(served)
        served.server.engine.accepting = False
        with pytest.raises(litellm.ServiceUnavailableError):
            lite(served)
        running.join(60)


# what the methods of lmdeploy.serve.openai.api_client.APIClient (0.10) send: every argument, and "kwargs"
LMDEPLOY: dict[str, Any] = {
    "model": "tiny",
    "temperature": 0.7,
    "top_p": 1.0,
    "n": 1,
    "stream": False,
    "stop": None,
    "user": None,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "top_k": 40,
    "stream_options": None,
    "kwargs": {},
}
LMDEPLOY_CHAT: dict[str, Any] = {
    **LMDEPLOY,
    "messages": MESSAGES,
    "logprobs": False,
    "top_logprobs": 0,
    "max_completion_tokens": None,
    "max_tokens": 8,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_new_tokens": None,
    "min_p": 0.0,
    "logit_bias": None,
}
LMDEPLOY_COMPLETION: dict[str, Any] = {
    **LMDEPLOY,
    "prompt": "The sea",
    "suffix": None,
    "max_completion_tokens": 16,
    "max_tokens": 16,
}


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", LMDEPLOY_CHAT), ("/v1/completions", LMDEPLOY_COMPLETION)]
)
def test_lmdeploys_requests(served: Served, path: str, body: dict[str, Any]) -> None:
    assert served.client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    whole = served.client.post(path, json=body)
    assert whole.status_code == 200, whole.text
    streamed = served.client.post(path, json={**body, "stream": True})
    events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    assert events[-1] == "[DONE]" and json.loads(events[0])["choices"]
