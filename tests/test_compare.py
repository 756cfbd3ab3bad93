"""Two models side by side, against plain loops in NumPy's float64; and `lpa score --compare`."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lpa_model import compare as module
from lpa_model.checkpoint import save_checkpoint
from lpa_model.compare import Comparison, Pair, compare_windows, measure_pairs
from lpa_model.config import Architecture
from lpa_model.model import LPAForCausalLM
from lpa_model.perplexity import Convention, Window, windows
from tests.test_cli import assert_one_line, lpa, succeed
from tests.test_perplexity import convention
from tests.tiny import CORPUS, byte_tokenizer, random_model, tiny_config, write_checkpoint

Floats = NDArray[np.float64]


def log_distribution(model: LPAForCausalLM, context: list[int]) -> Floats:
    logits = model.logits(model(torch.tensor([context])))[0, -1].double().numpy()
    shifted = logits - logits.max()
    found: Floats = shifted - np.log(np.exp(shifted).sum())
    return found


def naive(a: LPAForCausalLM, b: LPAForCausalLM, contexts: list[list[int]], targets: list[int]) -> dict[str, float]:
    """Each token by itself."""
    differences, divergences, same = [], [], []
    for context, target in zip(contexts, targets, strict=True):
        p, q = log_distribution(a, context), log_distribution(b, context)
        differences.append(p[target] - q[target])
        divergences.append(float(np.sum(np.exp(p) * (p - q))))
        same.append(int(np.argmax(p)) == int(np.argmax(q)))
    n = len(targets)
    return {
        "num_tokens": n,
        "perplexity_ratio": float(np.exp(np.mean(differences))),
        "nll_difference": float(np.mean(differences)),
        "nll_difference_stderr": float(np.std(differences)) / math.sqrt(n - 1),
        "kl_divergence": float(np.mean(divergences)),
        "kl_divergence_stderr": float(np.std(divergences)) / math.sqrt(n - 1),
        "top1_agreement": float(np.mean(same)),
    }


def nudged(model: LPAForCausalLM, amount: float) -> LPAForCausalLM:
    """The same model with noise on its parameters."""
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=amount)
    return model


@pytest.mark.parametrize(("architecture", "amount"), [("setting1", 1e-3), ("setting2", 0.05)])
def test_a_comparison_is_its_loop(architecture: Architecture, amount: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGIT_ROWS", 7)
    a = random_model(tiny_config(architecture))
    b = nudged(random_model(tiny_config(architecture)), amount)
    texts = [byte_tokenizer().encode(text).ids for text in (CORPUS[:160], CORPUS[160:230])]
    for how in (convention("sliding", 12, 5), convention("rolling", 12, None, 0)):
        cut = [(ids, window) for ids in texts for window in windows(len(ids), how)]
        comparison = Comparison()
        for pairs in compare_windows(a, b, iter(cut)):
            comparison.add(pairs)
        contexts, targets = [], []
        for ids, window in cut:
            given = window.tokens(ids)
            for place in range(window.first_index, window.length):
                contexts.append(given[:place])
                targets.append(given[place])
        expected = naive(a, b, contexts, targets)
        assert expected["kl_divergence"] > 0
        # products of another shape round otherwise: float32 noise in the logits, which alike models feel most
        assert comparison.metrics() == pytest.approx(expected, rel=1e-4, abs=2e-7)


def test_windows_compared_together_are_the_windows_alone(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = random_model(tiny_config(architecture)), random_model(tiny_config(architecture), seed=1)
    draw = random.Random(8)
    how = convention("sliding", 16, 6, 7)
    texts = [draw.choices(range(300), k=draw.randrange(60)) for _ in range(15)]
    work = [(text, window) for text in texts for window in windows(len(text), how)]
    alone = [pair for item in work for pairs in compare_windows(a, b, [item]) for pair in pairs]
    for budget, rows in ((2048, 256), (40, 3), (1, 1)):
        monkeypatch.setattr(module, "TOKEN_BUDGET", budget)
        monkeypatch.setattr(module, "LOGIT_ROWS", rows)
        together = list(compare_windows(a, b, iter(work)))
        assert [len(pairs) for pairs in together] == [window.num_scored for _, window in work]
        for pair, expected in zip((pair for pairs in together for pair in pairs), alone, strict=True):
            assert pair == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_comparison_never_holds_more_than_its_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config(max_position_embeddings=700))
    heights: list[int] = []
    passes: list[int] = []
    forward, logits = LPAForCausalLM.forward, LPAForCausalLM.logits

    def watched_logits(self: LPAForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
        heights.append(hidden.shape[0])
        return logits(self, hidden)

    def watched_forward(self: LPAForCausalLM, ids: torch.Tensor) -> torch.Tensor:
        passes.append(ids.numel())
        return forward(self, ids)

    monkeypatch.setattr(LPAForCausalLM, "logits", watched_logits)
    monkeypatch.setattr(LPAForCausalLM, "forward", watched_forward)

    def passes_of(size: int, how: Convention) -> list[int]:
        passes.clear()
        list(compare_windows(model, model, (([5] * size, window) for window in windows(size, how))))
        return passes

    assert passes_of(700, convention("full", 700)) == [699, 699]
    assert (max(heights), sum(heights)) == (256, 2 * 699)
    assert len(passes_of(700, convention("sliding", 100, 50))) == 2  # 13 windows of 100 tokens share one of each
    assert max(passes_of(7000, convention("sliding", 100, 50))) <= module.TOKEN_BUDGET

    read = 0

    def endless() -> Iterator[tuple[list[int], Window]]:
        nonlocal read
        while True:
            read += 1
            yield [5] * 100, Window(0, 100, 1)

    next(compare_windows(model, model, endless()))
    assert read * 100 < (module.LOOK_AHEAD + 1) * module.TOKEN_BUDGET


def test_the_measures_of_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    (pair,) = measure_pairs(torch.tensor([2]), p.log(), q.log())
    assert pair.logprob_a == pytest.approx(math.log(0.25))
    assert pair.logprob_b == pytest.approx(math.log(0.5))
    assert pair.kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert not pair.same_top
    (pair,) = measure_pairs(torch.tensor([0]), p.log() + 5, p.log() - 3)
    assert pair.kl == pytest.approx(0, abs=1e-9)
    assert pair.same_top
    comparison = Comparison()
    comparison.add([Pair(-1.0, -2.0, 0.5, True), Pair(-3.0, -3.0, 0.1, False)])
    assert comparison.metrics() == {
        "num_tokens": 2,
        "perplexity_ratio": pytest.approx(math.exp(0.5)),  # A is better
        "nll_difference": 0.5,
        "nll_difference_stderr": 0.5,
        "kl_divergence": pytest.approx(0.3),
        "kl_divergence_stderr": pytest.approx(0.2),
        "top1_agreement": 0.5,
    }
    assert set(Comparison().metrics().values()) == {0, None}
    with pytest.raises(ValueError, match="not a finite number"):
        comparison.add([Pair(-1.0, -1.0, math.nan, True)])


def compare(a: object, b: object, *more: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed("score", "--compare", a, b, *more, "--dtype", "float32", "--json"))
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS)
    return path


def test_a_model_is_no_different_from_itself(
    tiny_checkpoint: Path, architecture: Architecture, corpus: Path, tmp_path: Path
) -> None:
    copy = write_checkpoint(tmp_path / "copy", tiny_config(architecture))
    for other in (tiny_checkpoint, copy):
        found = compare(tiny_checkpoint, other, corpus, "--max-length", 50)
        assert found["comparison"] == {
            "num_tokens": len(byte_tokenizer().encode(CORPUS).ids) - 1,
            "perplexity_ratio": 1,
            "nll_difference": 0,
            "nll_difference_stderr": 0,
            "kl_divergence": 0,
            "kl_divergence_stderr": 0,
            "top1_agreement": 1,
        }
        assert found["a"]["model"] == str(tiny_checkpoint)
        assert found["b"] == {**found["a"], "model": str(other)}


def test_two_models_on_files(tiny_checkpoints: dict[Architecture, Path], corpus: Path, tmp_path: Path) -> None:
    a = tiny_checkpoints["setting2"]
    b = write_checkpoint(tmp_path / "other", tiny_config(max_position_embeddings=64), seed=1)
    second = tmp_path / "second.txt"
    second.write_text("the waves")
    found = compare(a, b, corpus, second, "--method", "rolling")
    # the shorter context is the window of both
    assert (found["method"], found["max_length"], found["prefix_token_id"]) == ("rolling", 64, 0)
    assert found["num_texts"] == 2
    contexts, targets = [], []
    for text in (CORPUS, "the waves"):
        ids = byte_tokenizer().encode(text).ids
        for window in windows(len(ids), convention("rolling", 64, None, 0)):
            given = window.tokens(ids)
            contexts += [given[:place] for place in range(window.first_index, window.length)]
            targets += given[window.first_index :]
    models = random_model(tiny_config()), random_model(tiny_config(), seed=1)
    expected = naive(*models, contexts, targets)
    assert found["comparison"] == pytest.approx(expected, rel=1e-4)
    for side, folder in (("a", a), ("b", b)):
        asked = ("score", corpus, second, "--method", "rolling", "--max-length", 64, "--model", folder)
        alone = json.loads(succeed(*asked, "--dtype", "float32", "--json"))["aggregate"]
        assert (found[side].pop("model"), found[side].pop("dtype")) == (str(folder), "float32")
        del alone["num_texts"]
        assert found[side] == pytest.approx(alone, rel=1e-6)

    table = succeed("score", "--compare", a, b, corpus, second, "--method", "rolling", "--dtype", "float32")
    pairs = found["comparison"]
    for key in ("nll_difference", "kl_divergence"):
        sign = "+" if key == "nll_difference" and pairs[key] > 0 else ""
        assert f"{sign}{pairs[key]:.6f} ± {pairs[f'{key}_stderr']:.6f}" in table
    assert f"{pairs['top1_agreement']:.2%}" in table
    for side in ("a", "b"):
        assert f"{found[side]['perplexity']:.4f} ± {found[side]['perplexity_stderr']:.4f}" in table
    assert f"{pairs['perplexity_ratio']:.6f}" in table
    assert re.search("rolling, max_length 64, with EOS", table)


def test_what_cannot_be_compared_is_refused(
    tiny_checkpoints: dict[Architecture, Path], corpus: Path, tmp_path: Path
) -> None:
    a = tiny_checkpoints["setting2"]
    other = Tokenizer.from_str(byte_tokenizer().to_str())
    other.add_tokens(["waves"])
    config = tiny_config(vocab_size=301)
    save_checkpoint(tmp_path / "tokenizer", random_model(config), other, torch.float32)
    assert_one_line(
        lpa("score", "--compare", a, tmp_path / "tokenizer", corpus),
        "compare: the models have different tokenizers, .* compare bits per byte",
    )
    wider = write_checkpoint(tmp_path / "wider", config)
    assert_one_line(lpa("score", "--compare", a, wider, corpus), "compare: .* logits for 300 and 301 tokens")
    bos = write_checkpoint(tmp_path / "bos", tiny_config(bos_token_id=7))
    assert_one_line(
        lpa("score", "--compare", a, bos, corpus, "--method", "rolling"), "compare: .* different BOS or EOS"
    )
    assert_one_line(lpa("score", "--compare", a, tmp_path / "none", corpus), "none: no such model folder")
    asked = ("score", "--compare", a, a, corpus, "--tokens", tmp_path / "t")
    assert_one_line(lpa(*asked), "--tokens: cannot be combined with --compare")
