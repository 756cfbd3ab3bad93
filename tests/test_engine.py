"""The engine against the model's plain forward: whatever the batching, chunking, layout, prefix hits or preemption."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lpa_model.config import Architecture, CacheLayout
from lpa_model.model import LPAForCausalLM
from server.engine.engine import Engine, StepFailed, build_engine
from server.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from server.errors import ContextLength, InvalidRequest
from server.settings import load_settings
from tests.tiny import END_OF_TEXT_ID, VOCAB_SIZE, random_model, tiny_config, write_checkpoint

engine_options = cache(lambda: load_settings().engine_options())  # frozen


def make_engine(folder: Path, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"dtype": "float32", "threads": 1, "block_size": 8, "kv_cache_memory": 1 << 20}
    return build_engine(folder, replace(engine_options(), **{**defaults, **options}))


def run(engine: Engine, requests: list[Request], max_steps: int = 2000) -> dict[str, list[RequestOutput]]:
    """Add all requests and step until none is left."""
    for request in requests:
        engine.add_request(request)
    return drain(engine, max_steps)


def drain(engine: Engine, max_steps: int = 2000) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = defaultdict(list)
    for _ in range(max_steps):
        if not engine.has_work:
            break
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert not engine.has_work
    blocks = engine.scheduler.blocks
    assert blocks.num_held == 0
    assert blocks.num_free + blocks.num_cached == blocks.num_blocks
    return outputs


def ids_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def prompt(seed: int, length: int) -> list[int]:
    return [random.Random(seed).randrange(1, 300) for _ in range(length)]


def greedy(max_tokens: int, **keys: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **keys)


def assert_greedy(model: LPAForCausalLM, ids: list[int], count: int, found: list[int]) -> None:
    """The oracle: `count` tokens, each the best one by the plain forward over `ids` and those before it."""
    assert len(found) == count
    logits = model.logits(model(torch.tensor([ids + found[:-1]]))[0, len(ids) - 1 :])
    assert found == logits.argmax(-1).tolist()


def naive_logprobs(model: LPAForCausalLM, ids: list[int]) -> list[float]:
    """log p(token i | tokens before it) for i = 1 ..."""
    logits = model.logits(model(torch.tensor([ids]))[0])
    return [float(logits[i].double().log_softmax(-1)[ids[i + 1]]) for i in range(len(ids) - 1)]


each_layout = pytest.mark.parametrize(
    ("architecture", "layout"),  # auto takes latent for learned positions, and mixed for rotary ones
    [("setting1", "auto"), ("setting1", "mixed"), ("setting1", "full"), ("setting2", "auto"), ("setting2", "full")],
)


@each_layout
def test_greedy_equals_naive_under_chunked_mixed_batches(
    tiny_checkpoint: Path, architecture: Architecture, layout: str
) -> None:
    engine = make_engine(tiny_checkpoint, kv_cache_layout=layout, max_num_batched_tokens=11)
    lengths = [(1, 20), (7, 5), (8, 9), (30, 12), (61, 3), (17, 1)]
    requests = [Request(f"r{i}", prompt(i, n), greedy(m)) for i, (n, m) in enumerate(lengths)]
    outputs = run(engine, requests)
    model = random_model(tiny_config(architecture))
    for i, (n, m) in enumerate(lengths):
        assert_greedy(model, prompt(i, n), m, ids_of(outputs[f"r{i}"]))
        assert outputs[f"r{i}"][-1].finish_reason is FinishReason.LENGTH


@each_layout
def test_prompt_and_output_logprobs_equal_naive(tiny_checkpoint: Path, architecture: Architecture, layout: str) -> None:
    engine = make_engine(tiny_checkpoint, kv_cache_layout=layout, max_num_batched_tokens=13)
    requests = [
        Request("score", prompt(1, 50), greedy(0, prompt_logprobs=0)),
        Request("both", prompt(2, 20), greedy(6, prompt_logprobs=3, logprobs=3)),
        Request("late", prompt(1, 50), greedy(0, prompt_logprobs=0, first_logit_position=30)),
    ]
    outputs = run(engine, requests)
    model = random_model(tiny_config(architecture))
    whole = naive_logprobs(model, prompt(1, 50))
    assert outputs["score"][-1].prompt_logprobs.logprobs == pytest.approx(whole, abs=1e-4)
    assert outputs["late"][-1].prompt_logprobs.logprobs == pytest.approx(whole[30:], abs=1e-4)
    both = prompt(2, 20) + ids_of(outputs["both"])
    expected = naive_logprobs(model, both)
    assert outputs["both"][0].prompt_logprobs.logprobs == pytest.approx(expected[:19], abs=1e-4)
    generated = [output.logprobs for output in outputs["both"]]
    assert [lp.logprobs[0] for lp in generated] == pytest.approx(expected[19:], abs=1e-4)
    for columns in generated:
        assert columns.ranks == [1]
        assert columns.top_logprobs[0][0] == columns.logprobs[0]
        assert len(columns.top_ids[0]) == 3


MIXED: list[tuple[Architecture, dict[str, Any]]] = [
    ("setting1", {"attention_rank": {"q": None, "k": [6, None], "v": 5, "o": [None, 9]}, "ffn_rank": 7}),
    ("setting1", {"attention_rank": None, "ffn_rank": {"up": None, "down": [7, 30]}}),
    ("setting2", {"attention_rank": {"q": 9, "k": [6, None], "v": 5, "o": None}, "ffn_rank": 7}),
    ("setting2", {"ffn_rank": {"gate": None, "up": 7, "down": [None, 30]}, "num_key_value_heads": 2}),
    ("setting2", {"qk_norm": True, "ffn_rank": {"gate": 7, "up": None, "down": None}}),
    ("setting2", {"qk_norm": True, "attention_rank": None, "num_key_value_heads": 2, "attention_bias": True}),
]


@pytest.mark.parametrize(
    ("architecture", "changes", "layout"),
    [
        (architecture, changes, layout)
        for architecture, changes in MIXED
        for layout in ("auto", "mixed", "full")
        # a dense model has no latent, and for rotary positions auto takes mixed
        if layout == "full"
        or (changes.get("attention_rank", 8) is not None and (architecture, layout) != ("setting2", "auto"))
    ],
)
def test_any_ranks_give_what_the_naive_forward_gives(
    tmp_path: Path, architecture: Architecture, changes: dict[str, Any], layout: CacheLayout
) -> None:
    config = tiny_config(architecture, **changes)
    folder = write_checkpoint(tmp_path / "model", config)
    model = random_model(config)
    engine = make_engine(folder, kv_cache_layout=layout, max_num_batched_tokens=13)
    prompts = {f"r{i}": prompt(5, 24) + prompt(i, n) for i, n in enumerate((1, 9, 30))}
    text = prompt(5, 24) + prompt(9, 20)
    expected = naive_logprobs(model, text)
    for turn in range(2):  # the second one finds the prefix in the cache
        requests = [Request(name, ids, greedy(6, logprobs=0)) for name, ids in prompts.items()]
        outputs = run(engine, [*requests, Request("score", text, greedy(0, prompt_logprobs=0))])
        for name, ids in prompts.items():
            tokens = ids_of(outputs[name])
            assert_greedy(model, ids, 6, tokens)
            found = [value for output in outputs[name] for value in output.logprobs.logprobs]
            assert found == pytest.approx(naive_logprobs(model, ids + tokens)[-6:], abs=1e-4)
            assert turn == 0 or outputs[name][-1].num_cached_tokens >= 24
        scored = outputs["score"][-1].prompt_logprobs.logprobs
        assert scored == pytest.approx(expected, abs=1e-4)


def test_prefix_hits_change_nothing(tiny_checkpoint: Path, architecture: Architecture) -> None:
    engine = make_engine(tiny_checkpoint)
    shared = prompt(5, 40)
    first = run(engine, [Request("cold", shared + prompt(6, 5), greedy(8))])["cold"]
    again = run(
        engine,
        [Request("same", shared + prompt(6, 5), greedy(8)), Request("other", shared + prompt(7, 9), greedy(8))],
    )
    assert first[-1].num_cached_tokens == 0
    assert again["same"][-1].num_cached_tokens == 40
    assert ids_of(again["same"]) == ids_of(first)
    model = random_model(tiny_config(architecture))
    assert_greedy(model, shared + prompt(7, 9), 8, ids_of(again["other"]))
    scored = run(engine, [Request("score", shared, greedy(0, prompt_logprobs=0, first_logit_position=30))])["score"]
    assert scored[-1].num_cached_tokens == 24  # whole blocks of 8 before position 30
    assert scored[-1].prompt_logprobs.logprobs == pytest.approx(naive_logprobs(model, shared)[30:], abs=1e-4)
    stats = engine.take_stats()
    assert stats.prefix_cache_hits == 40 + 40 + 24


def test_requests_with_a_shared_prefix_decode_together(tiny_checkpoint: Path, architecture: Architecture) -> None:
    engine = make_engine(tiny_checkpoint)
    shared = prompt(5, 40)
    run(engine, [Request("warm", shared, greedy(1))])
    outputs = run(engine, [Request(f"r{i}", shared + prompt(i, 3 + i), greedy(12)) for i in range(6)])
    model = random_model(tiny_config(architecture))
    for i in range(6):
        assert_greedy(model, shared + prompt(i, 3 + i), 12, ids_of(outputs[f"r{i}"]))


def test_preemption_recomputes_to_the_same_tokens(tiny_checkpoint: Path, architecture: Architecture) -> None:
    bytes_per_token = 2 * 2 * 4 * 32 * 4  # full keys and values of two layers in float32, heads padded to 32
    engine = make_engine(tiny_checkpoint, kv_cache_layout="full", kv_cache_memory=16 * 8 * bytes_per_token)
    assert engine.scheduler.blocks.num_blocks == 16  # six requests of 44 tokens want 36
    requests = [Request(f"r{i}", prompt(i, 14), greedy(30, prompt_logprobs=0)) for i in range(6)]
    outputs = run(engine, requests)
    assert engine.take_stats().preemptions > 0
    model = random_model(tiny_config(architecture))
    for i in range(6):
        assert_greedy(model, prompt(i, 14), 30, ids_of(outputs[f"r{i}"]))
        assert len(outputs[f"r{i}"][0].prompt_logprobs.logprobs) == 13


def group(ids: list[int], n: int, name: str = "c", **keys: Any) -> list[Request]:
    """`n` choices of one prompt; the first leads."""
    params = SamplingParams(**{"seed": 3, "max_tokens": 12, "ignore_eos": True, **keys})
    leader = Request(f"{name}0", ids, params)
    return [leader, *(Request(f"{name}{i}", ids, params, choice=i, leader=leader) for i in range(1, n))]


@each_layout
def test_choices_share_one_prefill_and_give_what_separate_requests_give(tiny_checkpoint: Path, layout: str) -> None:
    """Prompts that end within a block, at its end, and in the first one; with chunks, and company from outside."""
    alone = make_engine(tiny_checkpoint, kv_cache_layout=layout, enable_prefix_caching=False)
    options = {"kv_cache_layout": layout, "max_num_batched_tokens": 11}
    for length, caching in itertools.product((29, 24, 5), (True, False)):
        ids = prompt(length, length)
        if caching:
            params = group(ids, 1, logprobs=1)[0].params
            separate = [run(alone, [Request("x", ids, params, choice=i)])["x"] for i in range(4)]
        engine = make_engine(tiny_checkpoint, enable_prefix_caching=caching, **options)
        outputs = run(engine, [*group(ids, 4, logprobs=1), Request("other", prompt(1, 20), greedy(9))])
        assert engine.take_stats().prompt_tokens == length + 20
        assert len({tuple(ids_of(outputs[f"c{i}"])) for i in range(4)}) > 1
        for i in range(4):
            assert ids_of(outputs[f"c{i}"]) == ids_of(separate[i])
            mine, its = ([o.logprobs.logprobs[0] for o in out] for out in (outputs[f"c{i}"], separate[i]))
            assert mine == pytest.approx(its, abs=1e-4)
            assert outputs[f"c{i}"][-1].num_cached_tokens == 0


def test_choices_keep_their_tokens_across_preemption(tiny_checkpoint: Path) -> None:
    bytes_per_token = 2 * 2 * 4 * 32 * 4  # full keys and values of two layers in float32, heads padded to 32

    def requests() -> list[Request]:
        groups = [group(prompt(seed, 29), 4, f"g{seed}-", max_tokens=20) for seed in range(3)]
        return [request for choices in groups for request in choices]

    alone = make_engine(tiny_checkpoint, kv_cache_layout="full", enable_prefix_caching=False)
    expected = {}
    for request in requests():
        single = Request("x", request.token_ids, request.params, choice=request.choice)
        expected[request.id] = ids_of(run(alone, [single])["x"])
    for caching in (True, False):
        engine = make_engine(
            tiny_checkpoint,
            kv_cache_layout="full",
            kv_cache_memory=16 * 8 * bytes_per_token,
            enable_prefix_caching=caching,
        )
        outputs = run(engine, requests())
        assert engine.take_stats().preemptions > 0
        assert {name: ids_of(found) for name, found in outputs.items()} == expected


def test_choices_go_on_when_their_leader_is_aborted_or_ends_at_once(tiny_checkpoint: Path) -> None:
    ids = prompt(4, 29)
    alone = make_engine(tiny_checkpoint, enable_prefix_caching=False)
    params = group(ids, 1)[0].params
    expected = [ids_of(run(alone, [Request("x", ids, params, choice=i)])["x"]) for i in range(3)]
    for steps in range(4):  # before its first step, in its prompt, after it
        engine = make_engine(tiny_checkpoint, max_num_batched_tokens=11)
        for request in group(ids, 3):
            engine.add_request(request)
        first = [engine.step() for _ in range(steps)]
        engine.abort("c0")
        outputs = drain(engine)
        for i in (1, 2):
            before = [output for step in first for output in step if output.request_id == f"c{i}"]
            assert ids_of(before + outputs[f"c{i}"]) == expected[i]
    engine = make_engine(tiny_checkpoint, enable_prefix_caching=False)
    outputs = run(engine, group(ids, 3, max_tokens=1))
    assert [ids_of(outputs[f"c{i}"]) for i in range(3)] == [tokens[:1] for tokens in expected]
    assert engine.take_stats().prompt_tokens == 29


def test_a_failing_step_of_a_group_leaves_nothing_behind(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_checkpoint, max_num_seqs=3)
    for request in group(prompt(4, 29), 5):
        engine.add_request(request)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", lambda batch: torch.zeros(2) @ torch.zeros(3))
        with pytest.raises(StepFailed) as failed:
            engine.step()
    assert {output.request_id for output in failed.value.outputs} == {"c0", "c1", "c2"}
    assert set(drain(engine)) == {"c3", "c4"}


def test_a_prefix_on_its_way_is_computed_once(tiny_checkpoint: Path, architecture: Architecture) -> None:
    """Requests that come together: the first computes what they share, the others wait for it."""
    engine = make_engine(tiny_checkpoint)
    shared = prompt(5, 48)
    outputs = run(engine, [Request(f"r{i}", shared + prompt(i, 4 + i), greedy(8)) for i in range(5)])
    model = random_model(tiny_config(architecture))
    for i in range(5):
        assert_greedy(model, shared + prompt(i, 4 + i), 8, ids_of(outputs[f"r{i}"]))
        assert outputs[f"r{i}"][-1].num_cached_tokens == (48 if i else 0)


def test_salts_keep_prefixes_apart(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint)
    ids = prompt(5, 40)
    salts = ["", "x", "x", "y", ""]
    cached = [
        run(engine, [Request(f"r{i}", ids, greedy(2), cache_salt=salt)])[f"r{i}"][-1].num_cached_tokens
        for i, salt in enumerate(salts)
    ]
    assert cached == [0, 0, 32, 0, 32]


def test_an_int8_cache_is_named_and_counted(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint, kv_cache_dtype="int8", kv_cache_layout="full")
    found, cache = engine.backend, engine.runner.cache
    assert found.types == "float32, int8 cache" and "int8 cache" in found.name
    assert {pool.dtype for pool in (*cache.keys, *cache.values)} == {torch.int8}
    tokens = cache.num_blocks * cache.block_size
    assert found.cache_bytes_per_token == sum(pool.nbytes for pool in cache.pools) / tokens
    assert found.dense_cache_bytes_per_token == 2 * 2 * 4 * (8 + 2)  # heads of 8 codes and a scale, not padded


@pytest.mark.parametrize("cached", ["auto", "int8"])
def test_poisoned_free_blocks_reach_no_result(tiny_checkpoint: Path, architecture: Architecture, cached: str) -> None:
    def generated(engine: Engine) -> dict[str, list[RequestOutput]]:
        return run(engine, [Request(f"r{i}", prompt(i, 9 + i), greedy(10, logprobs=0)) for i in range(3)])

    options: dict[str, Any] = {"enable_prefix_caching": False, "kv_cache_dtype": cached}
    clean, engine = make_engine(tiny_checkpoint, **options), make_engine(tiny_checkpoint, **options)
    for pool in engine.runner.cache.pools:
        pool.fill_(math.nan if pool.is_floating_point() else -128)  # the scales, where there are codes
    expected = generated(clean)
    for name, found in generated(engine).items():
        assert [(o.token_ids, o.logprobs) for o in found] == [(o.token_ids, o.logprobs) for o in expected[name]]


def test_seeded_sampling_does_not_depend_on_company(tiny_checkpoint: Path) -> None:
    def sampled(name: str) -> Request:
        params = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, seed=7, max_tokens=20, ignore_eos=True)
        return Request(name, prompt(3, 10), params, choice=1)

    alone = run(make_engine(tiny_checkpoint), [sampled("x")])["x"]
    engine = make_engine(tiny_checkpoint, max_num_batched_tokens=9)
    company = [Request(f"r{i}", prompt(i, 20), SamplingParams(max_tokens=15, ignore_eos=True)) for i in range(5)]
    together = run(engine, [*company, sampled("x")])["x"]
    assert ids_of(together) == ids_of(alone)


def test_abort_frees_blocks_at_once(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint, enable_prefix_caching=False)
    for i in range(3):
        engine.add_request(Request(f"r{i}", prompt(i, 20), greedy(50)))
    for _ in range(4):
        engine.step()
    held = engine.scheduler.blocks.num_held
    engine.abort("r1")
    assert engine.scheduler.blocks.num_held < held
    outputs = drain(engine)
    assert set(outputs) == {"r0", "r2"}
    engine.abort("r1")  # again: nothing happens
    reasons = [finished.reason for finished in engine.take_stats().finished]
    assert sorted(reasons) == [FinishReason.ABORT, FinishReason.LENGTH, FinishReason.LENGTH]


def test_abort_of_a_waiting_request(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint, max_num_seqs=1)
    engine.add_request(Request("a", prompt(1, 5), greedy(5)))
    engine.add_request(Request("b", prompt(2, 5), greedy(5)))
    engine.step()
    engine.abort("b")
    assert set(drain(engine)) == {"a"}


def test_a_failing_step_fails_its_own_requests_only(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny_checkpoint, max_num_seqs=1)
    engine.add_request(Request("a", prompt(1, 5), greedy(5)))
    engine.add_request(Request("b", prompt(2, 5), greedy(5)))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", lambda batch: torch.zeros(2) @ torch.zeros(3))
        with pytest.raises(StepFailed) as failed:
            engine.step()
    (output,) = failed.value.outputs
    assert (output.request_id, output.finish_reason) == ("a", FinishReason.ERROR)
    assert "size" in output.error
    assert len(ids_of(drain(engine)["b"])) == 5


def test_end_of_text_stop_tokens_and_min_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose head strongly prefers the end of the text."""
    folder = write_checkpoint(tmp_path / "m", tiny_config("setting2", lm_head_bias=True))
    engine = make_engine(folder)
    backend: Any = engine.runner.backend
    bias, head = torch.zeros(VOCAB_SIZE), backend.head
    bias[END_OF_TEXT_ID], bias[65] = 1000.0, 500.0
    monkeypatch.setattr(backend, "head", lambda hidden: head(hidden) + bias)

    def ask(**keys: Any) -> tuple[list[int], RequestOutput]:
        outputs = run(engine, [Request("x", prompt(1, 4), SamplingParams(temperature=0, max_tokens=6, **keys))])["x"]
        return ids_of(outputs), outputs[-1]

    ids, last = ask()
    assert (ids, last.finish_reason, last.stop_reason, last.text) == ([END_OF_TEXT_ID], FinishReason.STOP, None, "")
    ids, last = ask(min_tokens=3)
    assert (ids, last.finish_reason) == ([65, 65, 65, END_OF_TEXT_ID], FinishReason.STOP)
    ids, last = ask(ignore_eos=True)
    assert (ids, last.finish_reason) == ([END_OF_TEXT_ID] * 6, FinishReason.LENGTH)
    ids, last = ask(ignore_eos=True, min_tokens=2, stop_token_ids=(65,))
    assert ids[2:] == [END_OF_TEXT_ID] * 4
    bias[END_OF_TEXT_ID] = 0.0
    ids, last = ask(stop_token_ids=(65,))
    assert (ids, last.finish_reason, last.stop_reason) == ([65], FinishReason.STOP, 65)


