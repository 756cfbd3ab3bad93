"""Hidden states out of the engine: equal to the plain forward's, and the same bits however they are computed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpa_model.config import Architecture
from lpa_model.model import LPAForCausalLM
from server.engine.engine import Engine
from server.engine.hidden_states import HiddenSpec, HiddenStates
from server.engine.request import FinishReason, Request, hidden_request, scoring_request
from tests.test_engine import assert_greedy, drain, greedy, ids_of, make_engine, prompt, run
from tests.test_reproducible import TILES, _memory
from tests.tiny import random_model, tiny_config, write_checkpoint

Rows = npt.NDArray[np.float32]
ALL_LAYERS = (0, 1, 2)  # of models with two


def naive(model: LPAForCausalLM, ids: list[int]) -> Rows:
    """[positions, layers + 1, d], by hooks around the modules of the plain forward."""
    seen: list[torch.Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in model.layers]
    with torch.inference_mode():
        final = model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack([x[0].float() for x in (*seen, final)], dim=1).numpy()


def wanting(name: str, ids: list[int], layers: tuple[int, ...] = ALL_LAYERS, **more: Any) -> Request:
    return hidden_request(name, ids, HiddenSpec(layers=layers, **{"positions": range(len(ids)), **more}))


def states(engine: Engine, requests: list[Request]) -> dict[str, Rows]:
    outputs = run(engine, requests)
    return {name: of[-1].hidden for name, of in outputs.items() if of[-1].hidden is not None}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("budget", [7, 2048])
def test_they_are_the_plain_forwards(
    tiny_checkpoint: Path, architecture: Architecture, budget: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside streams and scores; some positions, some layers, a mean, and prompts of which a part is cached."""
    if backend == "torch":
        monkeypatch.setattr("lpa_model.backends.features.instruction_sets", lambda: ())
    engine = make_engine(tiny_checkpoint, max_num_batched_tokens=budget)
    assert engine.backend.name.startswith(backend)
    model = random_model(tiny_config(architecture))
    a, b = prompt(1, 50), prompt(1, 30) + prompt(2, 20)  # b begins as a does
    naive_a, naive_b = naive(model, a), naive(model, b)
    for _ in range(2):
        outputs = run(
            engine,
            [
                wanting("all", a),
                Request("stream", prompt(3, 9), greedy(12)),
                wanting("some", b, (2, 0), positions=(3, 17, 18, 41)),
                scoring_request("score", a, 1),
                wanting("last", b, (2,), positions=(49,)),
                wanting("mean", b, (2, 1), mean=True),
                wanting("one", [7]),
            ],
        )
        found = {name: of[-1].hidden for name, of in outputs.items()}
        assert found["stream"] is None and found["score"] is None
        assert_greedy(model, prompt(3, 9), 12, ids_of(outputs["stream"]))
        assert outputs["all"][-1].finish_reason is FinishReason.LENGTH
        np.testing.assert_allclose(found["all"], naive_a, atol=1e-4)
        np.testing.assert_allclose(found["some"], naive_b[[3, 17, 18, 41]][:, [2, 0]], atol=1e-4)
        np.testing.assert_allclose(found["last"], naive_b[-1:, 2:], atol=1e-4)
        np.testing.assert_allclose(found["mean"], naive_b.mean(0)[None, [2, 1]], atol=1e-4)
        np.testing.assert_allclose(found["one"], naive(model, [7]), atol=1e-4)
    cached = {name: of[-1].num_cached_tokens for name, of in outputs.items() if name != "stream"}
    assert cached == {"all": 0, "some": 0, "score": 0, "last": 48, "mean": 0, "one": 0}  # in blocks of 8


def test_only_positions_before_the_first_wanted_one_come_from_the_prefix_cache(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint)
    whole = states(engine, [wanting("x", prompt(1, 60))])["x"]
    for first in (0, 7, 8, 33, 59):
        outputs = run(engine, [wanting("x", prompt(1, 60), positions=range(first, 60))])["x"]
        assert outputs[-1].num_cached_tokens == first // 8 * 8
        np.testing.assert_array_equal(outputs[-1].hidden, whole[first:])


