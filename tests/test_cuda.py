"""On a GPU, where there is one: the same numbers as on the CPU, from the model, the engine, the server and training."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lpa_model.backends.features import resolve_device, resolve_dtype
from lpa_model.cache import bytes_per_token
from lpa_model.checkpoint import load_model
from lpa_model.config import Architecture, CacheLayout
from lpa_model.train.config import TrainConfig
from lpa_model.train.loop import train
from lpa_model.train.tokenizer import encode
from lpa_model.train.tokens import Tokens
from server.engine.engine import build_engine
from server.engine.request import FinishReason, GrammarSpec, Request, RequestOutput, SamplingParams
from server.settings import load_settings
from tests.serving import serving, until
from tests.test_backends import CASES, LAYOUTS
from tests.test_engine import assert_greedy, greedy, ids_of, make_engine, naive_logprobs, prompt, run
from tests.tiny import CORPUS, byte_tokenizer, random_model, tiny_config, write_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")
IDS = torch.tensor([[(7 * i * i + 3) % 300 for i in range(50)]])


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cuda:", ""])
def test_a_device_that_is_not_there(name: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="device: "):
        resolve_device(name)
    with pytest.raises(ValueError, match="device: "):
        build_engine(tiny_checkpoint, dataclasses.replace(load_settings().engine_options(), device=name))


@needs_gpu
@pytest.mark.parametrize(("architecture", "changes"), CASES.values(), ids=CASES)
def test_logits(architecture: Architecture, changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(architecture, **changes)
    expected = (plain := random_model(config)).logits(plain(IDS))
    folder = write_checkpoint(tmp_path / "model", config)
    model = load_model(folder, torch.float32, torch.device("cuda"))
    torch.testing.assert_close(model.logits(model(IDS.cuda())).cpu(), expected, rtol=0, atol=1e-4)
    rounded = load_model(folder, torch.bfloat16, CPU)
    model = load_model(folder, torch.bfloat16, torch.device("cuda"))
    ours, theirs = model.logits(model(IDS.cuda())).cpu() - expected, rounded.logits(rounded(IDS)) - expected
    assert ours.square().mean() < 1.5 * theirs.square().mean() + 1e-6  # as near to the truth as on the CPU


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_and_log_probabilities(tiny_checkpoint: Path, architecture: Architecture, layout: CacheLayout) -> None:
    """Prompts in chunks, beside others' tokens, and after preemptions."""
    memory = 14 * 8 * bytes_per_token(tiny_config(architecture), layout, torch.float32)
    options = {"device": "cuda", "kv_cache_layout": layout, "max_num_batched_tokens": 11}
    engine = make_engine(tiny_checkpoint, **options, kv_cache_memory=memory)
    lengths = [(1, 20), (7, 25), (8, 29), (30, 32), (61, 3), (17, 31)]
    requests = [Request(f"r{i}", prompt(i, n), greedy(m, logprobs=3)) for i, (n, m) in enumerate(lengths)]
    requests.append(Request("score", prompt(9, 70), SamplingParams(max_tokens=0, prompt_logprobs=2)))
    outputs = run(engine, requests)
    assert engine.take_stats().preemptions > 0
    model = random_model(tiny_config(architecture))
    for request, (_, count) in zip(requests, lengths, strict=False):
        found = ids_of(outputs[request.id])
        assert_greedy(model, request.token_ids[: request.num_prompt_tokens], count, found)
        exact = naive_logprobs(model, request.token_ids)[-count:]
        reported = [output.logprobs for output in outputs[request.id]]
        logprobs = [x for some in reported if some is not None for x in some.logprobs]
        assert logprobs == pytest.approx(exact, abs=1e-4)
    scored = outputs["score"][0].prompt_logprobs
    assert scored is not None
    assert scored.logprobs == pytest.approx(naive_logprobs(model, prompt(9, 70)), abs=1e-4)