def test_stop_string_ends_the_request(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint)
    free = run(engine, [Request("free", prompt(3, 6), greedy(30))])["free"]
    text = "".join(output.text for output in free)
    stop = text[10:14]
    stopped = run(engine, [Request("x", prompt(3, 6), greedy(30, stop=(stop, "never seen")))])["x"]
    assert "".join(output.text for output in stopped) == text[: text.index(stop)]
    assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == (FinishReason.STOP, stop)


def test_one_token_prompt_can_be_scored(tiny_checkpoint: Path) -> None:
    output = run(make_engine(tiny_checkpoint), [Request("x", [5], greedy(0, prompt_logprobs=0))])["x"][-1]
    assert output.prompt_logprobs.logprobs == []
    assert output.finish_reason is FinishReason.LENGTH


def test_what_cannot_be_served_is_refused(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint)
    with pytest.raises(InvalidRequest, match="empty"):
        engine.validate([], 1)
    with pytest.raises(InvalidRequest, match=r"prompt\[1\]: token id 300 is outside the vocabulary of 300"):
        engine.validate([1, 300], 1, "prompt[1]")
    with pytest.raises(ContextLength, match="128") as caught:
        engine.validate(prompt(1, 100), 29, limit_field="max_completion_tokens")
    assert caught.value.param == "max_completion_tokens"
    engine.validate(prompt(1, 100), 28)