TEXTS = [prompt(seed, length) for seed, length in [(1, 120), (2, 65), (3, 64), (4, 9), (5, 2), (1, 100), (7, 127)]]


def texts() -> list[Request]:
    pairs = [(wanting(f"all {i}", ids), wanting(f"mean {i}", ids, (2,), mean=True)) for i, ids in enumerate(TEXTS)]
    return [request for pair in pairs for request in pair]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["setting1", "setting2"])
def test_bits_do_not_depend_on_batch_chunks_hits_threads_or_preemption(
    tmp_path: Path, architecture: Architecture, dtype: str
) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config(architecture, **TILES))

    def engine(**options: Any) -> Engine:
        defaults = {"dtype": dtype, "block_size": 32, "batch_invariant": True, "kv_cache_memory": 1 << 22}
        return make_engine(folder, **{**defaults, **options})

    alone: dict[str, Rows] = {}
    single = engine(enable_prefix_caching=False)
    for request in texts():
        alone |= states(single, [request])

    def check(found: dict[str, Rows]) -> None:
        assert found.keys() == alone.keys()
        for name, rows in found.items():
            np.testing.assert_array_equal(rows, alone[name], err_msg=name)

    streams = [Request(f"s{i}", prompt(20 + i, 5 + 7 * i), greedy(40)) for i in range(4)]
    together = engine()
    check(states(together, [*streams, *texts()]))
    check(states(together, texts()[::-1]))
    check(states(engine(max_num_batched_tokens=19), texts()))
    check(states(engine(threads=2), texts()))
    tight = engine(kv_cache_memory=_memory(together, blocks=7), max_num_batched_tokens=9)
    for i in range(2):
        tight.add_request(Request(f"s{i}", prompt(9 + i, 40), greedy(80)))
        tight.step()
    for request in texts():
        tight.add_request(request)
    check({name: of[-1].hidden for name, of in drain(tight).items() if of[-1].hidden is not None})
    assert tight.take_stats().preemptions > 0


def test_a_long_prompt_is_cut_into_runs_of_the_op_list(tmp_path: Path) -> None:
    config = tiny_config(max_position_embeddings=1200)
    engine = make_engine(write_checkpoint(tmp_path / "model", config), kv_cache_memory=1 << 23)
    ids = prompt(1, 1200)
    found = states(engine, [wanting("x", ids), wanting("y", ids[::-1], (1,), positions=(3, 511, 512, 1023, 1199))])
    np.testing.assert_allclose(found["x"], naive(random_model(config), ids), atol=1e-4)
    backwards = naive(random_model(config), ids[::-1])[[3, 511, 512, 1023, 1199]][:, [1]]
    np.testing.assert_allclose(found["y"], backwards, atol=1e-4)


def test_numbers_that_are_not_finite_end_their_own_request(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint)
    weights = engine.runner.backend._plan.tokens  # type: ignore[attr-defined]
    weights[299] = float("nan")
    outputs = run(engine, [wanting("bad", [5, 299, 6]), wanting("good", [5, 6])])
    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
    assert "not a finite number" in str(outputs["bad"][-1].error)
    assert outputs["good"][-1].hidden is not None


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 1000))
def test_a_mean_does_not_depend_on_the_cut(sizes: list[int], seed: int) -> None:
    """It is the sum in float64 from the first row to the last, divided once."""
    total = sum(sizes)
    draw = random.Random(seed)
    rows = np.array([[[draw.gauss(0, 10) for _ in range(3)]] for _ in range(total)], dtype=np.float32)
    found = HiddenStates(HiddenSpec(layers=(0,), positions=range(total), mean=True))
    found.add(np.full((2, 1, 3), 7, dtype=np.float32))
    found.clear()
    at = 0
    for size in sizes:
        found.add(rows[at : at + size])
        at += size
    expected = []
    for column in rows[:, 0].T.tolist():
        value = column[0]
        for number in column[1:]:
            value += number
        expected.append(np.float32(value / total))
    assert found.result().tolist() == [[expected]]
