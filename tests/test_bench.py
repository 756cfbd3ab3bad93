"""The HTTP benchmarks against real tiny servers: every token is counted, nothing is timed against a limit."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from lpa_model.config import Architecture, LPAConfig
from server.bench.floor import decode_work, prompt_work
from server.bench.load import Load, Timing, prompts, quantile, run_load, summarize
from server.bench.report import _ms
from server.bench.rounds import _stopped, medians, ratios
from server.bench.score import score_text
from server.bench.serve import read_stream, spread
from server.bench.step import PARTS, print_rows
from server.bench.stopwatch import Stopwatch
from server.cli import app
from server.client import Client, RequestFailed
from tests.test_http import Served, serving
from tests.tiny import VOCAB_SIZE, random_model, tiny_config, write_checkpoint


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(write_checkpoint(tmp_path_factory.mktemp("model"), tiny_config())) as server:
        yield server


def lpa(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


def report(*arguments: object) -> dict[str, Any]:
    result = lpa(*arguments, "--json", "--vocab-size", VOCAB_SIZE)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_serve_counts_what_the_server_counts_and_meets_no_cache(served: Served) -> None:
    names = ("lpa:prompt_tokens_total", "lpa:generation_tokens_total", "lpa:prefix_cache_hits_total")
    names = tuple(f'{name}{{model_name="tiny"}}' for name in names)
    before = [served.metric(name) for name in names]
    found = report(
        "serve", served.url, "--input-len", 40, "--output-len", 24, "--concurrency", 3, "--requests", 7, "--rounds", 2
    )
    (server,) = found["servers"]
    assert (server["model"], server["errors"], "ratio" in found) == ("tiny", [], False)
    for summary in server["rounds"]:
        assert (summary["requests"], summary["errors"]) == (7, 0)
        assert (summary["input_tokens"], summary["output_tokens"]) == (7 * 40, 7 * 24)
        for latency in ("ttft_ms", "inter_token_ms", "e2e_ms"):
            assert 0 <= summary[latency]["median"] <= summary[latency]["p90"] <= summary[latency]["p99"]
        assert summary["ttft_ms"]["p99"] <= summary["e2e_ms"]["p99"] <= 1e3 * summary["elapsed_s"]
    after = [served.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        3 * 7 * 40,
        3 * 7 * 24,
        0,
    ]  # two rounds and the first


def test_two_servers_take_turns_and_are_compared_round_by_round(served: Served) -> None:
    asked = ("serve", served.url, "--compare", served.url, "--output-len", 3, "--input-len", 5, "--concurrency", 2)
    found = report(*asked, "--rate", 500, "--connection-per-request")
    first, second = found["servers"]
    assert len(first["rounds"]) == len(second["rounds"]) == 5
    for name in ("output_tokens_per_s", "input_tokens_per_s"):
        quotients = [a[name] / b[name] for a, b in zip(first["rounds"], second["rounds"], strict=True)]
        assert found["ratio"][name]["rounds"] == pytest.approx(quotients)
        assert found["ratio"][name]["median"] == pytest.approx(np.median(quotients))
    table = lpa(*asked, "--vocab-size", VOCAB_SIZE)
    assert table.exit_code == 0
    assert "output tokens/s" in table.stdout
    refused = lpa(*asked, "--rounds", 4)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == "lpa: rounds: a comparison takes 5 or more, not 4\n"


def test_score_gives_the_models_own_likelihood_by_every_route(served: Served) -> None:
    asked = ("score", served.url, "--length", 30, "--requests", 4, "--concurrency", 3, "--seed", 5)
    found = report(*asked, "--compare", served.url, "--compare-api", "echo")
    model = random_model(tiny_config())
    for number in range(5):
        nll = 0.0
        for text in prompts(5, number + 1, 4, 30, VOCAB_SIZE):
            logprobs = model.logits(model(torch.tensor([text]))[0]).log_softmax(-1)
            nll -= float(logprobs[range(29), text[1:]].sum())
        for server in found["servers"]:
            assert server["rounds"][number]["mean_nll"] == pytest.approx(nll / (4 * 29), rel=1e-5)
            assert server["rounds"][number]["input_tokens"] == 4 * 30
    assert set(found["ratio"]) == {"input_tokens_per_s", "e2e_ms"}


def test_a_server_that_refuses_everything_is_one_line(served: Served) -> None:
    result = lpa("serve", served.url, "--input-len", 200, "--requests", 2, "--rounds", 1, "--vocab-size", VOCAB_SIZE)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "/v1/completions: status 400: prompt" in result.stderr
    assert lpa("serve", "127.0.0.1:8000").stderr == "lpa: 127.0.0.1:8000: not an http:// or https:// URL\n"


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def scripted(answer: Answer, use: Callable[[Client], Awaitable[Any]], **options: Any) -> Any:
    """Talk to a server that does what a test says on every connection, until the client goes away."""

    handlers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError):
            await answer(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", **options)
    async with server:
        try:
            return await use(client)
        finally:
            await client.close()
            await asyncio.gather(*filter(None, handlers))


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
    return head, await reader.readexactly(length)


def chunked(*pieces: bytes, status: str = "200 OK") -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))
    return f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + body


async def test_connections_are_used_again_unless_told_otherwise_and_replaced_when_dropped() -> None:
    connections: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        for _ in range(2):  # then the server drops it
            head, body = await read_request(reader)
            assert head.startswith("POST /v1/x HTTP/1.1\r\n")
            assert "Authorization: Bearer secret\r\n" in head
            connections[-1] += 1
            data = chunked(b'{"got": ', body, b"}")
            writer.write(data[:40])  # cut anywhere
            await asyncio.sleep(0.01)
            writer.write(data[40:])
            await writer.drain()
            if "Connection: close" in head:
                break

    async def use(client: Client) -> list[Any]:
        answers = []
        for i in range(4):
            answers.append(await client.json("POST", "/v1/x", {"i": i}))
            await asyncio.sleep(0.05)
        return answers

    expected = [{"got": {"i": i}} for i in range(4)]
    assert await scripted(answer, use, api_key="secret") == expected
    assert connections == [2, 2]
    connections.clear()
    assert await scripted(answer, use, api_key="secret", keep_alive=False) == expected
    assert connections == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (chunked(b"no such model", status="404 Not Found"), "/v1/x: status 404: no such model"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "in the middle of the answer"),
        (b"", "ended before an answer"),
        (b"220 mail ready\r\n", "/v1/x: the answer is no HTTP"),
    ],
    ids=["status", "cut", "silence", "another protocol"],
)
async def test_failed_answers_are_errors(data: bytes, message: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(data)

    with pytest.raises(RequestFailed, match=message):
        await scripted(answer, lambda client: client.json("POST", "/v1/x", {}))


async def test_a_text_that_is_scored_in_part_is_an_error_and_vllms_form_is_read() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            prompt = json.loads((await read_request(reader))[1])["prompt"]
            entries = [{str(t): {"logprob": -t / 8}, "7": {"logprob": -0.5}} for t in prompt[1:]]
            choice = {"prompt_logprobs": [None, *(entries if prompt[0] else entries[1:])]}
            writer.write(chunked(json.dumps({"choices": [choice]}).encode()))

    async def use(client: Client) -> tuple[list[Timing], float]:
        load = Load(requests=2, concurrency=1)
        texts = [[1, 2, 3, 4], [0, 2, 3, 4]]
        return await run_load(client, texts, load, score_text("prompt_logprobs", "m"), 0, lambda timing: None)

    timings, elapsed = await scripted(answer, use)
    assert (timings[0].nll, timings[0].error) == ((2 + 3 + 4) / 8, None)
    assert timings[1].error is not None
    summary = summarize(timings, elapsed)
    assert (summary["errors"], summary["input_tokens"]) == (1, 4)


STREAM = (
    'data: {"choices": [{"text": "ça"}]}\n\n: a comment\n\ndata:{"choices": [{"text": " va"}], "usage": null}\r\n\r\n'
    'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\ndata: [DONE]\n\n'
).encode()


@given(st.lists(st.integers(0, len(STREAM))))
def test_a_stream_is_read_wherever_it_is_cut(cuts: list[int]) -> None:
    """An event has come when the piece with the end of its line has; one that comes with the first has no gap."""
    bounds = [0, *sorted(cuts), len(STREAM)]
    arrivals = [(float(end), STREAM[start:end]) for start, end in itertools.pairwise(bounds)]
    timing = Timing(1)
    read_stream(arrivals, timing)
    first, second = (
        min(bound for bound in bounds if bound > STREAM.index(b"\n", STREAM.index(text)))
        for text in ("ça".encode(), b" va")
    )
    assert (timing.first, timing.gaps, timing.output_tokens) == (first, [second - first] if second > first else [], 5)


@given(st.lists(st.tuples(st.integers(2, 100), st.integers(1, 9)), min_size=2, max_size=20), st.floats(0, 1e-5))
def test_bunched_events_share_the_time_since_the_bunch_before(bunches: list[tuple[int, int]], apart: float) -> None:
    """Bunches of events, milliseconds apart, their events a few microseconds apart or none at all."""
    arrivals, expected, at = [], [], 0.0
    for number, (ms, count) in enumerate(bunches):
        at += ms / 1e3
        arrivals += [at + i * apart for i in range(count)]
        expected += [ms / 1e3 / count] * count if number else []
    assert spread(arrivals) == pytest.approx(expected)
    assert sum(spread(arrivals)) == pytest.approx(at - arrivals[0])  # no time is lost
    assert spread(arrivals[:1]) == []


def test_tables_show_no_latency_as_zero() -> None:
    assert [_ms(value) for value in (1234.56, 12.34, 0.5, 0.0312, 0.00057)] == [
        "1,234.6",
        "12.3",
        "0.5",
        "0.031",
        "0.00057",
    ]


def test_a_refusal_names_the_url_and_is_all_that_is_printed() -> None:
    with socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for command in ("serve", "score", "health"):
            done = CliRunner().invoke(app, ["bench", command, f"{url}/v1"])
            assert (done.exit_code, done.stderr) == (2, f"lpa: {url}/v1/models: Connection refused\n")


def test_a_stream_with_an_error_or_without_an_end_is_an_error() -> None:
    for data, message in ((STREAM[:-8], "without .DONE."), (b'data: {"error": {"message": "no"}}\n\n' + STREAM, "no")):
        with pytest.raises(RequestFailed, match=message):
            read_stream([(0.0, data)], Timing(1))


def test_prompts_follow_from_the_seed_and_differ_between_rounds() -> None:
    first = prompts(1, 1, 3, 50, 1000)
    assert first == prompts(1, 1, 3, 50, 1000)
    beginnings = {
        tuple(text[:8]) for seed in (1, 2) for number in (1, 2) for text in prompts(seed, number, 3, 50, 1000)
    }
    assert len(beginnings) == 12
    assert all(0 <= token < 1000 for text in first for token in text)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values: list[float], q: float) -> None:
    assert quantile(values, q) == pytest.approx(np.quantile(values, q), rel=1e-9, abs=1e-9)


def test_medians_and_ratios_of_rounds() -> None:
    mine = [
        {"output_tokens_per_s": rate, "e2e_ms": {"median": 10.0, "p90": 20.0}, "errors": 0} for rate in (10, 40, 30)
    ]
    theirs = [{"output_tokens_per_s": 10.0, "e2e_ms": {"median": 5.0, "p90": 9.0}, "errors": 0} for _ in range(3)]
    assert medians(mine) == {"output_tokens_per_s": 30, "e2e_ms": {"median": 10, "p90": 20}, "errors": 0}
    found = ratios(mine, theirs)
    assert found["output_tokens_per_s"] == {"median": 3, "low": 1, "high": 4, "rounds": [1, 4, 3]}
    assert found["e2e_ms"]["median"] == 2


def test_the_idle_server_is_stopped_with_its_children_and_goes_on_afterwards() -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pids = (process.pid, int(process.stdout.readline()))
        with pytest.raises(KeyError), _stopped([process.pid]):
            assert [state(pid) for pid in pids] == ["T", "T"]
            raise KeyError
        assert [state(pid) for pid in pids] == ["S", "S"]
    finally:
        subprocess.run(["kill", str(pids[1])], check=True)
        process.wait(600)
        assert process.stdout is not None
        process.stdout.close()


def state(pid: int) -> str:
    """The letter that Linux gives a process's state, once it has settled."""
    time.sleep(0.05)
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.parametrize("layout", ["full", None])
def test_step_times_every_kind_of_work_and_its_parts_add_up(
    architecture: Architecture, tmp_path: Path, layout: str | None
) -> None:
    folder = write_checkpoint(tmp_path / "m", tiny_config(architecture))
    arguments = ["--batch", 2, "--batch", 3, "--context", 20, "--steps", 4, "--threads", 1, "--dtype", "float32"]
    if layout is not None:
        arguments += ["--layout", layout]
    result = lpa("step", "--model", folder, *arguments, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    layouts = ["full"] if layout else ["latent", "full"] if architecture == "setting1" else ["mixed", "full"]
    kinds = ("score", "prefill", "decode")
    assert {(row["layout"], row["batch"], row["kind"]) for row in rows} == {
        (name, batch, kind) for name in layouts for batch in (2, 3) for kind in kinds
    }
    for row in rows:
        tokens = row["batch"] * (1 if row["kind"] == "decode" else 20)
        assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["ms"])
        assert row["gap"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert set(row["parts_ms"]) == {"forward", "head", "sampling", "scheduling", "detokenization"}
        assert all(part >= 0 for part in row["parts_ms"].values())
        assert row["parts_ms"]["forward"] > 0
        assert (row["parts_ms"]["detokenization"] > 0) == (row["kind"] != "score")
    if architecture == "setting1" and layout is None:  # once
        table = lpa("step", "--model", folder, *arguments)
        assert table.exit_code == 0
        assert "floor ms" in table.stdout


def test_the_table_of_steps_ends_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"kind": "decode", "layout": "full", "batch": 1, "context": 8, "ms": 2.0, "tokens_per_s": 500.0, "gap": 2.0}
    floors = {"floor_ms": 1.0, "bandwidth_gb_per_s": 9.0, "gemm_gflops": 40.0, "parts_ms": dict.fromkeys(PARTS, 0.4)}
    assert print_rows(iter([row | floors])) == [row | floors]
    *table, border, parts, end = capsys.readouterr().out.split("\n")
    assert "decode" in table[-1]
    assert set(border) == set("└─┴┘")
    assert parts.startswith("Parts: ")
    assert end == ""