def test_the_whole_context_can_be_used(tiny_checkpoint: Path, architecture: Architecture) -> None:
    outputs = run(make_engine(tiny_checkpoint), [Request("x", prompt(1, 100), greedy(28))])["x"]
    assert_greedy(random_model(tiny_config(architecture)), prompt(1, 100), 28, ids_of(outputs))


def test_options_that_do_not_fit_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_model_len: 129 is more than the model's 128"):
        make_engine(tiny_checkpoint, max_model_len=129)
    with pytest.raises(ValueError, match="kv_cache_memory: 10 bytes"):
        make_engine(tiny_checkpoint, kv_cache_memory=10)
    dense = write_checkpoint(tmp_path / "dense", tiny_config(attention_rank=None))
    with pytest.raises(ValueError, match="kv_cache_layout: latent needs low-rank"):
        make_engine(dense, kv_cache_layout="latent")
    assert make_engine(dense).runner.cache.layout == "full"
    small = make_engine(tiny_checkpoint, kv_cache_memory=20000, kv_cache_layout="full")
    assert small.max_model_len == small.scheduler.blocks.num_blocks * 8 < 128


def test_auto_layout_is_latent_for_learned_and_mixed_for_rotary_positions(
    tiny_checkpoint: Path, architecture: Architecture
) -> None:
    layout = make_engine(tiny_checkpoint).runner.cache.layout
    assert layout == ("latent" if architecture == "setting1" else "mixed")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_ends_its_own_request_only(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=1)

    def both() -> list[Request]:
        return [Request("good", prompt(1, 5), params), Request("bad", prompt(2, 5), params)]

    expected = run(make_engine(tiny_checkpoint), both())
    engine = make_engine(tiny_checkpoint)
    backend: Any = engine.runner.backend
    head, calls = backend.head, itertools.count()

    def broken_head(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = head(hidden)
        if next(calls) == 2:
            assert len(logits) == 2
            logits = logits.clone()
            logits[1, 7] = bad
        return logits

    monkeypatch.setattr(backend, "head", broken_head)
    outputs = run(engine, both())
    assert ids_of(outputs["good"]) == ids_of(expected["good"])
    assert ids_of(outputs["bad"]) == ids_of(expected["bad"])[:2]
    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
    assert "not a finite number" in str(outputs["bad"][-1].error)
    assert outputs["bad"][-1].invalid_param is None  # not the client's fault
