"""Files and batches: OpenAI's client against a real server, and a server that is killed again and again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch
from typer.testing import CliRunner

from server.batches import execute, runner
from server.batches.execute import Answer
from server.batches.lines import Line, LineError, read_lines
from server.batches.store import Store
from server.cli import app
from tests.serving import Served, serving, until
from tests.test_limits import Threads
from tests.tiny import tiny_config, write_checkpoint

ENDED = {"completed", "failed", "cancelled", "expired"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tiny_config())


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(folder, data_dir=tmp_path_factory.mktemp("data"), max_file_bytes=1 << 20) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def request(name: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "prompt": f"The {name}", "max_tokens": 4, "temperature": 0} if "model" not in body else {}
    return {"custom_id": name, "method": "POST", "url": url, "body": asked | body}


def lines(*requests: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in requests)


def start(client: OpenAI, content: bytes, endpoint: Any = "/v1/completions") -> Batch:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.status) == (len(content), "in.jsonl", "processed")
    batch = client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"who": "me"}
    )
    assert (batch.input_file_id, batch.metadata, batch.errors) == (file.id, {"who": "me"}, None)
    return batch


def ended(client: OpenAI, batch: Batch) -> Batch:
    until(lambda: client.batches.retrieve(batch.id).status in ENDED)
    return client.batches.retrieve(batch.id)


def content(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_answers_are_those_of_the_endpoint_in_the_order_of_the_lines(client: OpenAI, served: Served) -> None:
    names = [f"r{i}" for i in range(40)]
    requests = [request(name) for name in names]
    requests.insert(5, request("wrong", max_tokens=-1))
    done = ended(client, start(client, lines(*requests)))
    assert done.status == "completed" and done.completed_at is not None and done.in_progress_at is not None
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (41, 40, 1)
    found = content(client, done.output_file_id)
    assert [entry["custom_id"] for entry in found] == names
    for entry in found[::13]:
        alone = served.complete(prompt=f"The {entry['custom_id']}", max_tokens=4, temperature=0)
        assert entry["response"]["status_code"] == 200 and entry["error"] is None
        assert entry["response"]["body"]["choices"] == alone["choices"]
    [wrong] = content(client, done.error_file_id)
    assert wrong["custom_id"] == "wrong" and wrong["response"]["status_code"] == 400
    assert wrong["response"]["body"]["error"]["param"] == "max_tokens"
    assert client.files.retrieve(str(done.output_file_id)).purpose == "batch_output"


def test_lines_and_their_answers_are_written_beside_the_event_loop(
    client: OpenAI, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(monkeypatch)
    threads.watch(execute, "_content")
    threads.watch(execute, "_answer")
    ended(client, start(client, lines(request("cat"))))
    for name in ("_content", "_answer"):
        assert threads.found[name] and served.loop_thread() not in threads.found[name]


def test_lines_are_counted_as_lines_and_not_as_http_requests(client: OpenAI, served: Served) -> None:
    of_lines = 'lpa:batch_lines_total{model_name="tiny",status="completed"}'
    of_http = 'lpa:http_requests_total{handler="/v1/completions",method="POST",model_name="tiny",status="200"}'
    served.complete(prompt="x", max_tokens=1)
    ended(client, start(client, lines(request("cat"))))
    http_before, lines_before = served.metric(of_http), served.metric(of_lines)
    ended(client, start(client, lines(request("cat"), request("dog"))))
    assert (served.metric(of_http), served.metric(of_lines)) == (http_before, lines_before + 2)


def test_every_endpoint_that_is_listed_works(client: OpenAI) -> None:
    for url, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2, "store": False}),
        ("/v1/embeddings", {"input": ["The sea.", "The gull."]}),
        ("/v1/perplexity", {"input": ["The sea.", "The gull."]}),
        ("/v1/loglikelihood", {"pairs": [["The", " sea"]]}),
    ):
        done = ended(client, start(client, lines(request("one", url, model="tiny", **body)), url))
        assert content(client, done.error_file_id) == []
        [answer] = content(client, done.output_file_id)
        assert answer["response"]["status_code"] == 200


def test_a_response_that_would_be_stored_is_refused(client: OpenAI) -> None:
    done = ended(client, start(client, lines(request("a", "/v1/responses", model="tiny", input="Hi")), "/v1/responses"))
    assert done.status == "failed" and done.errors is not None and done.errors.data is not None
    [error] = done.errors.data
    assert (error.code, error.param) == ("unsupported_store", "body.store")


def test_metrics_count_lines_and_batches(folder: Path, tmp_path: Path) -> None:
    def count(name: str, status: str = "") -> float:
        return served.metric(f'lpa:{name}{{model_name="tiny"' + (f',status="{status}"}}' if status else "}"))

    with serving(folder, data_dir=tmp_path) as served, OpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
        assert count("batches", "completed") == count("batch_lines_total", "completed") == 0
        ended(client, start(client, lines(request("a"), request("b"), request("wrong", max_tokens=-1))))
        assert (count("batch_lines_total", "completed"), count("batch_lines_total", "failed")) == (2, 1)
        assert (count("batches", "completed"), count("batches", "in_progress")) == (1, 0)
        endless = start(client, lines(*(request(str(i), max_tokens=100, ignore_eos=True) for i in range(200))))
        until(lambda: 0 < count("batch_lines_waiting") <= 200)
        assert count("batches", "in_progress") == 1
        client.batches.cancel(endless.id)
        ended(client, endless)
        assert (count("batch_lines_waiting"), count("batches", "cancelled")) == (0, 1)
    with serving(folder, data_dir=tmp_path) as served:  # batches are kept, lines are this process's
        assert (count("batches", "completed"), count("batch_lines_total", "completed")) == (1, 0)


def test_batches_go_on_after_a_disk_was_full(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [sqlite3.OperationalError("database or disk is full") for _ in range(2)]  # to go on, and to say so
    set_status = Store.set_status

    def on_disk(*arguments: Any, **fields: Any) -> None:
        if errors:
            raise errors.pop()
        set_status(*arguments, **fields)

    monkeypatch.setattr(Store, "set_status", on_disk)
    monkeypatch.setattr(runner, "RETRY", 0.01)
    assert ended(client, start(client, lines(request("cat")))).status == "completed"
    assert not errors


def test_a_file_that_is_wrong_fails_with_its_lines_and_runs_nothing(client: OpenAI) -> None:
    good = lines(request("a"))
    wrong = good + b"{\n" + good + lines(request("b") | {"url": "/v1/models"}, request("c", stream=True)) + b"[]\n"
    wrong += lines({**request("d"), "method": "GET"}, request("e") | {"body": 1}, request("f") | {"custom_id": ""})
    wrong += lines(request("g", "/v1/perplexity"), request("h") | {"extra": 1}) + b'{"custom_id": "\xff"}\n\n'
    done = ended(client, start(client, wrong))
    assert done.status == "failed" and done.errors is not None and done.errors.data is not None
    assert [(error.line, error.code) for error in done.errors.data] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "invalid_url"),
        (5, "unsupported_stream"),
        (6, "invalid_json_line"),
        (7, "invalid_method"),
        (8, "missing_body"),
        (9, "invalid_custom_id"),
        (10, "mismatched_url"),
        (11, "unknown_parameter"),
        (12, "invalid_json_line"),
    ]
    assert done.output_file_id is None and done.request_counts is not None and not done.request_counts.completed
    done = ended(client, start(client, b"\n\n"))
    assert done.errors is not None and done.errors.data is not None and done.errors.data[0].code == "empty_file"


def test_a_cancelled_batch_keeps_what_is_answered(client: OpenAI, served: Served) -> None:
    batch = start(client, lines(*(request(f"r{i}", max_tokens=100, ignore_eos=True) for i in range(200))))
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 3)  # type: ignore[union-attr]
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = ended(client, batch)
    assert done.status == "cancelled" and done.request_counts is not None
    assert len(content(client, done.output_file_id)) == done.request_counts.completed < 200
    with pytest.raises(openai.BadRequestError, match="the batch is cancelled"):
        client.batches.cancel(batch.id)
    until(served.idle)


def test_lists_have_pages(client: OpenAI) -> None:
    own = [start(client, lines(request(f"p{i}"))) for i in range(3)]
    for batch in own:
        ended(client, batch)
    page = client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == [own[2].id, own[1].id] and page.has_more
    assert next(batch.id for batch in page.get_next_page().data) == own[0].id
    assert [b.id for b in client.batches.list(limit=2)][:3] == [own[i].id for i in (2, 1, 0)]
    files = [file.id for file in client.files.list(limit=4)]
    assert len(files) == len(set(files)) > 6
    assert [f.id for f in client.files.list(order="asc", purpose="batch")][-1] == own[2].input_file_id
    with pytest.raises(openai.NotFoundError, match="after: there is no 'batch_x'"):
        client.batches.list(after="batch_x")


def test_files_come_and_go(client: OpenAI, served: Served) -> None:
    file = client.files.create(file=("räume.jsonl", b"x" * 70_000), purpose="batch")
    assert client.files.content(file.id).read() == b"x" * 70_000
    assert client.files.delete(file.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            call(file.id)
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=("big", b"x" * (2 << 20)), purpose="batch")
    assert refused.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="purpose: must be batch"):
        client.files.create(file=("a", b"x"), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError, match="there is no file 'file-x'"):
        client.batches.create(input_file_id="file-x", endpoint="/v1/completions", completion_window="24h")
    answer = served.client.post("/v1/files", json={"purpose": "batch"})
    assert answer.status_code == 400 and "multipart/form-data" in answer.json()["error"]["message"]
    answer = served.client.post("/v1/files", data={"purpose": "batch"}, files={"other": b"x"})
    assert answer.json()["error"]["param"] == "other"


def test_keys_see_their_own_files_only(folder: Path, tmp_path: Path) -> None:
    with serving(folder, data_dir=tmp_path, api_key="one,two", admin_api_key="boss") as server:
        one, two, boss = (OpenAI(base_url=f"{server.url}/v1", api_key=key) for key in ("one", "two", "boss"))
        done = ended(one, start(one, lines(request("a"))))
        for call, name in ((two.files.retrieve, done.output_file_id), (two.batches.retrieve, done.id)):
            with pytest.raises(openai.NotFoundError):
                call(str(name))
        with pytest.raises(openai.NotFoundError):
            two.batches.create(input_file_id=done.input_file_id, endpoint="/v1/completions", completion_window="24h")
        assert two.files.list().data == [] and two.batches.list().data == []
        assert boss.batches.retrieve(done.id).status == "completed" and len(boss.files.list().data) == 2


def test_without_a_folder_the_routes_say_how_to_get_one(folder: Path) -> None:
    with serving(folder) as server:
        for answer in (server.client.get("/v1/files"), server.client.get("/v1/batches/x")):
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "batches_are_off"
            assert "--data-dir" in answer.json()["error"]["message"]


def test_lines_that_are_late_are_said_to_be(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.batches.store.EXPIRES_AFTER", 0)
    with serving(folder, data_dir=tmp_path) as server, OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        wanted = [request(f"r{i}", max_tokens=100, ignore_eos=True) for i in range(200)]
        done = ended(client, start(client, lines(*wanted)))
        assert done.status == "expired" and done.expired_at is not None
        late, found = content(client, done.error_file_id), content(client, done.output_file_id)
        assert late and {entry["error"]["code"] for entry in late} == {"batch_expired"}
        assert [e["custom_id"] for e in sorted(late + found, key=lambda e: int(e["custom_id"][1:]))] == [
            entry["custom_id"] for entry in wanted
        ]


def test_a_folder_has_one_server_and_one_version(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="another server uses"):
        Store(tmp_path)
    store._db.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(ValueError, match="is of version 99"):
        Store(tmp_path)


def test_the_first_answer_of_a_line_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    path = store.new_path()
    path.write_bytes(lines(request("a")))
    stray = store.new_path()
    stray.write_text("left by a process that was killed")
    batch_id = store.add_batch("", store.add_file(path, "", "in", "batch")["id"], "/v1/completions", None)
    store.add_answers(batch_id, [(1, Answer(False, "first")), (2, Answer(True, "other"))])
    store.add_answers(batch_id, [(1, Answer(True, "second"))])
    store.close()
    store = Store(tmp_path)
    assert not stray.exists() and store.finished_lines(batch_id) == {1, 2}
    job = store.next_job()
    assert job is not None
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):  # as if killed when the files are there
        patched.setattr(store, "set_status", lambda *_, **__: 1 / 0)
        store.finish(job, "completed")
    assert store.next_job() == job
    store.finish(job, "completed")
    found = store.batch(batch_id, "")
    assert found["request_counts"] == {"total": 0, "completed": 1, "failed": 1}
    assert store.path(found["output_file_id"]).read_text() == "first\n"
    assert store.path(found["error_file_id"]).read_text() == "other\n"
    assert len(store.files("", None, None, 10, "asc")[0]) == 3
    assert store.next_job() is None
    store.close()


def test_long_lines_are_named_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(lines(request("a"), request("b", prompt="x" * 5000), request("c")))
    found = list(read_lines(path, None, 1000, 100))
    assert [type(entry) for entry in found] == [Line, LineError, Line]
    assert isinstance(found[1], LineError) and (found[1].number, found[1].code) == (2, "line_too_long")
    assert isinstance(found[2], Line) and (found[2].number, found[2].custom_id) == (3, "c")


def test_a_file_is_answered_on_the_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same answers as a server's, going on where a run that was killed has ended, and without its batches."""
    monkeypatch.setenv("LPA_SERVED_MODEL_NAME", "tiny")
    monkeypatch.setenv("LPA_DATA_DIR", str(tmp_path / "data"))
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines(*(request(f"r{i}") for i in range(6)), request("wrong", max_tokens=-1)))
    command = ["run-batch", str(source), str(output), "--model", str(folder), "--dtype", "float32"]
    earlier = b'{"id":"x","custom_id":"r4","response":null,"error":null}\n'
    output.with_name("out.jsonl.part").write_bytes(earlier + b'{"id":"y","custom_id":"r5","resp')
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}: 7 lines, 1 of them failed\n"
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [entry["custom_id"] for entry in found] == [*(f"r{i}" for i in range(6)), "wrong"]
    assert [entry["response"] and entry["response"]["status_code"] for entry in found] == [200] * 4 + [None, 200, 400]
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}
    source.write_bytes(lines(request("a")) + b"{\n{\n")
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"{source}:2: the line is not valid JSON" in result.stderr and "1 more lines are wrong" in result.stderr
