"""The contract that every backend keeps: each layout and model against the plain forward, and bits that stay.

A new backend is tested by adding its name to BACKENDS.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from lpa_model.attention import Attend, Attention
from lpa_model.backends import features, select
from lpa_model.backends.base import Backend, SamplingRow
from lpa_model.backends.cuda.backend import CudaBackend
from lpa_model.backends.cuda.twins import TWINS
from lpa_model.backends.torch.backend import TorchBackend
from lpa_model.batch import Batch, ScoredRows, Span
from lpa_model.cache import LatentCache
from lpa_model.config import Architecture, CacheLayout
from lpa_model.model import LPAForCausalLM
from lpa_model.quantization import WeightType, hold_weights
from tests.tiny import VOCAB_SIZE, random_model, tiny_config

CPU = torch.device("cpu")
BLOCK_SIZE = 32
MAX_POSITIONS = 100  # not a multiple of the block size
LAYOUTS: tuple[CacheLayout, ...] = get_args(CacheLayout)
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 32,
    "attention_rank": 32,
}

CASES: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "setting1": ("setting1", {}),
    "setting1-gqa": ("setting1", {"num_key_value_heads": 2, "head_dim": 6}),
    "setting1-dense-k": ("setting1", {"attention_rank": {"q": 8, "k": None, "v": 8, "o": 8}}),
    "setting1-dense-v": ("setting1", {"attention_rank": {"q": 8, "k": 8, "v": None, "o": 8}}),
    "setting1-per-layer": ("setting1", {"attention_rank": {"q": [8, None], "k": [None, 6], "v": [5, None], "o": 8}}),
    "setting1-dense": ("setting1", {"attention_rank": None, "lm_head_bias": True, "vocab_size": 301}),
    "setting1-ffn": ("setting1", {"ffn_rank": 6}),
    "setting1-wide": ("setting1", WIDE),
    "setting2": ("setting2", {}),
    "setting2-gqa": ("setting2", {"num_key_value_heads": 2, "head_dim": 6}),
    "setting2-bias": ("setting2", {"attention_bias": True, "num_key_value_heads": 2}),
    "setting2-dense-k": ("setting2", {"attention_rank": {"q": 8, "k": None, "v": 8, "o": 8}, "attention_bias": True}),
    "setting2-dense-v": ("setting2", {"attention_rank": {"q": 8, "k": 8, "v": None, "o": 8}, "attention_bias": True}),
    "setting2-per-layer": ("setting2", {"attention_rank": {"q": [8, None], "k": [None, 6], "v": [5, None], "o": 8}}),
    "setting2-dense": ("setting2", {"attention_rank": None, "tie_word_embeddings": True}),
    "setting2-ffn": ("setting2", {"ffn_rank": 6}),
    "setting1-mixed-ffn": ("setting1", {"ffn_rank": {"up": [7, None], "down": [None, 5]}}),
    "setting2-mixed-ffn": ("setting2", {"ffn_rank": {"gate": None, "up": 7, "down": [None, 5]}}),
    "setting2-qk-norm": ("setting2", {"qk_norm": True}),
    "setting2-qk-norm-gqa": ("setting2", {"qk_norm": True, "num_key_value_heads": 2, "attention_bias": True}),
    "setting2-wide": ("setting2", {**WIDE, "num_key_value_heads": 2}),
}
PACKED = (
    "setting1-gqa",
    "setting1-wide",
    "setting1-mixed-ffn",
    "setting2-wide",
    "setting2-dense",
    "setting2-mixed-ffn",
)
"""Those in which every way to pack a matrix occurs."""
KERNELS = (*PACKED, "setting2-qk-norm-gqa")
"""Those in which every kernel occurs, with grouped queries, norms of keys, biases and positions."""
WIDEST = ("setting1-wide", "setting2-wide")
"""Those whose sizes fill tiles, without and with positions."""
BASIC = ("setting1", "setting2", *WIDEST)


class Subject(NamedTuple):
    """A backend under test."""

    dtype: torch.dtype
    candidate: str  # of `select.CANDIDATES`
    weights: WeightType
    cache_dtype: torch.dtype
    instruction_sets: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        return self.weights in ("int8", "int4") or self.cache_dtype is torch.int8


def _chosen(dtype: torch.dtype, weights: WeightType, cache: str = "auto") -> dict[str, Subject]:
    """Those that `select` takes on this processor, with its best instruction set and with the one that all have."""
    sets = features.instruction_sets()
    choose = partial(select.choose, tiny_config(**WIDE), block_size=BLOCK_SIZE)
    name = str(dtype).removeprefix("torch.")
    found = {}
    for some in (sets, sets[-1:]) if weights == name else (sets,):
        choice = choose(dtype=name, weights=weights, cache_dtype=cache, instruction_sets=some)
        label = f"{choice.candidate.name} {some[0]}-{choice.types}" if some else f"torch-{choice.types}"
        found[label] = Subject(dtype, choice.candidate.name, weights, choice.case.cache_dtype, some)
    return found


BACKENDS: dict[str, Subject] = {
    "torch-float32": Subject(torch.float32, "torch", "float32", torch.float32),
    "torch-bfloat16": Subject(torch.bfloat16, "torch", "bfloat16", torch.bfloat16),
    "torch-float32, int8 weights": Subject(torch.float32, "torch", "int8", torch.float32),
    "torch-float32, int8 cache": Subject(torch.float32, "torch", "float32", torch.int8),
    "cuda's twins-float32": Subject(torch.float32, "cuda", "float32", torch.float32),
    "cuda's twins-bfloat16": Subject(torch.bfloat16, "cuda", "bfloat16", torch.bfloat16),
    **_chosen(torch.float32, "float32"),
    **_chosen(torch.bfloat16, "bfloat16"),
    **_chosen(torch.float32, "bfloat16"),
    **_chosen(torch.float32, "int8"),
    **_chosen(torch.float32, "int4"),
    **_chosen(torch.bfloat16, "int8"),
    **_chosen(torch.float32, "float32", "int8"),
    **_chosen(torch.bfloat16, "bfloat16", "int8"),
}
BEST = next(iter(_chosen(torch.float32, "float32")))


def cases_of(name: str) -> Sequence[str]:
    """Those that can tell something of a backend which another one's have not told."""
    tested, best = BACKENDS[name], features.instruction_sets()[:1]
    if tested.candidate in ("torch", "cuda"):
        # its float32 run has seen every case, and bfloat16 without hardware is slow
        return list(CASES) if name.endswith("-float32") else WIDEST
    if tested.weights != str(tested.dtype).removeprefix("torch."):
        return PACKED  # what is left differs in attention, which knows nothing of weights
    # the list of operations does not depend on the instruction set, only what each of them calls
    return list(CASES) if tested.instruction_sets[:1] == best else KERNELS


