"""The Python API: the same bits as command line and server, against the plain forward, and what it refuses."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpa_model.config import Architecture
from lpa_model.perplexity import Method
from server.engine.engine import EngineOptions
from server.engine.model_runner import ModelRunner
from server.engine.request import FinishReason, GrammarSpec, SamplingParams
from server.errors import ContextLength, EngineError, InvalidRequest
from server.llm import LLM, Options
from server.scoring.perplexity import Text, pieces, tokenize, windows
from tests.serving import Served, serving
from tests.test_cli import succeed
from tests.test_engine import assert_greedy
from tests.test_perplexity import NAIVE, convention
from tests.test_score import json_lines, write
from tests.tiny import CORPUS, END_OF_TEXT_ID, byte_tokenizer, random_model, tiny_config, write_checkpoint

SMALL: dict[str, Any] = {"dtype": "float32", "threads": 1, "block_size": 32, "kv_cache_memory": 1 << 20}


@pytest.fixture(scope="module")
def llm(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[LLM]:
    with LLM(tiny_checkpoints["setting2"], max_num_seqs=4, **SMALL) as found:
        yield found


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


def idle(llm: LLM) -> bool:
    blocks = llm.engine.scheduler.blocks
    return not llm.engine.has_work and not llm._inboxes and blocks.num_free + blocks.num_cached == blocks.num_blocks


# --- the same bits on every way -------------------------------------------------------------------------------------


def test_generated_texts_and_log_probabilities_are_the_servers_and_the_command_lines(
    llm: LLM, served: Served, tiny_checkpoints: dict[Architecture, Path]
) -> None:
    prompts = ["The robot", "The waves of the", CORPUS[:100], "a"]
    params = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.8, seed=7, logprobs=2, ignore_eos=True)
    here = llm.generate(prompts, params)
    asked = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.8, "seed": 7, "ignore_eos": True}
    there = served.complete(prompt=prompts, logprobs=2, return_token_ids=True, **asked)["choices"]
    for completion, choice in zip(here, there, strict=True):
        assert (completion.text, completion.token_ids) == (choice["text"], choice["token_ids"])
        assert completion.finish_reason is not None
        assert completion.finish_reason.value == choice["finish_reason"] == "length"
        assert completion.logprobs.logprobs == choice["logprobs"]["token_logprobs"]
        assert [len(top) for top in completion.logprobs.top_ids] == [2] * 24
    flags = ("--max-tokens", 24, "--temperature", 0.9, "--top-p", 0.8, "--seed", 7, "--dtype", "float32")
    model = ("--model", tiny_checkpoints["setting2"])
    own = llm.generate(prompts[1], SamplingParams(max_tokens=24, temperature=0.9, top_p=0.8, seed=7))
    assert succeed("generate", prompts[1], *flags, *model) == own[0].text + "\n"


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "full"},
        {"method": "sliding", "max_length": 30, "stride": 9},
        {"method": "rolling", "max_length": 30},
        {"method": "chunks", "max_length": 4},
    ],
    ids=lambda asked: asked["method"],
)
def test_scores_are_the_servers_and_the_command_lines(
    llm: LLM, served: Served, tiny_checkpoints: dict[Architecture, Path], tmp_path: Path, asked: dict[str, Any]
) -> None:
    texts = [CORPUS[:150], "The waves of the sea", CORPUS[40:160], "the sea, the robot"]
    here = llm.score(texts, **asked)
    there = served.post("/v1/perplexity", input=texts, return_tokens=True, **asked).json()
    out, path = tmp_path / "tokens.jsonl", write(tmp_path / "a.jsonl", json_lines(*({"text": t} for t in texts)))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    command = ("score", path, "--field", "text", "--model", tiny_checkpoints["setting2"], "--dtype", "float32")
    told = json.loads(succeed(*command, *flags, "--json", "--tokens", out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert here.convention == llm.convention(**asked)
    for i, own in enumerate(here.texts):
        assert own.token_ids == [token["id"] for token in there["data"][i]["tokens"]]
        assert own.logprobs == [token["logprob"] for token in there["data"][i]["tokens"]]
        assert own.ranks == [token["rank"] for token in there["data"][i]["tokens"]]
        assert own.logprobs == [row["logprob"] for row in rows if row["line"] == i + 1]
        metrics = own.sums.metrics(here.convention.method)
        for entry in (there["data"][i], told["data"][i]):
            assert {name: entry[name] for name in metrics} == metrics
    assert there["aggregate"] == told["aggregate"] == {"num_texts": 4, **here.sums.metrics(here.convention.method)}


def test_likelihoods_are_the_servers(llm: LLM, served: Served) -> None:
    pairs: list[tuple[str | list[int], str | list[int]]] = [
        ("The robot ", "liked the sea"),
        ("The robot", " said"),
        ("", "waves"),
        ([5, 6, 7], [8, 9]),
        ("The robot", " was a gull"),
    ]
    here = llm.loglikelihood(pairs)
    there = served.post("/v1/loglikelihood", pairs=pairs).json()["data"][0]["continuations"]
    assert [dataclasses.asdict(one) for one in here] == [
        {name: entry[name] for name in ("logprob", "is_greedy", "num_tokens", "num_bytes")} for entry in there
    ]
    assert llm.loglikelihood([]) == []


# --- generation ------------------------------------------------------------------------------------------------------


def test_prompts_come_in_every_form_and_completions_in_their_order(
    tiny_checkpoint: Path, architecture: Architecture
) -> None:
    model, ids = random_model(tiny_config(architecture)), byte_tokenizer().encode("The robot").ids
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with LLM(tiny_checkpoint, max_num_seqs=2, **SMALL) as llm:
        for prompts in ("The robot", ids, ["The robot"], [ids]):
            (completion,) = llm.generate(prompts, params)
            assert_greedy(model, ids, 8, completion.token_ids)
            assert completion.logprobs.logprobs == []
        lengths = [5, 1, 9, 2, 7, 3]  # more than run or wait at once, and they end in another order
        many = [ids[: 1 + i % 2] for i in range(6)]
        completions = llm.generate(many, [dataclasses.replace(params, max_tokens=n) for n in lengths])
        for prompt, length, completion in zip(many, lengths, completions, strict=True):
            assert_greedy(model, prompt, length, completion.token_ids)
        assert llm.generate([]) == []
        (scored,) = llm.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=1))
        assert scored.prompt_logprobs is not None
        assert len(scored.prompt_logprobs.logprobs) == len(ids) - 1
        assert idle(llm)


def test_a_stream_comes_in_pieces_beside_other_calls_and_ends_when_it_is_closed(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    (whole,) = llm.generate("The robot", params)
    outputs = []
    for output in llm.stream("The robot", params):
        outputs.append(output)
        if len(outputs) == 5:
            assert llm.generate("The robot", params)[0].token_ids == whole.token_ids
    assert len(outputs) > 5
    assert "".join(output.text for output in outputs) == whole.text
    assert [token for output in outputs for token in output.token_ids] == whole.token_ids
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    left = llm.stream("The robot", params)
    next(left)
    left.close()  # type: ignore[attr-defined]  # it is a generator
    assert idle(llm)


def test_text_follows_a_grammar(llm: LLM) -> None:
    spec = GrammarSpec("choice", '["yes", "no"]', "grammar")
    (completion,) = llm.generate("Is it?", SamplingParams(max_tokens=8, temperature=1, seed=1, grammar=spec))
    assert completion.text in ("yes", "no")
    with pytest.raises(InvalidRequest, match="grammar"):
        llm.generate("a", SamplingParams(grammar=GrammarSpec("regex", "[", "grammar")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": -1}, "max_tokens: -1 is less than 0"),
        ({"max_tokens": 0}, "max_tokens: 0 needs prompt_logprobs"),
        ({"temperature": -0.5}, "temperature: .*greater than or equal to 0"),
        ({"temperature": math.nan}, "temperature: .*finite"),
        ({"top_p": 1.5}, "top_p: .*less than or equal to 1"),
        ({"top_k": -2}, "top_k: "),
        ({"repetition_penalty": 0}, "repetition_penalty: "),
        ({"seed": 1 << 64}, "seed: "),
        ({"logprobs": 257}, "logprobs: 257 is not between -1 and 256"),
        ({"prompt_logprobs": -2}, "prompt_logprobs: "),
        ({"min_tokens": 17}, "min_tokens: 17 is more than the 16"),
        ({"stop_token_ids": (300,)}, "stop_token_ids: 300 is outside the vocabulary of 300"),
        ({"allowed_token_ids": ()}, "allowed_token_ids: "),
        ({"logit_bias": ((5, 101.0),)}, "logit_bias: "),
        ({"bad_words": ((5, -1),)}, "bad_words: token id -1"),
        ({"stop": ("",)}, "stop: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parameters_out_of_range_are_named(llm: LLM, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}") as refused:
        llm.generate("a", SamplingParams(**changes))
    assert refused.value.param == next(iter(changes))


def test_parameters_are_rounded_as_the_api_rounds_them(llm: LLM) -> None:
    greedy = llm.generate("The robot", SamplingParams(temperature=0))
    assert llm.generate("The robot", SamplingParams(temperature=1e-9)) == greedy
    assert llm.generate("The robot", SamplingParams(temperature=1, top_p=0)) == greedy


def test_prompts_that_cannot_be_served_are_named(llm: LLM) -> None:
    for prompts, message in (
        ([[1], []], r"prompts\[1\]: is empty"),
        ("", "prompts: is empty"),
        ([[1], [2, 300]], r"prompts\[1\]: token id 300 is outside the vocabulary of 300"),
        ([[1.5]], "prompts: '1.5' is not a token id"),
        ([None], "prompts: must be a text or a list of token ids"),
        (["a", "\ud800"], r"prompts\[1\]: half a surrogate pair"),
    ):
        with pytest.raises(InvalidRequest, match=f"^{message}"):
            llm.generate(prompts)  # type: ignore[arg-type]  # some are wrong by type
    with pytest.raises(ContextLength, match=r"prompts: 120 tokens and max_tokens 16 make 136. .* 128 tokens"):
        llm.generate([5] * 120)
    with pytest.raises(InvalidRequest, match="params: 1 for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])
    assert idle(llm)


# --- scoring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "sliding", "rolling", "chunks"])
def test_scores_are_the_loops_of_each_method(tiny_checkpoint: Path, architecture: Architecture, method: Method) -> None:
    model = random_model(tiny_config(architecture))
    ids = random.Random(3).choices(range(1, 300), k=100)
    length, stride = (100, None) if method == "full" else (16, 5 if method == "sliding" else None)
    how = convention(method, length, stride, END_OF_TEXT_ID if method == "rolling" else None)
    with LLM(tiny_checkpoint, max_num_seqs=3, **SMALL) as llm:
        found = llm.score(ids, method, max_length=length, stride=stride)
        assert found.convention == how
        (text,) = found.texts
        assert text.token_ids == ids
        own = [logprob for logprob in text.logprobs if logprob is not None]
        assert own == pytest.approx([-nll for nll in NAIVE[method](model, ids, how)], rel=1e-4, abs=1e-5)
        scored = {i for window in windows(len(ids), how) for i in range(window.first_scored, window.end)}
        for column in (text.logprobs, text.ranks):
            assert [i for i, value in enumerate(column) if value is not None] == sorted(scored)
        assert found.sums.nll_sum == text.sums.nll_sum == -math.fsum(own)
        assert idle(llm)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_what_a_file_stores_in_fewer_bits_scores_the_same(
    tmp_path: Path, architecture: Architecture, weights: str
) -> None:
    """The same numbers in bfloat16 and in float32, held as the same type."""
    folders = [tmp_path / name for name in ("narrow", "wide")]
    write_checkpoint(folders[0], tiny_config(architecture), dtype=torch.bfloat16)
    shutil.copytree(*folders)
    stored = load_file(folders[1] / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in stored.items()}, folders[1] / "model.safetensors")
    found = []
    for folder in folders:
        with LLM(folder, weights=weights, **SMALL) as llm:
            found.append(llm.score("It was a bright cold day in April.").texts[0].logprobs)
    assert found[0] == found[1]


def test_a_corpus_of_any_size_is_read_as_it_is_scored(llm: LLM) -> None:
    read = itertools.count()
    how = llm.convention("sliding", max_length=16)

    def texts() -> Iterator[Text]:
        for i in read:
            yield tokenize(llm.tokenizer, how, f"text {i}", "" if i % 5 == 1 else CORPUS[i % 7 : 20 + i % 90])

    scored = llm.score_pieces(texts(), how)
    seen = [piece.text.where for piece, _ in itertools.islice(scored, 300)]
    assert list(dict.fromkeys(seen)) == [f"text {i}" for i in range(len(set(seen)))]
    assert next(read) < len(set(seen)) + 2 * llm.engine.scheduler.max_num_seqs + 2
    scored.close()  # type: ignore[attr-defined]  # it is a generator
    assert idle(llm)


def test_the_pieces_of_a_text_are_all_of_its_tokens(llm: LLM) -> None:
    for size, how in itertools.product(
        (0, 1, 2, 40, 97), (convention("full", 128), convention("sliding", 9, 4), convention("rolling", 9, None, 0))
    ):
        text = tokenize(llm.tokenizer, how, "x", [5] * size)
        cut = list(pieces(text, how, llm.max_model_len))
        assert [piece.window for piece in cut] == [*windows(size, how)] or (size < 2 and cut[0].window is None)
        assert [piece.is_last for piece in cut] == [False] * (len(cut) - 1) + [True]
        assert [token for piece in cut for token in range(piece.start, piece.end)] == list(range(size))


def test_what_cannot_be_scored_is_named(llm: LLM) -> None:
    with pytest.raises(ContextLength, match=r"^texts\[1\]: has .* tokens; method 'full' takes at most 128"):
        llm.score(["the sea", "the sea" * 60])
    with pytest.raises(InvalidRequest, match=r"^texts\[1\]: has 3 tokens; method 'chunks' needs at least 10"):
        llm.score([[5] * 20, [5] * 3], "chunks", max_length=5)
    with pytest.raises(InvalidRequest, match=r"^texts: has no token to score; without BOS") as refused:
        llm.score(["", "a"])
    assert refused.value.param == "texts"
    with pytest.raises(InvalidRequest, match=r"^max_length: 129 is more than"):
        llm.score("the sea", max_length=129)
    with pytest.raises(InvalidRequest, match=r"^texts\[0\]: token id 300"):
        llm.score([[300, 1], [1, 2]])
    with pytest.raises(InvalidRequest, match=r"^pairs\[1\]\[1\]: is empty"):
        llm.loglikelihood([("a", "b"), ("a", "")])
    three: Any = ("a", "b", "c")
    with pytest.raises(InvalidRequest, match=r"^pairs\[1\]: must be a list of two"):
        llm.loglikelihood([("a", "b"), three])
    with pytest.raises(InvalidRequest, match=r"^add_bos: the model has no BOS"):
        llm.loglikelihood([("a", "b")], add_bos=True)
    with pytest.raises(ContextLength, match=r"^pairs\[0\]\[1\]: has 130 tokens with its context"):
        llm.loglikelihood([([5] * 100, [6] * 30)])
    assert idle(llm)


# --- its life --------------------------------------------------------------------------------------------------------


def test_a_step_that_fails_is_an_error_and_the_next_call_works(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate("The robot", SamplingParams(temperature=0))

    def broken(self: ModelRunner, batch: Any) -> Any:
        raise RuntimeError("a broken step")

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", broken)
        with pytest.raises(EngineError, match="RuntimeError: a broken step"):
            llm.generate(["The robot", "The sea"])
        assert idle(llm)
    assert llm.generate("The robot", SamplingParams(temperature=0)) == expected


def test_options_are_the_engines_and_are_checked(tiny_checkpoint: Path) -> None:
    assert Options.__annotations__.keys() == {field.name for field in dataclasses.fields(EngineOptions)}
    with pytest.raises(TypeError, match=r"'port' is not an option of the engine"):
        LLM(tiny_checkpoint, port=80)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"max-num-seqs"):
        LLM(tiny_checkpoint, max_num_seqs=0)
    with pytest.raises(ValueError, match=r"none: no such model folder"):
        LLM(tiny_checkpoint / "none")
    with LLM(tiny_checkpoint, max_model_len=40, enable_prefix_caching=False, **SMALL) as llm:
        assert llm.max_model_len == 40
        assert llm.dtype == "float32"
        assert llm.name == tiny_checkpoint.name
        assert not llm.engine.scheduler.blocks.enable_prefix_caching


def test_a_closed_model_is_gone(tiny_checkpoint: Path) -> None:
    llm = LLM(tiny_checkpoint, **SMALL)
    begun = llm.stream("The robot", SamplingParams(max_tokens=50, ignore_eos=True))
    next(begun)
    llm.close()
    llm.close()
    for use in (lambda: llm.generate("a"), lambda: next(begun), lambda: llm.score("the sea")):
        with pytest.raises(RuntimeError, match="the model is closed"):
            use()


# --- words, regions, hidden states ------------------------------------------------------------------------------------

TEXTS = ["The robot | liked the sound| of the waves.", CORPUS[:150], "a"]


@pytest.mark.parametrize("unit", ["word", "region"])
@pytest.mark.parametrize("correction", [True, False])
def test_units_are_the_servers(llm: LLM, served: Served, unit: Any, correction: bool) -> None:
    asked: dict[str, Any] = {"method": "rolling", "max_length": 40, "unit": unit, "boundary_correction": correction}
    there = served.answer("/v1/perplexity", input=TEXTS, **asked)["data"]
    here = llm.score(TEXTS, **asked)
    for text, entry in zip(here.texts, there, strict=True):
        assert [dataclasses.asdict(one) for one in text.units] == entry["units"]
        assert len(text.logprobs) == len(text.ranks) == len(text.token_ids)
    plain = llm.score([text.replace("|", "") if unit == "region" else text for text in TEXTS], "rolling", max_length=40)
    assert [text.logprobs for text in plain.texts] == [text.logprobs for text in here.texts]
    assert not any(text.units for text in plain.texts) and idle(llm)


def test_what_cannot_be_divided_is_refused_by_name(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="texts: unit 'region' needs a text"):
        llm.score([5, 6, 7], unit="region")
    wrong: Any = "line"
    with pytest.raises(InvalidRequest, match="unit: 'line' is neither 'word' nor 'region'"):
        llm.score("a", unit=wrong)
    with pytest.raises(InvalidRequest, match="region_separator: is empty"):
        llm.score("a", unit="region", region_separator="")
    for name, value in (("boundary_correction", False), ("region_separator", "/")):
        given: dict[str, Any] = {name: value}
        with pytest.raises(InvalidRequest, match=f"{name}: has no meaning without unit") as refused:
            llm.score("a", **given)
        assert refused.value.param == name
    assert idle(llm)


@pytest.mark.parametrize(
    "asked", [{}, {"pooling": "last"}, {"dimensions": 5}, {"normalize": False}, {"add_special_tokens": False}]
)
def test_embeddings_are_the_servers(llm: LLM, served: Served, asked: dict[str, Any]) -> None:
    there = served.answer("/v1/embeddings", input=TEXTS, encoding_format="base64", **asked)["data"]
    here = llm.embed(TEXTS, **asked)
    assert [vector.astype("<f4").tobytes() for vector in here] == [base64.b64decode(e["embedding"]) for e in there]
    assert (llm.embed(TEXTS[0], **asked)[0] == here[0]).all() and idle(llm)


def test_hidden_states_are_the_servers(llm: LLM, served: Served) -> None:
    for asked in ({}, {"layers": [0, 1, -1]}, {"layers": [0], "positions": [0, -1]}):
        texts = TEXTS[:2]
        there = served.answer("/v1/hidden_states", input=texts, **asked)
        for states, entry in zip(llm.hidden_states(texts, **asked), there["data"], strict=True):
            assert (states.token_ids, list(states.layers)) == (entry["token_ids"], there["layers"])
            assert (list(states.positions), list(states.values.shape)) == (entry["positions"], entry["shape"])
            assert states.values.astype("<f4").tobytes() == base64.b64decode(entry["data"])
    assert idle(llm)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda llm: llm.embed(""), "texts: is empty"),
        (lambda llm: llm.embed(["a", []]), "texts[1]: is empty"),
        (lambda llm: llm.embed("a", dimensions=0), "dimensions: 0 is not between 1 and "),
        (lambda llm: llm.embed("a", dimensions=99999), "dimensions: 99999 is not between 1 and "),
        (lambda llm: llm.embed("a", pooling="max"), "pooling: 'max' is neither"),
        (lambda llm: llm.embed([1] * 4000), "texts: 4000 tokens"),
        (lambda llm: llm.hidden_states("a", layers=[7]), "layers[0]: 7 is not between"),
        (lambda llm: llm.hidden_states("a", layers=[]), "layers: is empty"),
        (lambda llm: llm.hidden_states("a", positions=[9]), "positions[0]: 9 is no position of texts"),
        (lambda llm: llm.hidden_states("a", positions=[]), "positions: is empty"),
    ],
)
def test_what_has_no_hidden_states_is_refused_by_name(llm: LLM, ask: Any, says: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        ask(llm)
    assert raised.value.message.startswith(says) and idle(llm)