PARAMS = {
    "top_p": SamplingParams(max_tokens=12, seed=1, top_p=0.8, ignore_eos=True),
    "top_k": SamplingParams(max_tokens=12, seed=2, top_k=5, min_p=0.05, ignore_eos=True),
    "penalties": SamplingParams(max_tokens=12, seed=3, frequency_penalty=1.0, repetition_penalty=1.3, ignore_eos=True),
    "steered": SamplingParams(
        max_tokens=12, seed=4, logit_bias=((5, 4.0), (9, -9.0)), allowed_token_ids=tuple(range(5, 90)), ignore_eos=True
    ),
    "grammar": SamplingParams(
        max_tokens=12, seed=5, grammar=GrammarSpec("regex", "[a-f]{3} [0-9]{2}", "structured_outputs")
    ),
}


@needs_gpu
def test_sampling(tiny_checkpoint: Path) -> None:
    def outputs(device: str) -> dict[str, list[RequestOutput]]:
        engine = make_engine(tiny_checkpoint, device=device)
        return run(engine, [Request(name, prompt(3, 9), params) for name, params in PARAMS.items()])

    expected = {name: ids_of(found) for name, found in outputs("cpu").items()}
    assert {name: ids_of(found) for name, found in outputs("cuda").items()} == expected


@needs_gpu
def test_the_server(tiny_checkpoints: dict[Architecture, Path]) -> None:
    text = CORPUS[:120]
    for folder in tiny_checkpoints.values():
        answers = []
        for device in ("cpu", "cuda"):
            with serving(folder, device=device, admin_api_key="boss") as server:
                server.client.headers["Authorization"] = "Bearer boss"
                completion = server.complete(prompt="The robot", max_tokens=12, temperature=0)["choices"][0]["text"]
                scored = server.post("/v1/perplexity", input=text).json()["aggregate"]["nll_sum"]
                with server.client.stream(
                    "POST",
                    "/v1/completions",
                    json={"model": "tiny", "prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True},
                ) as response:
                    name = response.headers["x-request-id"]
                    assert server.post(f"/v1/requests/{name}/cancel").status_code == 200
                    response.read()
                until(server.idle)
                answers.append((completion, scored))
        assert answers[0][0] == answers[1][0]
        assert answers[0][1] == pytest.approx(answers[1][1], abs=1e-2)


@needs_gpu
@pytest.mark.parametrize("rate", [None, 1e-2], ids=["adamw", "muon"])
def test_training_learns_and_resumes(tmp_path: Path, rate: float | None) -> None:
    config = TrainConfig(
        steps=12, batch_tokens=64, sequence_length=32, learning_rate=1e-2, muon_learning_rate=rate, warmup_steps=2
    )
    tokenizer = byte_tokenizer()
    tokens = encode(tokenizer, CORPUS)
    valid = Tokens(tokens, num_bytes=len(CORPUS.encode()), documents=1, end_of_text=0)

    def losses(out: Path, device: str, stop: int | None = None) -> list[float]:
        out.mkdir(exist_ok=True)
        steps = train(tiny_config(), config, tokenizer, tokens, valid, out, device=device, checkpoint_every=4)
        return [progress.loss for progress in itertools.islice(steps, stop)]

    whole = losses(tmp_path / "whole", "cuda")
    assert whole[-1] < 0.8 * whole[0]
    assert whole == pytest.approx(losses(tmp_path / "cpu", "cpu"), rel=0.05)
    first = losses(tmp_path / "cut", "cuda", stop=7)
    second = losses(tmp_path / "cut", "cuda")
    assert first[:4] + second == pytest.approx(whole, rel=1e-2)
    load_model(tmp_path / "cut" / "model", torch.bfloat16, CPU)


@needs_gpu
def test_default_dtype_is_bfloat16_where_the_gpu_has_it(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint, device="cuda", dtype="auto")
    expected = resolve_dtype("auto", torch.device("cuda"))
    assert engine.runner.cache.keys[0].dtype is expected
    outputs = run(engine, [Request(f"r{i}", prompt(i, 5 + i), greedy(8)) for i in range(9)])
    assert all(found[-1].finish_reason is FinishReason.LENGTH for found in outputs.values())
