"""The CUDA backend on a CPU: its kernels' twins, and functions in the place of graphs; what replays, and what waits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lpa_model.backends import select
from lpa_model.backends.base import SamplingRow
from lpa_model.backends.cuda.backend import CudaBackend
from lpa_model.backends.cuda.graphs import buckets, capture
from lpa_model.backends.cuda.twins import TWINS
from lpa_model.batch import Batch, ScoredRows, Span
from server.engine.engine import Engine, build_engine
from server.engine.request import Request, SamplingParams
from server.llm import LLM
from server.settings import load_settings
from tests.test_cuda import PARAMS
from tests.test_engine import assert_greedy, greedy, ids_of, make_engine, naive_logprobs, prompt, run
from tests.tiny import random_model, tiny_config

CPU = torch.device("cpu")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "index.bool")


class NoReads(TorchDispatchMode):
    """Every operation whose result's shape, or what runs next, hangs on a tensor's numbers raises."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        assert not any(name.startswith(read) for read in READS), f"{name} waits for the device"
        if name.startswith(("index.", "index_put")):
            assert all(i is None or i.dtype is not torch.bool for i in args[1]), "a mask as an index waits"
        return func(*args, **(kwargs or {}))


def write(*arguments: Any) -> None:
    """The one twin of a decode step that waits, where its kernel does not: padding rows are left out by a mask."""
    with _disable_current_modes():
        TWINS.rotate_and_write(*arguments)


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPA_CUDA", "twins")


def decode_batch(context: int, rows: int) -> Batch:
    return Batch.build([3 + i for i in range(rows)], [Span(context, 1, [i], True) for i in range(rows)], 32)


def loaded(layout: Any, rows: int = 8, **changes: Any) -> CudaBackend:
    """With `rows` sequences of 5 tokens in the cache."""
    backend = CudaBackend(random_model(tiny_config(**changes)), "twins", TWINS._replace(rotate_and_write=write), False)
    backend.make_cache(layout, 16, 32)
    backend.warm_up(rows, 64)
    batch = Batch.build(list(range(5)) * rows, [Span(0, 5, [i], False) for i in range(rows)], 32)
    backend.collect(backend.submit(batch, []), {})
    return backend


@pytest.mark.parametrize("most", [1, 2, 3, 16, 32, 33, 64, 200, 256])
def test_buckets_grow_to_the_most_rows(most: int) -> None:
    found = buckets(most)
    assert found == sorted(set(found)) and found[-1] == most and len(found) <= 8 + most // 16
    assert all(b <= max(2 * a, a + 32) for a, b in itertools.pairwise(found))


def test_captures_are_bounded_and_the_rest_is_named() -> None:
    order: list[tuple[int, str]] = []

    def run(size: int, name: str) -> None:
        order.append((size, name))

    runs = {size: [lambda s=size, n=name: run(s, n) for name in "ab"] for size in (1, 4, 2)}  # type: ignore[misc]
    first, second = capture(runs, CPU)
    assert order == [(4, "a"), (4, "b"), (2, "a"), (2, "b"), (1, "a"), (1, "b")]
    assert [first.bucket(rows) for rows in (1, 3, 4, 5)] == [1, 4, 4, None]
    second.replay(2)
    assert order[-1] == (2, "b")
    first, second = capture(runs, CPU, most_seconds=0.0)
    assert list(first.replays) == [4] and sorted(second.left_out) == [1, 2]
    assert first.bucket(1) == 4 and "seconds" in first.left_out[1]
    assert capture({}, CPU) == []


@pytest.mark.parametrize(("architecture", "layout"), [("setting1", "latent"), ("setting2", "mixed")])
def test_steps_of_generated_tokens_replay_without_a_wait(architecture: Any, layout: Any) -> None:
    backend = loaded(layout, architecture=architecture)
    replayed: list[int] = []
    replays = dict(backend.graphs.replays)
    backend.graphs.replays = {
        size: lambda size=size: (replayed.append(size), replays[size]())[1]  # type: ignore[misc]
        for size in replays
    }
    rows = [SamplingRow(row=i, temperature=(0.0, 0.8)[i % 2], draws=lambda attempt: 0.3) for i in range(3)]
    with torch.inference_mode(), NoReads():
        handle = backend.submit(decode_batch(5, 3), rows)
    assert replayed == [4]
    tokens = backend.collect(handle, {}).tokens
    # the same, operation by operation
    backend.graphs.replays = {}
    with torch.inference_mode(), NoReads():
        handle = backend.submit(decode_batch(5, 3), rows)
    assert backend.collect(handle, {}).tokens == tokens and None not in tokens


