"""/v1/embeddings and /v1/hidden_states over sockets: equal to the plain forward's, in every form; limits and errors."""

from __future__ import annotations

import base64
import http.client
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openai
import pytest
from safetensors.numpy import load

from lpa_model.config import Architecture
from server.protocol.hidden_states import Part, Wanted, parts_of, positions_of
from server.routes import embeddings as embeddings_route
from server.routes import hidden_states as route
from tests.serving import Served, fail_step, serving, until
from tests.test_hidden_states import Rows, naive
from tests.test_limits import Threads
from tests.tiny import byte_tokenizer, random_model, tiny_config

EMBEDDINGS, HIDDEN = "/v1/embeddings", "/v1/hidden_states"
TEXTS = ["the sea", "The robot said: you", "x"]


@pytest.fixture(scope="module", params=["setting1", "setting2"])
def both(request: pytest.FixtureRequest, tiny_checkpoints: dict[Architecture, Path]) -> Iterator[tuple[Served, Any]]:
    with serving(tiny_checkpoints[request.param]) as server:
        yield server, random_model(tiny_config(request.param))


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


def ids_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text).ids


def unit(vector: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return vector / np.linalg.norm(vector)


def vectors(answer: dict[str, Any]) -> Rows:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return np.array([entry["embedding"] for entry in answer["data"]], dtype=np.float32)


def test_embeddings_are_pooled_hidden_states(both: tuple[Served, Any]) -> None:
    served, model = both
    states = [naive(model, ids_of(text))[:, -1] for text in TEXTS]
    means, lasts = np.stack([rows.mean(0) for rows in states]), np.stack([rows[-1] for rows in states])
    answer = served.answer(EMBEDDINGS, input=TEXTS)
    np.testing.assert_allclose(vectors(answer), np.apply_along_axis(unit, 1, means), atol=1e-4)
    count = sum(len(ids_of(text)) for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}
    for pooling, expected in (("mean", means), ("last", lasts)):
        found = vectors(served.answer(EMBEDDINGS, input=TEXTS, pooling=pooling, normalize=False))
        np.testing.assert_allclose(found, expected, atol=1e-4)
        found = vectors(served.answer(EMBEDDINGS, input=TEXTS, pooling=pooling, dimensions=5))
        np.testing.assert_allclose(found, np.apply_along_axis(unit, 1, expected[:, :5]), atol=1e-4)


def test_every_form_of_input_and_encoding_is_the_same_vector(served: Served) -> None:
    expected = vectors(served.answer(EMBEDDINGS, input=TEXTS))
    ids = [ids_of(text) for text in TEXTS]
    np.testing.assert_array_equal(vectors(served.answer(EMBEDDINGS, input=ids)), expected)
    np.testing.assert_array_equal(vectors(served.answer(EMBEDDINGS, input=TEXTS[1])), expected[1:2])
    np.testing.assert_array_equal(vectors(served.answer(EMBEDDINGS, input=ids[1])), expected[1:2])
    for i, entry in enumerate(served.answer(EMBEDDINGS, input=TEXTS, encoding_format="base64")["data"]):
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(entry["embedding"]), dtype="<f4"), expected[i])
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    kinds: list[dict[str, Any]] = [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}]
    for kind in kinds:
        found = client.embeddings.create(model="tiny", input=TEXTS, extra_body={"pooling": "mean"}, **kind)
        got = [entry.embedding for entry in found.data]
        if kind.get("encoding_format") == "base64":  # then the client leaves it as it is
            got = [np.frombuffer(base64.b64decode(text), dtype="<f4") for text in got]
        np.testing.assert_array_equal(np.array(got, dtype=np.float32), expected)
        assert found.usage.total_tokens == sum(map(len, ids))


def test_many_texts_come_back_in_their_order(served: Served) -> None:
    texts = [f"text {i * 7919 % 1000}" + "a" * (i % 40) for i in range(300)]
    answer = served.answer(EMBEDDINGS, input=texts)
    for i in (0, 17, 150, 299):
        alone = vectors(served.answer(EMBEDDINGS, input=texts[i]))[0]
        np.testing.assert_array_equal(vectors(answer)[i], alone)
    assert served.idle()