def build(tested: Subject, model: LPAForCausalLM, layout: CacheLayout) -> Backend | None:
    """None where the backend refuses the model."""
    candidate = next(row for row in select.CANDIDATES if row.name == tested.candidate)
    sets, held = tested.instruction_sets, (tested.weights, tested.cache_dtype)
    case = select.Case(model.config, tested.dtype, CPU, layout, BLOCK_SIZE, sets, *held)
    if candidate is select.CUDA:  # the kernels' twins, and functions in the place of graphs
        return None if select.cannot_graph(case) else CudaBackend(model, "twins", TWINS, False)
    return None if candidate.refuses(case) is not None else candidate.build(case, model)


def loaded(case: str, tested: Subject) -> LPAForCausalLM:
    """As a checkpoint in `dtype` is loaded: tables of positions stay float32. Its weights are bfloat16 already, where
    that is what they are held in."""
    dtype = tested.dtype
    architecture, changes = CASES[case]
    config = tiny_config(architecture, **{"max_position_embeddings": MAX_POSITIONS, **changes})
    model = random_model(config).to(torch.bfloat16 if tested.weights == "bfloat16" else dtype).to(dtype)
    if model.rotary is not None:
        model.rotary.build(config, CPU)
    return model


@dataclass(eq=False)
class Text:
    """A text whose first `prompt` tokens are a prompt and whose others count as generated."""

    ids: list[int]
    prompt: int
    shared: int = 0  # tokens taken over from the sequence before it
    computed: int = 0
    table: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)  # log-probabilities [n, vocab] of computed tokens