@pytest.mark.parametrize("context", [62, 63])
def test_a_longer_sequence_than_was_captured_is_launched(context: int) -> None:
    backend = loaded("mixed", rows=1)
    backend.warm_up(1, 63)
    batch = Batch.build([3], [Span(context, 1, [0, 1], True)], 32)
    assert backend._bucket(batch) == (1 if context < 63 else None)
    assert backend.collect(backend.submit(batch, [SamplingRow(row=0)]), {}).tokens != [None]


def test_scored_rows_beside_sampled_ones_and_hidden_states() -> None:
    backend, reference = loaded("mixed"), random_model(tiny_config())
    scored = ScoredRows(np.array([0, 2]), np.array([7, 8]), np.array([2, 2]))
    hidden = {0: np.array([1]), 2: np.array([0, 1])}
    batch = Batch.build([3, 4, 5], [Span(0, 3, [9], False)], 32, scored=scored, hidden=hidden)
    result = backend.collect(backend.submit(batch, [SamplingRow(row=2, temperature=0.0, logprobs=1)]), {})
    inner: list[torch.Tensor] = []
    last = reference(torch.tensor([[3, 4, 5]]), on_layer=lambda layer, x: inner.append(x[0].clone()))[0]
    logprobs = reference.logits(last).log_softmax(-1)
    assert result.tokens == [int(logprobs[2].argmax())]
    assert result.scores[0].logprobs[0] == pytest.approx(float(logprobs[2].max()), abs=1e-4)
    assert result.prompt_scores.logprobs == pytest.approx([float(logprobs[0, 7]), float(logprobs[2, 8])], abs=1e-4)
    np.testing.assert_allclose(result.hidden[0], inner[0][1:2], atol=1e-4)
    np.testing.assert_allclose(result.hidden[2], last[:2], atol=1e-4)


@torch.inference_mode()
def test_rows_that_are_not_finite_are_named() -> None:
    backend = loaded("mixed")
    assert backend._cache is not None
    backend._cache.values[0][1, :, 2] = float("nan")  # a token of the second sequence
    for temperature in (0.0, 1.0):
        rows = [SamplingRow(row=i, temperature=temperature, draws=lambda attempt: 0.5) for i in range(3)]
        result = backend.collect(backend.submit(decode_batch(5, 3), rows), {})
        assert result.broken == {1} and result.tokens[1] is None and None not in result.tokens[::2]


@pytest.mark.parametrize("layout", ["full", "mixed", "latent"])
def test_an_engine_gives_the_same_texts(layout: str, twins: None, tiny_checkpoint: Path) -> None:
    """Prompts in chunks, beside others' tokens, after preemptions, greedy and by every parameter."""
    if layout == "latent" and "setting2" in str(tiny_checkpoint):
        return  # not on a CPU
    engine = make_engine(tiny_checkpoint, kv_cache_layout=layout, max_num_batched_tokens=11, max_num_seqs=6)
    assert engine.backend.name == "cuda (cpu with twins, float32)"
    lengths = [(1, 20), (7, 25), (30, 32), (61, 3)]
    requests = [Request(f"r{i}", prompt(i, n), greedy(m, logprobs=3)) for i, (n, m) in enumerate(lengths)]
    requests.append(Request("score", prompt(9, 70), SamplingParams(max_tokens=0, prompt_logprobs=2)))
    outputs = run(engine, requests)
    model = random_model(tiny_config("setting1" if "setting1" in str(tiny_checkpoint) else "setting2"))
    for request, (_, count) in zip(requests, lengths, strict=False):
        found = ids_of(outputs[request.id])
        assert_greedy(model, request.token_ids[: request.num_prompt_tokens], count, found)
        reported = [output.logprobs for output in outputs[request.id]]
        logprobs = [x for some in reported if some is not None for x in some.logprobs]
        assert logprobs == pytest.approx(naive_logprobs(model, request.token_ids)[-count:], abs=1e-4)
    scored = outputs["score"][0].prompt_logprobs
    assert scored is not None
    assert scored.logprobs == pytest.approx(naive_logprobs(model, prompt(9, 70)), abs=1e-4)