def test_special_tokens_are_the_tokenizers(tiny_checkpoints: dict[Architecture, Path], tmp_path: Path) -> None:
    from tests.test_perplexity_http import with_bos

    for file in tiny_checkpoints["setting2"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with_bos().save(str(tmp_path / "tokenizer.json"))
    with serving(tmp_path) as server:
        ids = ids_of("the sea")
        assert server.answer(HIDDEN, input="the sea")["data"][0]["token_ids"] == [0, *ids]
        assert server.answer(HIDDEN, input="the sea", add_special_tokens=False)["data"][0]["token_ids"] == ids
        assert server.answer(EMBEDDINGS, input="the sea")["usage"]["prompt_tokens"] == len(ids) + 1
        assert server.answer(EMBEDDINGS, input=ids)["usage"]["prompt_tokens"] == len(ids)


def numbers(entry: dict[str, Any]) -> Rows:
    found: Rows = np.frombuffer(base64.b64decode(entry["data"]), dtype="<f4").reshape(entry["shape"])
    return found


CHOICES: list[tuple[dict[str, Any], list[int], list[int] | slice]] = [
    ({}, [2], slice(None)),
    ({"layers": [0, 1, 2]}, [0, 1, 2], slice(None)),
    ({"layers": [-1, 0], "positions": [0, -1]}, [2, 0], [0, -1]),
    ({"layers": [-2], "positions": [-2]}, [1], [-2]),
]


@pytest.mark.parametrize("part_rows", [None, 2, 5])
@pytest.mark.parametrize(("asked", "layers", "positions"), CHOICES)
def test_hidden_states_in_every_form(
    both: tuple[Served, Any],
    asked: dict[str, Any],
    layers: list[int],
    positions: list[int] | slice,
    part_rows: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole, in lines and as a file; the last two also in parts of so many positions."""
    served, model = both
    texts = TEXTS[:2]
    expected = [naive(model, ids_of(text))[positions][:, layers] for text in texts]
    whole = served.answer(HIDDEN, input=texts, **asked)
    assert whole["layers"] == layers
    assert [entry["token_ids"] for entry in whole["data"]] == [ids_of(text) for text in texts]
    for entry, rows in zip(whole["data"], expected, strict=True):
        np.testing.assert_allclose(numbers(entry), rows, atol=1e-4)
        assert entry["positions"] == list(np.arange(len(entry["token_ids"]))[positions])
    if part_rows is not None:
        monkeypatch.setattr(route, "PART_BYTES", part_rows * expected[0][0].nbytes)
        monkeypatch.setattr(route, "PIECE", 3 * 7)
    *lines, last = map(json.loads, served.post(HIDDEN, input=texts, stream=True, **asked).text.splitlines())
    assert last == {name: value for name, value in whole.items() if name != "data"}
    for i, entry in enumerate(whole["data"]):
        of_text = [line for line in lines if line["index"] == i]
        assert [line["index"] for line in lines] == sorted(line["index"] for line in lines)
        assert part_rows is None or all(len(line["positions"]) <= part_rows for line in of_text)
        assert [p for line in of_text for p in line["positions"]] == entry["positions"]
        np.testing.assert_array_equal(np.concatenate(list(map(numbers, of_text))), numbers(entry))
    response = served.post(HIDDEN, input=texts, encoding_format="safetensors", **asked)
    assert int(response.headers["content-length"]) == len(response.content)
    tensors = load(response.content)
    assert len(tensors) == 3 * len(texts)
    for i, entry in enumerate(whole["data"]):
        np.testing.assert_array_equal(tensors[f"hidden_states.{i}"], numbers(entry))
        assert tensors[f"token_ids.{i}"].tolist() == entry["token_ids"]
        assert tensors[f"positions.{i}"].tolist() == entry["positions"]
    assert served.idle()


def test_parts_are_whole_blocks_where_they_fit() -> None:
    def sizes(most: int) -> list[int]:
        return [len(part.positions) for part in parts_of([Wanted("input", [1] * 200, range(200))], most, 32)]

    assert sizes(31) == [31] * 6 + [14]
    assert sizes(70) == [64, 64, 64, 8]
    assert sizes(1000) == [200]
    both = [Wanted("a", [1] * 3, [0, 2]), Wanted("b", [1], range(1))]
    assert list(parts_of(both, 1, 32)) == [Part(0, [0]), Part(0, [2]), Part(1, range(1))]
    assert list(positions_of([0, -1], 5, "input")) == [0, 4]


def test_later_parts_find_the_earlier_ones_in_the_prefix_cache(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random.Random(1).choices(range(1, 300), k=100)
    monkeypatch.setattr(route, "PART_BYTES", 32 * 4 * 32)  # 32 positions of 32 numbers
    served.engine.take_stats()
    before = served.metric('lpa:prefix_cache_hits_total{model_name="tiny"}')
    assert served.post(HIDDEN, input=ids, stream=True).status_code == 200
    assert served.metric('lpa:prefix_cache_hits_total{model_name="tiny"}') - before == 32 + 64 + 96


def test_a_reader_that_does_not_keep_up_holds_the_engine_back(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most so many parts are computed and not yet written, and a client that leaves ends the rest."""
    monkeypatch.setattr(route, "PART_BYTES", 64 * 4 * 32 * 3)
    monkeypatch.setattr(route, "IN_FLIGHT_BYTES", 4 * route.PART_BYTES)
    num_texts = 2000
    for how in ({"stream": True}, {"encoding_format": "safetensors"}):
        with serving(tiny_checkpoints["setting2"], max_num_seqs=8) as served:
            body = {"model": "tiny", "input": ["the sea " * 15] * num_texts, "layers": [0, 1, 2], **how}
            connection = http.client.HTTPConnection("127.0.0.1", served.server.port, timeout=600)
            connection.connect()
            connection.request("POST", HIDDEN, json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            done = -1.0
            for _ in range(200):  # it stands still once the sockets' buffers are full
                before, done = (
                    done,
                    served.metric('lpa:request_success_total{finished_reason="length",model_name="tiny"}'),
                )
                if done == before and done > 0:
                    break
                threading.Event().wait(0.2)
            assert 0 < done < 2 * num_texts / 2, done
            assert response.read(100_000)
            connection.sock.close()
            response.close()
            until(served.idle)


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (EMBEDDINGS, {"input": []}, "input", "none empty"),
    (EMBEDDINGS, {"input": ["a", ""]}, "input[1]", "is empty"),
    (EMBEDDINGS, {"input": [[5, 400]]}, "input", "400"),
    (EMBEDDINGS, {"input": "a", "dimensions": 33}, "dimensions", "32, the model's hidden_size"),
    (EMBEDDINGS, {"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
    (EMBEDDINGS, {"input": "a", "pooling": "max"}, "pooling", "'mean' or 'last'"),
    (EMBEDDINGS, {"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    (EMBEDDINGS, {"input": ["a"] * 11}, "input", "max_sequences"),
    (EMBEDDINGS, {"input": ["a", "b" * 200]}, "input[1]", "maximum context length is 128 tokens"),
    (HIDDEN, {"input": ["a"] * 11}, "input", "max_sequences"),
    (HIDDEN, {"input": "b" * 200}, "input", "maximum context length is 128 tokens"),
    (HIDDEN, {"input": "a", "layers": [3]}, "layers[0]", "not between -3 and 2"),
    (HIDDEN, {"input": "a", "layers": [-4]}, "layers[0]", "not between -3 and 2"),
    (HIDDEN, {"input": "a", "layers": [2, -1]}, "layers[1]", "given twice"),
    (HIDDEN, {"input": "a", "layers": []}, "layers", "at least 1"),
    (HIDDEN, {"input": ["abc", "a"], "positions": [1]}, "positions[0]", "no position of input[1], which has 1 tokens"),
    (HIDDEN, {"input": "abc", "positions": [0, -3]}, "positions[1]", "must ascend"),
    (HIDDEN, {"input": "abc", "stream": True, "encoding_format": "safetensors"}, "stream", "is for base64"),
]


@pytest.fixture(scope="module")
def small(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"], max_sequences=10) as server:
        yield server


@pytest.mark.parametrize(("path", "body", "param", "message"), REFUSED)
def test_what_is_refused(small: Served, path: str, body: dict[str, Any], param: str, message: str) -> None:
    response = small.post(path, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_an_answer_that_is_too_large_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "PART_BYTES", 1000)
    monkeypatch.setattr(embeddings_route, "MAX_NUMBERS", 100)
    error = served.post(HIDDEN, input="a" * 16).json()["error"]
    assert error["param"] == "input" and "2048 bytes, more than 1000" in error["message"]
    error = served.post(EMBEDDINGS, input=["a"] * 7).json()["error"]
    assert error["param"] == "input" and "7 texts of 32 numbers are more than 100" in error["message"]
    assert len(served.answer(EMBEDDINGS, input=["a"] * 7, dimensions=14)["data"]) == 7


def test_an_error_in_the_middle_of_a_file_cuts_it_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its length was told; nothing else may stand where numbers should. Before the first number it has its status."""
    monkeypatch.setattr(route, "PART_BYTES", 4 * 32)
    monkeypatch.setattr(route, "IN_FLIGHT_BYTES", 4 * 32)
    fail_step(served, monkeypatch, 1)
    assert served.post(HIDDEN, input="a" * 40, encoding_format="safetensors").status_code == 500
    fail_step(served, monkeypatch, 20)
    with pytest.raises(Exception, match=r"closed|Incomplete|peer"):
        served.post(HIDDEN, input="a" * 40, encoding_format="safetensors")
    until(served.idle)


def test_what_grows_with_a_request_is_done_beside_the_event_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(monkeypatch)
    threads.watch(embeddings_route, "embeddings_fields")
    for name in ("_entry", "positions_of", "safetensors_head"):
        threads.watch(route, name)
    served.answer(EMBEDDINGS, input=["the sea"] * 300)
    served.answer(HIDDEN, input=["the sea"] * 300, layers=[0, 1, 2])
    assert served.post(HIDDEN, input=["the sea"] * 3, encoding_format="safetensors").status_code == 200
    assert len(threads.found) == 4
    loop = served.loop_thread()
    assert all(found and loop not in found for found in threads.found.values())