class Pool:
    """Blocks in random order; a free block holds NaN, and codes that no number has where there are codes."""

    def __init__(self, cache: LatentCache, rng: random.Random) -> None:
        self.cache, self.rng = cache, rng
        self.free = list(range(cache.num_blocks))
        self.users = [0] * cache.num_blocks
        self._poison(self.free)

    def _poison(self, blocks: Sequence[int]) -> None:
        for pool in self.cache.pools:
            pool[list(blocks)] = float("nan") if pool.is_floating_point() else -128

    def allocate(self) -> int:
        block = self.free.pop(self.rng.randrange(len(self.free)))
        self.users[block] = 1
        return block

    def share(self, block: int) -> int:
        self.users[block] += 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self._poison([block])
                self.free.append(block)


def random_texts(rng: random.Random, number: int) -> list[Text]:
    """Random texts; every second one starts with the full blocks of the prompt before it. One may go on for more than a
    block: a generated token takes a step of its own."""
    made: list[Text] = []
    for i in range(number):
        if i % 2:
            shared = made[-1].prompt // BLOCK_SIZE * BLOCK_SIZE
            ids, prompt = made[-1].ids[:shared], shared + rng.randint(1, 6)
        else:
            shared, ids, prompt = 0, [], rng.randint(1, 80)
        length = rng.randint(prompt, min(prompt + (BLOCK_SIZE + 4 if i == 0 else 12), MAX_POSITIONS))
        made.append(Text(ids + [rng.randrange(VOCAB_SIZE) for _ in range(length - len(ids))], prompt, shared))
    return made