def sampled_texts(engine: Engine) -> dict[str, list[int]]:
    found = run(engine, [Request(name, prompt(3, 9), params) for name, params in PARAMS.items()])
    return {name: ids_of(outputs) for name, outputs in found.items()}


def test_sampling_equals_the_cpu(tiny_checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sampled_texts(make_engine(tiny_checkpoints["setting2"]))
    monkeypatch.setenv("LPA_CUDA", "twins")
    assert sampled_texts(make_engine(tiny_checkpoints["setting2"])) == expected


def test_embeddings_and_scores_in_this_process(tiny_checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> tuple[Any, Any]:
        with LLM(tiny_checkpoints["setting1"], dtype="float32") as llm:
            return llm.embed(["The robot"]), llm.score(["Once upon a time there was"]).sums.nll_sum

    expected, nll = found()
    monkeypatch.setenv("LPA_CUDA", "twins")
    vectors, again = found()
    np.testing.assert_allclose(np.asarray(vectors), np.asarray(expected), atol=1e-4)
    assert again == pytest.approx(nll, abs=1e-3)


def refusals(monkeypatch: pytest.MonkeyPatch, value: str, triton: bool = True, **options: Any) -> dict[str, str]:
    monkeypatch.setenv("LPA_CUDA", value)
    monkeypatch.setattr("lpa_model.backends.features.resolve_device", torch.device)
    monkeypatch.setattr("lpa_model.backends.features.has_triton", lambda: triton)
    monkeypatch.setattr("lpa_model.backends.features.has_bfloat16", lambda device: True)
    changes = {key: options.pop(key) for key in ("head_dim", "num_attention_heads") if key in options}
    return dict(select.choose(tiny_config(**changes), **{"device": "cuda", **options}).refused)


def refused_cases() -> Iterator[tuple[str, dict[str, Any], str]]:
    yield "0", {}, "has never run on a GPU yet: LPA_CUDA=1 takes it, `lpa bench device` checks and measures it"
    yield "1", {"triton": False}, "needs Triton to compile its kernels"
    yield "1", {"weights": "int8"}, "holds no int8 weights; take --weights auto"
    yield "1", {"dtype": "float32", "weights": "bfloat16"}, "holds weights in the dtype of activations; take"
    yield "1", {"cache_dtype": "int8"}, "reads no int8 cache; take --kv-cache-dtype auto"
    yield "1", {"head_dim": 512, "num_attention_heads": 1}, "has kernels for heads of up to 256"
    yield "1", {"device": "cpu", "instruction_sets": ()}, "is for GPUs"


@pytest.mark.parametrize(("value", "options", "reason"), list(refused_cases()))
def test_what_is_refused_says_why(
    value: str, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusals(monkeypatch, value, **options)["cuda"].startswith(reason)


def test_a_gpu_takes_it_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cuda" not in refusals(monkeypatch, "1")
    for invariant in (False, True):
        choice = select.choose(tiny_config(), device="cuda", batch_invariant=invariant)
        assert (choice.name, choice.batch_invariant) == ("cuda (cuda, bfloat16)", invariant)
    with pytest.raises(ValueError, match="LPA_CUDA: 'yes' is none of 0, 1, twins"):
        refusals(monkeypatch, "yes")


def test_a_twin_is_not_batch_invariant(twins: None, tiny_checkpoint: Path) -> None:
    options = load_settings(batch_invariant=True, dtype="float32").engine_options()
    with pytest.raises(ValueError, match=r"batch_invariant: the backend cuda is not"):
        build_engine(tiny_checkpoint, options)
