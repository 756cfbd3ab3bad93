"""Texts and log-probabilities are the same to the bit, alone and in any company, however they are cut up."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lpa_model.backends import select
from lpa_model.config import Architecture
from server.engine.engine import Engine
from server.engine.request import Request, SamplingParams
from tests.test_engine import drain, make_engine, prompt, run
from tests.tiny import tiny_config, write_checkpoint

TEXTS = [prompt(seed, length) for seed, length in [(1, 120), (2, 65), (3, 64), (4, 9), (5, 2), (6, 100), (7, 127)]]


def scores(requests: list[Request], engine: Any) -> dict[str, list[float]]:
    """Log-probabilities of the prompts by request id."""
    found: dict[str, list[float]] = {}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            if output.prompt_logprobs is not None:
                found[output.request_id] = output.prompt_logprobs.logprobs
    return found


def scoring(name: str, ids: list[int], first: int = 0) -> Request:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, first_logit_position=first)
    return Request(name, ids, params)


@pytest.fixture(scope="module")
def each_alone(tiny_checkpoints: dict[Architecture, Path]) -> dict[Architecture, list[list[float]]]:
    """Each text by itself, in one piece."""
    found = {}
    for architecture, folder in tiny_checkpoints.items():
        engine = make_engine(folder, enable_prefix_caching=False)
        found[architecture] = [scores([scoring("x", ids)], engine)["x"] for ids in TEXTS]
    return found


@pytest.fixture
def alone(architecture: Architecture, each_alone: dict[Architecture, list[list[float]]]) -> list[list[float]]:
    return each_alone[architecture]


@pytest.mark.parametrize(
    ("architecture", "layout", "budget"),
    [
        *((name, "auto", budget) for name in ("setting1", "setting2") for budget in (5, 17, 64, 200, 2048)),
        *((name, "full", budget) for name in ("setting1", "setting2") for budget in (5, 200)),
        *(("setting1", "mixed", budget) for budget in (5, 200)),  # which of setting 2 is what auto takes
    ],
)
def test_scores_do_not_depend_on_chunks_or_batch(
    tiny_checkpoint: Path, alone: list[list[float]], layout: str, budget: int
) -> None:
    engine = make_engine(
        tiny_checkpoint, max_num_batched_tokens=budget, enable_prefix_caching=False, kv_cache_layout=layout
    )
    singles = [scores([scoring("x", ids)], engine)["x"] for ids in TEXTS]
    assert all(len(single) == len(ids) - 1 for single, ids in zip(singles, TEXTS, strict=True))
    streams = [
        Request(
            f"s{i}", prompt(20 + i, 5 + 7 * i), SamplingParams(max_tokens=20, temperature=1, seed=i, ignore_eos=True)
        )
        for i in range(4)
    ]
    together = scores([*streams, *(scoring(f"t{i}", ids) for i, ids in enumerate(TEXTS))], engine)
    assert [together[f"t{i}"] for i in range(len(TEXTS))] == singles
    if layout == "auto":
        assert singles == alone


def test_scores_do_not_depend_on_prefix_hits(tiny_checkpoint: Path, alone: list[list[float]]) -> None:
    engine = make_engine(tiny_checkpoint, block_size=16)
    for ids, expected in zip(TEXTS, alone, strict=True):
        scores([scoring("all", ids)], engine)
        rng = random.Random(len(ids))
        for first in [rng.randrange(len(ids) - 1) for _ in range(4)]:
            found = scores([scoring("late", ids, first)], engine)["late"]
            assert found == expected[first:]
    assert engine.take_stats().prefix_cache_hits > 0


TILES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32, "attention_rank": 32}
INVARIANT = [
    (dtype, cached)
    for dtype, cached in (("float32", "auto"), ("bfloat16", "auto"), ("float32", "int8"), ("bfloat16", "int8"))
    if select.choose(tiny_config(**TILES), dtype=dtype, cache_dtype=cached).batch_invariant
]
"""Types of activations and cache."""
LENGTH = 26  # of streams, which cross the end of a block or two
Generated = dict[str, tuple[list[int], list[float]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Architecture, Path]:
    """Models whose sizes fill tiles."""
    root = tmp_path_factory.mktemp("tiles")
    both: tuple[Architecture, ...] = ("setting1", "setting2")
    return {name: write_checkpoint(root / name, tiny_config(name, **TILES)) for name in both}


def streams(count: int = 6) -> list[Request]:
    """Greedy and seeded ones, of different lengths, that report log-probabilities; two begin alike."""
    requests = []
    for i in range(count):
        ids = prompt(30 + i // 2, 40) + prompt(60 + i, 3 + 4 * i)
        temperature = 0.0 if i % 3 == 0 else 1.0
        params = SamplingParams(max_tokens=LENGTH, temperature=temperature, seed=i, ignore_eos=True, logprobs=2)
        requests.append(Request(f"s{i}", ids, params))
    return requests


def generated(engine: Engine, requests: list[Request]) -> Generated:
    found: Generated = {request.id: ([], []) for request in requests}
    for name, outputs in run(engine, requests).items():
        for output in outputs:
            found[name][0].extend(output.token_ids)
            if output.logprobs is not None:
                found[name][1].extend(output.logprobs.logprobs)
    assert all(len(tokens) == len(logprobs) == LENGTH for tokens, logprobs in found.values())
    return found


@pytest.mark.parametrize(("dtype", "cached"), [pair for pair in INVARIANT if pair != ("bfloat16", "int8")])
@pytest.mark.parametrize("architecture", ["setting1", "setting2"])
def test_streams_do_not_depend_on_batch_chunks_hits_or_preemption(
    folders: dict[Architecture, Path], architecture: Architecture, dtype: str, cached: str
) -> None:
    def engine(**options: Any) -> Engine:
        defaults = {"dtype": dtype, "block_size": 32, "batch_invariant": True, "kv_cache_memory": 1 << 22}
        defaults["kv_cache_dtype"] = cached
        return make_engine(folders[architecture], **{**defaults, **options})

    alone, single = Generated(), engine(enable_prefix_caching=False)
    for request in streams():
        alone |= generated(single, [request])
    together = engine()
    assert generated(together, streams()) == alone
    assert generated(together, streams()[::-1]) == alone
    assert together.take_stats().prefix_cache_hits > 0
    assert generated(engine(max_num_batched_tokens=19), streams()) == alone
    assert generated(engine(threads=2), streams()) == alone
    for caching in (True, False):
        tight = engine(kv_cache_memory=_memory(together, blocks=7), enable_prefix_caching=caching)
        assert generated(tight, streams()) == alone
        assert tight.take_stats().preemptions > 0


def test_norms_of_keys_and_mixed_ranks_do_not_depend_on_batch_or_chunks(tmp_path: Path) -> None:
    config = tiny_config(**TILES, qk_norm=True, ffn_rank={"gate": None, "up": [7, None], "down": 5})
    folder = write_checkpoint(tmp_path / "model", config)
    options: dict[str, Any] = {"dtype": "float32", "batch_invariant": True, "kv_cache_memory": 1 << 22}
    alone, single = Generated(), make_engine(folder, **options, enable_prefix_caching=False)
    for request in streams(3):
        alone |= generated(single, [request])
    assert generated(make_engine(folder, **options), streams(3)) == alone
    assert generated(make_engine(folder, **options, max_num_batched_tokens=19), streams(3)) == alone


def _memory(engine: Engine, blocks: int) -> int:
    """Bytes of a cache of so many blocks."""
    return blocks * sum(pool[0].nbytes for pool in engine.runner.cache.pools)


@pytest.mark.parametrize(("dtype", "cached"), [pair for pair in INVARIANT if pair != ("float32", "auto")])
@pytest.mark.parametrize("architecture", ["setting1", "setting2"])
def test_scores_in_fewer_bits_do_not_depend_on_chunks_batch_or_hits(
    folders: dict[Architecture, Path], architecture: Architecture, dtype: str, cached: str
) -> None:
    def engine(**options: Any) -> Engine:
        defaults = {"dtype": dtype, "block_size": 32, "batch_invariant": True, "enable_prefix_caching": False}
        defaults["kv_cache_dtype"] = cached
        return make_engine(folders[architecture], **{**defaults, **options})

    single = engine()
    expected = {f"t{i}": scores([scoring("x", ids)], single)["x"] for i, ids in enumerate(TEXTS)}
    texts = [scoring(f"t{i}", ids) for i, ids in enumerate(TEXTS)]
    for budget in (5, 64, 2048):
        company = streams(3)
        assert scores([*company, *texts], engine(max_num_batched_tokens=budget)) == expected
        texts = [scoring(f"t{i}", ids) for i, ids in enumerate(TEXTS)]
    cached = engine(enable_prefix_caching=True)
    for i, ids in enumerate(TEXTS):
        scores([scoring("all", ids)], cached)
        late = len(ids) // 2
        assert scores([scoring("late", ids, late)], cached)["late"] == expected[f"t{i}"][late:]
    assert cached.take_stats().prefix_cache_hits > 0
    drain(cached)


def test_it_is_refused_where_it_cannot_be_kept(
    folders: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_engine(folders["setting2"], block_size=32).scheduler.recompute_decodes_one_by_one
    assert not make_engine(
        folders["setting2"], block_size=32, batch_invariant=False
    ).scheduler.recompute_decodes_one_by_one
    monkeypatch.setattr(select, "CANDIDATES", select.CANDIDATES[-1:])
    assert not make_engine(folders["setting2"]).scheduler.recompute_decodes_one_by_one
    with pytest.raises(ValueError, match="batch_invariant: the backend torch is not"):
        make_engine(folders["setting2"], batch_invariant=True)


def test_rotary_keys_are_not_cached_as_latents_on_a_cpu(folders: dict[Architecture, Path]) -> None:
    with pytest.raises(ValueError, match=r"kv_cache_layout: latent would rebuild .* take mixed"):
        make_engine(folders["setting2"], kv_cache_layout="latent")
