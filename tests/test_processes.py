"""Processes that are sent signals, killed or left by their engine: how they end, and what they leave. And our clients
over TLS, which read once in a process whom they trust."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from openai import OpenAI
from openai.types import Batch

from lpa_model.config import Architecture
from lpa_model.train.metrics import read_metrics
from tests import faults
from tests.processes import URL, Forked, forked
from tests.serving import serving, until
from tests.test_batches import content, ended, lines, request, start
from tests.test_cli import training_run
from tests.test_listen import write_certificates

COMPLETIONS = "/v1/completions"
STEPS = 24


@pytest.fixture
def folder(tiny_checkpoints: dict[Architecture, Path]) -> Path:
    return tiny_checkpoints["setting2"]


@pytest.fixture
def run(tmp_path: Path) -> list[object]:
    """Arguments of a training run of a tiny model, all but --steps."""
    return training_run(tmp_path)


def test_a_signal_while_the_model_is_loaded_ends_the_process_at_once(folder: Path, tmp_path: Path) -> None:
    commands: list[tuple[list[object], signal.Signals]] = [
        (["serve", folder, "--port", 0], signal.SIGTERM),
        (["serve", folder, "--port", 0], signal.SIGINT),
        (["generate", "a", "--model", folder], signal.SIGINT),
    ]
    for command, number in commands:
        with forked(tmp_path, *command, fault=faults.slow_loading) as process:
            process.printed("loading\n")
            process.send_signal(number)
            assert process.wait(200) == 128 + number, process.err  # the load takes five minutes
            assert process.err.splitlines()[-1] == f"lpa: ended by {number.name} before the model was loaded"


def serving_process(
    folder: Path, tmp_path: Path, fault: Callable[[], None], *arguments: object
) -> AbstractContextManager[Forked]:
    return forked(tmp_path, "serve", folder, "--port", 0, "--kv-cache-memory", 1 << 20, *arguments, fault=fault)


def test_a_second_signal_breaks_streams_and_the_process_says_so_by_its_status(folder: Path, tmp_path: Path) -> None:
    body = {"model": folder.name, "prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with serving_process(folder, tmp_path, faults.slow_steps, "--drain-timeout", 300) as process:
        url = process.printed(URL.pattern).rstrip("/")
        with httpx.stream("POST", url + COMPLETIONS, json=body, timeout=600) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/ready", timeout=600).status_code == 503)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 1, process.err
        assert "a second signal" in process.err


def test_a_huge_text_that_is_being_tokenized_does_not_hold_the_end(folder: Path, tmp_path: Path) -> None:
    body = {"model": folder.name, "prompt": "x" * 50000}
    with serving_process(folder, tmp_path, faults.slow_huge_texts, "--drain-timeout", 0.1) as process:
        url = process.printed(URL.pattern).rstrip("/")

        def post() -> httpx.Response | httpx.HTTPError:
            try:
                return httpx.post(url + COMPLETIONS, json=body, timeout=600)
            except httpx.HTTPError as error:
                return error

        found: list[httpx.Response | httpx.HTTPError] = []
        thread = threading.Thread(target=lambda: found.append(post()))
        thread.start()
        process.printed("tokenizing\n")
        process.send_signal(signal.SIGTERM)
        process.wait(200)  # tokenizing takes five minutes
        thread.join(600)
    assert isinstance(found[0], httpx.HTTPError) or found[0].status_code >= 500


def test_the_process_ends_with_0_after_a_signal_and_1_when_the_engine_died(folder: Path, tmp_path: Path) -> None:
    asked = ("serve", folder, "--port", 0, "--log-format", "json", "--kv-cache-memory", 1 << 20)
    statuses, lines = [], []
    for fault, status in ((None, 0), (faults.broken_steps, 1)):
        with forked(tmp_path, *asked, fault=fault) as process:
            process.printed(r"curl .*\n")
            greeting = process.out
            url = re.findall(r"http://127\.0\.0\.1:\d+", greeting)[0]
            command = shlex.split(greeting.splitlines()[2])  # the curl line, as a person would paste it
            body = json.loads(command[command.index("-d") + 1])
            assert command[:2] == ["curl", url + COMPLETIONS]
            for _ in range(3):
                statuses.append(httpx.post(command[1], json=body, timeout=600).status_code)
            if fault is None:
                process.send_signal(signal.SIGTERM)
            assert process.wait() == status
            lines += [json.loads(line) for line in process.err.splitlines()]
    assert statuses == [200] * 3 + [500] * 3
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert sum(line.get("path") == COMPLETIONS and line["status"] == 200 for line in lines) == 3
    assert any("no more" in line.get("exception", "") for line in lines)


@contextmanager
def killed_at_the_end(folder: Path, data: Path) -> Iterator[OpenAI]:
    """A client of a server in a process of its own, that SIGKILL ends."""
    flags = {"served-model-name": "tiny", "data-dir": data, "weights": "float32", "port": 0}
    flags |= {"kv-cache-memory": 1 << 22, "max-num-seqs": 4, "log-level": "warning"}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    with forked(data.parent, "serve", folder, *arguments) as process:
        url = process.printed(URL.pattern).rstrip("/")
        with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            yield client


def answered(client: OpenAI, batch: Batch) -> int:
    counts = client.batches.retrieve(batch.id).request_counts
    assert counts is not None
    return counts.completed


def test_a_killed_server_loses_no_line_and_repeats_none(folder: Path, tmp_path: Path) -> None:
    """Killed in the middle of a batch, whose output is that of an uninterrupted run; twenty times in tests/extra."""
    wanted = [request(f"r{i}", max_tokens=8, seed=i, temperature=1.0) for i in range(60)]
    with serving(folder, data_dir=tmp_path / "calm") as server, OpenAI(base_url=f"{server.url}/v1", api_key="x") as one:
        calm = content(one, ended(one, start(one, lines(*wanted))).output_file_id)
    with killed_at_the_end(folder, tmp_path / "data") as client:
        batch = start(client, lines(*wanted))
        until(lambda: answered(client, batch) >= 10)
    with killed_at_the_end(folder, tmp_path / "data") as client:
        assert answered(client, batch) < 60
        done = ended(client, batch)
        found = content(client, done.output_file_id)
    assert done.request_counts is not None
    assert (done.status, done.request_counts.completed, done.request_counts.total) == ("completed", 60, 60)
    for entries in (calm, found):
        for entry in entries:
            assert entry.pop("id") == entry["response"].pop("request_id")
            del entry["response"]["body"]["id"], entry["response"]["body"]["created"]
    assert found == calm


def test_our_own_clients_speak_https(folder: Path, tmp_path: Path) -> None:
    certificates = write_certificates(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the sea and a gull")
    with serving(folder, ssl_certfile=certificates / "both.pem") as served:
        url = f"https://localhost:{served.server.port}"

        def lpa(*arguments: object, **environment: str) -> tuple[int, str]:
            with forked(tmp_path, *arguments, **environment) as process:
                return process.wait(), process.err

        trusting = {"SSL_CERT_FILE": str(certificates / "server.pem")}
        status, errors = lpa("score", text, "--url", url, **trusting)
        assert status == 0, errors
        few = ("--input-len", 4, "--output-len", 2, "--concurrency", 2, "--rounds", 1, "--vocab-size", 100)
        status, errors = lpa("bench", "serve", url, *few, **trusting)
        assert status == 0, errors
        status, errors = lpa("score", text, "--url", url)
        assert status == 2
        assert "its certificate is not trusted (self-signed certificate)" in " ".join(errors.split())
        assert "SSL_CERT_FILE" in errors


def test_a_training_run_that_is_interrupted_goes_on(run: list[object], tmp_path: Path) -> None:
    rare = ("--validate-every", 1_000_000, "--checkpoint-every", 1_000_000)
    with forked(tmp_path, *run, "--steps", 1_000_000, *rare) as training:
        training.printed("^step 50: ")
        training.send_signal(signal.SIGINT)
        assert training.wait() == 130
    step = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"]
    assert step >= 50
    assert re.search(
        rf"saving after this step; .*\nstopped at step {step}: the model is in .*/run/model, and the same .*\n\Z",
        training.err,
    )
    with forked(tmp_path, "generate", "The", "--model", tmp_path / "run" / "model", "--max-tokens", 2) as generating:
        assert generating.wait() == 0, generating.err
    with forked(tmp_path, *run, "--steps", step + 2, "--validate-every", 1) as again:
        assert again.wait() == 0, again.err
    assert re.findall(r"^step (\d+):", again.out, re.MULTILINE) == [str(step + 1), str(step + 2)]


def test_stopping_while_the_text_is_tokenized_is_said_and_ends_at_once(run: list[object], tmp_path: Path) -> None:
    rng = random.Random(0)
    words = (" ".join(rng.randbytes(8).hex() for _ in range(20)) for _ in range(10_000))  # takes many seconds
    (tmp_path / "large.txt").write_text("\n".join(words))
    with forked(tmp_path, *run, "--data", tmp_path / "large.txt", "--vocab-size", 20_000) as training:
        until((tmp_path / "run").exists)
        time.sleep(0.2)
        training.send_signal(signal.SIGINT)
        assert training.wait() == 130
    assert training.err.endswith(
        "stopped while the text was tokenized: no step is done, and the same command begins again\n"
    )
    assert not (tmp_path / "run" / "tokens.safetensors").exists()


def test_a_training_run_that_is_killed_at_any_moment_ends_the_same(run: list[object], tmp_path: Path) -> None:
    """With a state after every second step, so that much of the time is writing."""

    def train(out: str) -> AbstractContextManager[Forked]:
        return forked(tmp_path, *run, "--out", tmp_path / out, "--steps", STEPS, "--validate-every", 3)

    for out in ("first", "whole"):  # the process that is forked does its imports before the first
        began = time.perf_counter()
        with train(out) as process:
            assert process.wait() == 0, process.err
        seconds = time.perf_counter() - began
    killed, moments = 0, random.Random(0)
    for _ in range(5):
        with train("killed") as process:
            killed += process.wait_or_kill(moments.uniform(0.1, 0.7) * seconds) == -signal.SIGKILL
    with train("killed") as process:
        assert process.wait() == 0 and killed > 0, process.err
    ours, expected = (
        torch.load(tmp_path / out / "state.pt", weights_only=True)["model"] for out in ("killed", "whole")
    )
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    found, wanted = (read_metrics(tmp_path / name / "metrics.csv") for name in ("killed", "whole"))
    assert [row.step for row in wanted] == list(range(1, STEPS + 1))
    assert [dataclasses.replace(row, tokens_per_second=0) for row in found] == [
        dataclasses.replace(row, tokens_per_second=0) for row in wanted
    ]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        same = [(tmp_path / which / "model" / name).read_bytes() for which in ("killed", "whole")]
        assert same[0] == same[1], name