def test_mistakes_with_step_are_one_line(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tiny_config())
    for option, value, message in (
        ("--context", 120, "context: 120 and 20 steps exceed the model's 128 positions"),
        ("--layout", "flat", "layout: 'flat' is none of latent, mixed, full"),
    ):
        result = lpa("step", "--model", folder, option, value)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"lpa: {message}\n")


CONFIGS = {
    "setting1": tiny_config("setting1", num_key_value_heads=2, head_dim=6),
    "setting1-low-ffn": tiny_config("setting1", ffn_rank=5),
    "setting2": tiny_config(num_key_value_heads=2),
    "setting2-dense": tiny_config(attention_rank=None, tie_word_embeddings=True),
    "setting2-per-layer": tiny_config(attention_rank={"q": 8, "k": [None, 6], "v": [5, None], "o": 8}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_floor_counts_what_the_model_computes(config: LPAConfig) -> None:
    """The products of the plain forward, counted by torch; its attention is not masked, so it does a square."""
    model, length = random_model(config), 24
    matrices = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in matrices)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(model(torch.zeros(3, length, dtype=torch.int64)))
    attention = 2 * config.num_attention_heads * config.head_size * config.num_hidden_layers
    work = prompt_work(config, "float32", 3, length, length)
    triangle = attention * length * (length + 1) / 2
    assert work.operations == 2 * 3 * (length * weights + triangle)
    square = 2 * 3 * attention * length * length
    assert counter.get_total_flops() == work.operations - 2 * 3 * triangle + square
    assert work.bytes == 4 * weights

    decode = decode_work(config, "full", torch.bfloat16, "bfloat16", 5, 100)
    assert decode.bytes == 2 * (weights + 5 * 100 * config.cache_elements_per_token("full"))
    assert decode.operations == 2 * 5 * (weights + 100 * attention)
    head = config.vocab_size * config.hidden_size
    eight = decode_work(config, "full", torch.int8, "bfloat16", 5, 100)  # codes, and two bytes of scale for each head
    rows = 2 * config.kv_heads * config.num_hidden_layers
    assert eight.bytes == 2 * weights + 5 * 100 * (config.cache_elements_per_token("full") + 2 * rows)
    few = decode_work(config, "full", torch.float32, "int4", 1, 0)  # the head in int8
    assert few.bytes == (weights - head) * 0.5625 + head * 1.0625


def test_latents_cost_what_the_absorbed_products_cost() -> None:
    config = tiny_config("setting1")  # two layers, four heads of 8, rank 8: a latent has the width of a head
    assert decode_work(config, "latent", torch.float32, "float32", 1, 10).operations == (
        decode_work(config, "full", torch.float32, "float32", 1, 10).operations
    )
    rotary = tiny_config()
    extra = decode_work(rotary, "latent", torch.float32, "float32", 1, 10).operations
    assert (
        extra - decode_work(rotary, "mixed", torch.float32, "float32", 1, 10).operations == 2 * 10 * 2 * 8 * 32
    )  # keys rebuilt


def test_overhead_finds_the_steps_in_which_all_stream(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tiny_config())
    sizes = ["--streams", 3, "--input-len", 10, "--output-len", 60]
    result = lpa("overhead", "--model", folder, *sizes, "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["streams"] == 3
    assert 0 < found["steps"] <= 2 * 58  # of two rounds
    assert 0 < found["run_ms"] < found["step_ms"]
    assert 0 < found["outside"] < 1
    assert found["event_loop_cpu_ms"] > found["metrics_ms"] > 0
    assert found["metrics"] == pytest.approx(found["metrics_ms"] / found["step_ms"])
    assert found["slowdown"] == pytest.approx(found["step_ms"] / found["alone_ms"])
    too_short = lpa("overhead", "--model", folder, *sizes[:-1], 2, "--dtype", "float32")
    assert too_short.exit_code == 2
    assert "no two steps in a row had all 3" in too_short.stderr


def test_loglikelihood_compares_sets_with_pairs_one_by_one(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tiny_config())
    sizes = ["--sets", 3, "--context-len", 40, "--continuation-len", 5, "--rounds", 2, "--dtype", "float32"]
    result = lpa("loglikelihood", folder, *sizes, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert len(found["shared_s"]) == len(found["separate_s"]) == 2
    ratios = sorted(b / a for a, b in zip(found["shared_s"], found["separate_s"], strict=True))
    assert found["speedup"] == {"median": pytest.approx(sum(ratios) / 2), "low": ratios[0], "high": ratios[1]}
    assert found["bound"] == 4 * 45 / (40 + 4 * 5)
    assert 0 <= found["difference"] < 1e-3
    assert "3 contexts of 40 tokens with 4 continuations of 5" in lpa("loglikelihood", folder, *sizes).stdout
    too_long = lpa("loglikelihood", folder, "--context-len", 200, "--dtype", "float32")
    assert (too_long.exit_code, "maximum context length is 128 tokens" in too_long.stderr) == (2, True)


def test_a_stopwatch_leaves_what_it_watched_as_it_was() -> None:
    class Thing:
        def work(self, n: int) -> int:
            return n + 1

    thing, watch = Thing(), Stopwatch()
    with watch.watch(thing, "work", "one"), watch.watch(Thing, "work", "all"):
        assert (thing.work(1), Thing().work(2)) == (2, 3)
    assert watch.calls == {"one": 1, "all": 1}
    assert not vars(thing)
    assert thing.work(1) == 2
    assert watch.calls == {"one": 1, "all": 1}