def run(backend: Backend, layout: CacheLayout, texts: list[Text], seed: int, most: int = MAX_POSITIONS) -> None:
    """Push texts through the cache in random chunks of at most `most` tokens, in random batches."""
    rng = random.Random(seed)
    cache = backend.make_cache(layout, 24, BLOCK_SIZE)
    backend.warm_up(3, MAX_POSITIONS)  # of up to four
    pool = Pool(cache, rng)
    waiting, running = list(texts), list[Text]()
    while waiting or running:
        while waiting and len(running) < 4:
            text = waiting[0]
            source = texts[texts.index(text) - 1]
            if text.shared and source.computed < text.shared:
                break  # its prefix is not computed yet
            if text.shared:
                text.table = [pool.share(block) for block in source.table[: text.shared // BLOCK_SIZE]]
                text.computed = text.shared
            running.append(waiting.pop(0))
        step(backend, pool, rng.sample(running, rng.randint(1, len(running))), rng, most)
        for text in [text for text in running if text.computed == len(text.ids)]:
            if any(other.shared and texts[texts.index(other) - 1] is text for other in waiting):
                continue  # another text will share its blocks
            running.remove(text)
            pool.release(text.table)
    assert sorted(pool.free) == list(range(cache.num_blocks))


def step(backend: Backend, pool: Pool, texts: list[Text], rng: random.Random, most: int) -> None:
    active = [text for text in texts if text.computed < len(text.ids)]
    decodes = [text for text in active if text.computed >= text.prompt]
    active = decodes + [text for text in active if text.computed < text.prompt]
    if not active:
        return
    spans, new_blocks = [], []
    for text in active:
        left = text.prompt - text.computed
        length = min(most, rng.choice([left, rng.randint(1, left), min(left, 5)])) if left > 0 else 1
        while len(text.table) * BLOCK_SIZE < text.computed + length:
            text.table.append(pool.allocate())
            new_blocks.append(text.table[-1])
        spans.append(Span(text.computed, length, text.table, left <= 0))
    ids = [i for text, span in zip(active, spans, strict=True) for i in text.ids[span.context :][: span.length]]
    found = all_logprobs(backend, ids, spans, new_blocks)
    for text, span, rows in zip(active, spans, found.split([span.length for span in spans]), strict=True):
        text.rows.append(rows)
        text.computed += span.length


def all_logprobs(backend: Backend, ids: list[int], spans: list[Span], zero_blocks: Sequence[int] = ()) -> Tensor:
    """Log-probabilities of every token after each row of a step: float32 [rows, vocab], through the contract alone."""
    vocab, rows = backend.config.vocab_size, torch.arange(len(ids)).numpy()
    scored = ScoredRows(rows, rows * 0, rows * 0 + vocab)
    batch = Batch.build(ids, spans, BLOCK_SIZE, scored=scored, zero_blocks=zero_blocks)
    scores = backend.collect(backend.submit(batch, []), {}).prompt_scores
    out = torch.empty(len(ids), vocab)
    ids_of, values = np.array(scores.top_ids), np.array(scores.top_logprobs, dtype=np.float32)
    return out.scatter_(1, torch.from_numpy(ids_of), torch.from_numpy(values))


def exact_twin(model: LPAForCausalLM) -> LPAForCausalLM:
    """The same weights in float32: the truth about rounded ones."""
    twin = LPAForCausalLM(model.config)
    twin.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    return twin.eval()


def check(found: Tensor, expected: Tensor, plain: Callable[[], Tensor], tested: Subject) -> None:
    """float32: within 1e-4 of the truth; fewer bits: about as near to it as the plain forward with them."""
    if tested.dtype is torch.float32 and not tested.quantized:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    else:
        assert 0 < (found - expected).abs().mean() < 1.3 * (plain() - expected).abs().mean()


def through_int8(x: Tensor) -> Tensor:
    """x [.., width] after 8 bits and a scale for each row, computed in float64."""
    peak = x.double().abs().amax(-1, keepdim=True)
    scale = (peak / 127).bfloat16().double()
    return ((x.double() / scale).round() * scale).to(x.dtype)


def attention_after_int8(model: LPAForCausalLM, layout: CacheLayout) -> Attend:
    """Plain attention over keys and values as an int8 cache holds them."""

    def attend(layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys_latent, values_latent = model.config.cache_forms(layout, layer.layer)
        positions = torch.arange(len(q))

        def rotated(x: Tensor) -> Tensor:
            return x if model.rotary is None else model.rotary(x, positions)

        keys = rotated(layer.keys(through_int8(k))) if keys_latent else through_int8(rotated(layer.keys(k)))
        values = layer.values(through_int8(v)) if values_latent else through_int8(layer.values(v))
        return layer.attention(rotated(layer.queries(q))[None], keys[None], values[None], None)[0]

    return attend


Plain = Callable[[LPAForCausalLM, list[int]], Tensor]
"""A model's log-probabilities [n, vocab] after each of n tokens, without a cache."""


def plain_logprobs(model: LPAForCausalLM, ids: list[int]) -> Tensor:
    return model.logits(model(torch.tensor([ids]))[0]).log_softmax(-1)


def held_logprobs(tested: Subject, layout: CacheLayout) -> Plain:
    """Those of a model whose weights, keys and values have the bits that the backend holds them in."""

    def logprobs(model: LPAForCausalLM, ids: list[int]) -> Tensor:
        hold_weights(model, tested.weights)
        if tested.cache_dtype is not torch.int8:
            return plain_logprobs(model, ids)
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), attention_after_int8(model, layout))
        return model.logits(hidden).log_softmax(-1)

    return logprobs


def expected_of(model: LPAForCausalLM, texts: list[Text], plain: Plain = plain_logprobs) -> Tensor:
    return torch.cat([plain(model, text.ids)[text.shared :] for text in texts])


def texts_of(case: str) -> list[Text]:
    return random_texts(random.Random(len(case)), 4)


@cache
def truth(case: str, tested: Subject) -> Tensor:
    """What float32 says of a case's texts with the weights that are loaded."""
    return expected_of(exact_twin(loaded(case, tested)), texts_of(case))


@cache
def held(case: str, tested: Subject, layout: CacheLayout) -> Tensor:
    """What the plain forward says of them with the bits that a backend holds."""
    return expected_of(loaded(case, tested), texts_of(case), held_logprobs(tested, layout))


def layouts_of(name: str, case: str) -> Sequence[CacheLayout]:
    """Every layout of what `select` takes in float32; of the others' cases one or two, in turn."""
    if name == BEST:
        return LAYOUTS
    rotary = case.startswith("setting2") and BACKENDS[name].candidate != "torch"
    taken = LAYOUTS[1:] if rotary else LAYOUTS  # the others mostly refuse latents of rotary keys
    first = cases_of(name).index(case)
    return [taken[(first + i) % len(taken)] for i in range(2 if case in WIDEST else 1)]


def some_of(name: str, cases: Sequence[str]) -> Sequence[str]:
    return [case for case in cases if case in cases_of(name)]


# what these leave out is in extra/test_backends.py
ROWS = [(name, case, layout) for name in BACKENDS for case in cases_of(name) for layout in layouts_of(name, case)]
BRANCHES = [(name, case) for name in BACKENDS for case in some_of(name, BASIC)]
BITS = [(name, case) for name in BACKENDS for case in some_of(name, (*BASIC, "setting2-per-layer"))]


@pytest.mark.parametrize(("name", "case", "layout"), ROWS)
def test_every_row_equals_the_plain_forward(name: str, case: str, layout: CacheLayout) -> None:
    check_every_row(name, case, layout)


@torch.inference_mode()
def check_every_row(name: str, case: str, layout: CacheLayout) -> None:
    tested = BACKENDS[name]
    if (backend := build(tested, loaded(case, tested), layout)) is None:
        assert tested.candidate != "torch", "torch refuses nothing"
        return
    texts = texts_of(case)
    run(backend, layout, texts, seed=len(case))
    found = torch.cat([torch.cat(text.rows) for text in texts])
    bits = tested._replace(candidate="", instruction_sets=())  # which decide what is expected
    expected = truth(case, bits._replace(cache_dtype=tested.dtype))
    plain = partial(held, case, bits, layout if tested.cache_dtype is torch.int8 else "latent")
    if tested.dtype is torch.float32 and tested.cache_dtype is torch.int8:
        # a number between two codes may get the other one: far less than what all codes cost together
        assert (found - plain()).abs().mean() < 0.1 * (plain() - expected).abs().mean()
    check(found, expected, plain, tested)


def _branched(backend: Backend, layout: CacheLayout, chunk: int) -> Tensor:
    """A beginning of 40 tokens and three continuations that do not see each other, `chunk` tokens at a time."""
    backend.make_cache(layout, 4, BLOCK_SIZE)
    ids = [(7 * i * i + 3) % VOCAB_SIZE for i in range(70)]
    table, branches = [2, 0, 3], (40, 45, 58)
    rows = []
    for start in range(0, 70, chunk):
        length = min(chunk, 70 - start)
        span = Span(start, length, table, False, branches)
        rows.append(all_logprobs(backend, ids[start : start + length], [span], table if start == 0 else ()))
    return torch.cat(rows)


@pytest.mark.parametrize(("name", "case"), BRANCHES)
def test_branches_see_the_beginning_and_themselves(name: str, case: str) -> None:
    check_branches(name, case)


@torch.inference_mode()
def check_branches(name: str, case: str) -> None:
    tested = BACKENDS[name]
    layout: CacheLayout = "latent" if case.startswith("setting1") else "mixed"
    ids = [(7 * i * i + 3) % VOCAB_SIZE for i in range(70)]

    def one_by_one(model: LPAForCausalLM, plain: Plain) -> Tensor:
        parts = []
        for start, end in ((0, 45), (45, 58), (58, 70)):
            rows = plain(model, ids[:40] + ids[max(start, 40) : end])
            parts.append(rows if start == 0 else rows[40:])
        return torch.cat(parts)

    expected = one_by_one(exact_twin(loaded(case, tested)), plain_logprobs)

    def held() -> Tensor:
        return one_by_one(loaded(case, tested), held_logprobs(tested, layout))

    for chunk in (70, 9):
        if (backend := build(tested, loaded(case, tested), layout)) is not None:
            check(_branched(backend, layout, chunk), expected, held, tested)


@pytest.mark.parametrize(("name", "case"), BITS)
def test_bits_do_not_depend_on_chunks_batches_or_threads(name: str, case: str, two_threads: None) -> None:
    check_bits(name, case)


@torch.inference_mode()
def check_bits(name: str, case: str) -> None:
    tested = BACKENDS[name]
    layout: CacheLayout = "latent" if case.startswith("setting1") else "mixed"
    found = []
    for seed, most, threads in ((1, MAX_POSITIONS, 1), (2, MAX_POSITIONS, 2), (3, 7, 2)):
        torch.set_num_threads(threads)
        backend = build(tested, loaded(case, tested), layout)
        if backend is None or not backend.batch_invariant:
            return
        texts = random_texts(random.Random(5), 3)
        run(backend, layout, texts, seed, most)
        found.append(torch.cat([torch.cat(text.rows) for text in texts]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", BACKENDS)
@torch.inference_mode()
def test_sampling_scores_and_copied_blocks(name: str) -> None:
    """The rest of the contract: sampled rows, masks that come late, and blocks that are copied whole."""
    tested = BACKENDS[name]
    backend = build(tested, loaded("setting2-wide", tested), "mixed")
    assert backend is not None
    backend.make_cache("mixed", 4, BLOCK_SIZE)
    ids = list(range(10, 20))
    batch = Batch.build(ids, [Span(0, 10, [1], False)], BLOCK_SIZE, zero_blocks=[1])
    rows = [
        SamplingRow(row=9, temperature=0.0, logprobs=2),
        SamplingRow(row=9, temperature=0.0, constrained=True),
        SamplingRow(row=3, draws=lambda attempt: 0.5, top_k=3),
    ]
    handle = backend.submit(batch, rows)
    backend.copy_blocks([1], [3])
    backend.wait(handle)
    result = backend.collect(handle, {})
    best = all_logprobs(backend, [ids[-1]], [Span(9, 1, [3], True)])[0]  # once more, from the copy
    assert result.tokens[0] == best.argmax() and result.tokens[1] is None and result.tokens[2] is not None
    scores = result.scores[0]
    assert (scores.ranks, scores.top_ids[0][0], len(scores.top_ids[0])) == ([1], result.tokens[0], 2)
    exact = backend.batch_invariant or (tested.dtype is torch.float32 and not tested.quantized)
    exact &= tested.dtype is torch.float32 or tested.cache_dtype is not torch.int8  # prompts may round what they read
    # else a rounded sum may give an input another code
    assert scores.logprobs[0] == pytest.approx(best.max().item(), abs=1e-4 if exact else 0.2)
    handle = backend.submit(Batch.build([ids[-1]], [Span(9, 1, [3], True)], BLOCK_SIZE), [replace(rows[1], row=0)])
    mask = torch.zeros(-(-VOCAB_SIZE // 8), dtype=torch.uint8).numpy()
    mask[7 // 8] = 1 << 7 % 8
    assert backend.collect(handle, {0: mask}).tokens == [7]


def test_torch_is_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "CANDIDATES", select.CANDIDATES[-1:])
    choice = select.choose(tiny_config(), dtype="float32")
    assert isinstance(choice.build(random_model(tiny_config())), TorchBackend)
    assert not choice.batch_invariant and not choice.refused
