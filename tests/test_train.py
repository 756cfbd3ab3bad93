"""The training loop on a tiny model: it learns, it resumes exactly, and what it writes loads."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpa_model.checkpoint import load_model, load_tokenizer
from lpa_model.config import LPAConfig
from lpa_model.init import initialize
from lpa_model.model import LPAForCausalLM
from lpa_model.train.config import TrainConfig
from lpa_model.train.data import batch
from lpa_model.train.loop import Progress, train
from lpa_model.train.loss import accumulate, bits_per_byte, make_loss
from lpa_model.train.metrics import read_metrics
from lpa_model.train.tokenizer import encode
from lpa_model.train.tokens import Tokens
from tests.tiny import CORPUS, byte_tokenizer, random_model, tiny_config

CPU = torch.device("cpu")
STEPS = 12
CONFIG = TrainConfig(
    steps=STEPS,
    batch_tokens=64,
    sequence_length=32,
    short_sequence_length=16,
    short_steps=4,
    learning_rate=1e-2,
    warmup_steps=2,
)
MUON = dataclasses.replace(CONFIG, muon_learning_rate=1e-2)


def corpus() -> Tokens:
    """The sentences of `tests.tiny` as a validation text."""
    ids = encode(byte_tokenizer(), CORPUS)
    return Tokens(ids, num_bytes=len(CORPUS.encode()), documents=1, end_of_text=0)


def run(
    out: Path, config: TrainConfig, *, stop: int | None = None, model: LPAConfig | None = None, **options: Any
) -> list[Progress]:
    """Train on the few sentences of `tests.tiny`; `stop` leaves the loop after so many steps, as if interrupted."""
    out.mkdir(exist_ok=True)
    tokenizer = byte_tokenizer()
    tokens = encode(tokenizer, CORPUS)
    options = {"validate_every": 5, "checkpoint_every": 4} | options
    steps = train(model or tiny_config(), config, tokenizer, tokens, corpus(), out, **options)
    return list(itertools.islice(steps, stop))


def weights(out: Path) -> dict[str, torch.Tensor]:
    saved: dict[str, torch.Tensor] = torch.load(out / "state.pt", weights_only=True)["model"]
    return saved


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, config: TrainConfig) -> None:
    whole = run(tmp_path / "whole", config)
    assert [progress.step for progress in whole] == list(range(1, STEPS + 1))
    assert whole[-1].loss < 0.8 * whole[0].loss
    assert whole[0].loss == pytest.approx(math.log(300), rel=0.2)

    first = run(tmp_path / "cut", config, stop=7)  # the state is that of step 4
    second = run(tmp_path / "cut", config)
    assert [progress.step for progress in second] == list(range(5, STEPS + 1))
    losses = [progress.loss for progress in whole]
    assert [progress.loss for progress in first] == losses[:7]
    assert [progress.loss for progress in second] == losses[4:]
    ours, expected = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    assert run(tmp_path / "cut", config) == []  # nothing is left to do


def test_setting_1_trains_too(tmp_path: Path) -> None:
    progress = run(tmp_path, CONFIG, model=tiny_config("setting1"))
    assert progress[-1].loss < 0.9 * progress[0].loss


def test_the_written_folder_loads_and_scores_as_reported(tmp_path: Path) -> None:
    progress = run(tmp_path, CONFIG)
    assert [p.step for p in progress if p.validation is not None] == [5, 10, STEPS]
    model = load_model(tmp_path / "model", torch.float32, CPU)
    assert load_tokenizer(tmp_path / "model").get_vocab() == byte_tokenizer().get_vocab()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights(tmp_path)[name].to(torch.bfloat16).float()), name
    tokens = encode(byte_tokenizer(), CORPUS)
    measured = bits_per_byte(model, tokens, len(CORPUS.encode()), 32)
    assert measured == pytest.approx(progress[-1].validation, rel=0.01)  # bfloat16 against float32 weights
    assert json.loads((tmp_path / "train.json").read_text())["steps"] == STEPS


def test_reports_may_be_rare(tmp_path: Path) -> None:
    """They come with validations and states besides, and change nothing."""
    every = run(tmp_path / "every", CONFIG)
    rare = run(tmp_path / "rare", CONFIG, report_every=7, checkpoint_every=6)
    assert [progress.step for progress in rare] == [5, 6, 7, 10, 12]
    assert [progress.loss for progress in rare] == [every[progress.step - 1].loss for progress in rare]
    assert [progress.step for progress in rare if progress.validation is not None] == [5, 10, 12]


def test_bits_per_byte_is_the_sum_over_windows() -> None:
    model = random_model(tiny_config())
    ids = list(range(10, 33))  # windows of 8, 8 and 7
    total, scored = 0.0, 0
    for start in (0, 8, 16):
        window = ids[start : start + 8]
        for t in range(1, len(window)):
            probabilities = model.logits(model(torch.tensor([window[:t]]))[0, -1]).double().softmax(0)
            total -= math.log2(probabilities[window[t]])
            scored += 1
    expected = total / scored * len(ids) / 50
    assert bits_per_byte(model, np.array(ids, dtype=np.uint16), 50, 8) == pytest.approx(expected, rel=1e-5)


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.arange(500, dtype=np.uint16)
    inputs, targets = batch(tokens, 7, CONFIG, CPU)
    assert inputs.shape == targets.shape == (2, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(targets - inputs, torch.ones_like(inputs))
    assert torch.equal(batch(tokens, 7, CONFIG, CPU)[0], inputs)
    assert not torch.equal(batch(tokens, 8, CONFIG, CPU)[0], inputs)
    assert not torch.equal(batch(tokens, 7, dataclasses.replace(CONFIG, seed=1), CPU)[0], inputs)
    assert batch(tokens, 3, CONFIG, CPU)[0].shape == (4, 16)  # the first steps are short


def test_learning_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    config = TrainConfig(steps=110, warmup_steps=10, final_fraction=0.1)
    assert [config.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [config.rate(step) for step in (10, 60, 110)] == pytest.approx([1.0, 0.55, 0.1])


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_mixed_ranks_and_norms_of_keys_learn(tmp_path: Path, config: TrainConfig) -> None:
    mixed = tiny_config(ffn_rank={"gate": None, "up": [7, None], "down": 5}, qk_norm=True)
    before = LPAForCausalLM(mixed)
    initialize(before, config.seed)
    steps = run(tmp_path, config, model=mixed)
    assert steps[-1].loss < 0.8 * steps[0].loss
    assert steps[0].loss == pytest.approx(math.log(300), rel=0.2)
    for name, tensor in weights(tmp_path).items():
        assert not torch.equal(tensor, before.get_parameter(name)), name
    assert load_model(tmp_path / "model", torch.float32, CPU).config == mixed


def test_data_too_short_for_a_sequence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sequence_length"):
        run(tmp_path, dataclasses.replace(CONFIG, sequence_length=4096, batch_tokens=4096))
    with pytest.raises(ValueError, match="batch_tokens"):
        dataclasses.replace(CONFIG, batch_tokens=31)


def test_initial_weights_follow_from_the_seed() -> None:
    model = LPAForCausalLM(tiny_config())
    initialize(model, 0)
    again = LPAForCausalLM(tiny_config())
    initialize(again, 0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_parts_of_a_batch_make_the_step_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also parts of different sizes: 4 sequences in the short steps and 3 in the others, in 3 parts."""
    monkeypatch.setattr("lpa_model.train.loop.has_bfloat16", lambda place: False)  # in which sums are within 1e-5
    config = dataclasses.replace(CONFIG, batch_tokens=96, short_sequence_length=24, steps=6)
    whole = run(tmp_path / "whole", config)
    parts = run(tmp_path / "parts", dataclasses.replace(config, gradient_accumulation=3))
    assert [p.loss for p in parts] == pytest.approx([p.loss for p in whole], rel=1e-5)
    model = random_model(tiny_config()).requires_grad_(True)
    inputs, targets = batch(encode(byte_tokenizer(), CORPUS), 5, config, CPU)
    gradients = []
    for count in (1, 2):  # of 2 sequences and 1
        model.zero_grad()
        accumulate(make_loss(model, torch.float32), inputs, targets, count)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        assert ours is not None and expected is not None
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="gradient_accumulation: 4 is not between 1 and the 3 sequences"):
        dataclasses.replace(config, gradient_accumulation=4)


def test_metrics_have_a_line_for_every_report(tmp_path: Path) -> None:
    steps = run(tmp_path, CONFIG)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row.step, row.loss, row.bits_per_byte) for row in rows] == [(p.step, p.loss, p.validation) for p in steps]
    assert [row.tokens for row in rows] == [64 * step for step in range(1, STEPS + 1)]
    assert [row.learning_rate for row in rows[:2]] == pytest.approx([5e-3, 1e-2])
    assert all(row.grad_norm > 0 and row.tokens_per_second > 0 for row in rows)
    tokens = len(corpus().ids)
    for row in rows:
        if row.bits_per_byte is not None and row.validation_loss is not None:
            nats = row.bits_per_byte * len(CORPUS.encode()) * math.log(2) / tokens
            assert row.validation_loss == pytest.approx(nats)


def test_metrics_that_have_lost_lines_are_said(tmp_path: Path) -> None:
    run(tmp_path, CONFIG, stop=9)
    path = tmp_path / "metrics.csv"
    text = path.read_text()
    path.write_text(text[:100])
    with pytest.raises(ValueError, match=r"metrics\.csv: has lost lines since the state was written"):
        run(tmp_path, CONFIG)
    path.unlink()  # as the message says
    run(tmp_path, CONFIG)
    assert [row.step for row in read_metrics(path)] == [9, 10, 11, 12]
    path.write_text(path.read_text() + "13,x\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 6: not a line of metrics"):
        read_metrics(path)


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    steps = train(tiny_config(), CONFIG, tokenizer, encode(tokenizer, CORPUS), corpus(), tmp_path)
    next(steps)
    with pytest.raises(ValueError, match="another run is writing there"):
        run(tmp_path, CONFIG)
    assert len(list(steps)) == STEPS - 1


def test_a_run_that_diverges_keeps_the_last_good_state(tmp_path: Path) -> None:
    """Its rate is so large that weights overflow in the first step that has it."""
    run(tmp_path, dataclasses.replace(CONFIG, steps=8))
    wild = dataclasses.replace(CONFIG, steps=40, learning_rate=1e38, weight_decay=0.0)
    kept = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(ValueError, match=r"step \d+: .*diverged; the state of step 8 is kept"):
        run(tmp_path, wild)
    assert (tmp_path / "state.pt").read_bytes() == kept
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())
    load_model(tmp_path / "model", torch.float32, CPU)  # refuses numbers that are not finite
    assert all(math.isfinite(row.loss) for row in read_metrics(tmp_path / "metrics.csv"))
    (tmp_path / "state.pt").write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match=r"state.pt: truncated"):
        run(tmp_path, CONFIG)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path, CONFIG, stop=5)
    for config, model in ((MUON, None), (CONFIG, tiny_config(attention_rank=4))):
        with pytest.raises(ValueError, match=r"state.pt: is of a model of other sizes or of another optimizer"):
            run(tmp_path, config, model=model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: 0 is less than 1"),
        ({"learning_rate": math.nan}, "learning_rate: nan is not a positive number"),
        ({"clip": 0.0}, "clip: 0.0 is not a positive number"),
        ({"final_fraction": 1.5}, "final_fraction: 1.5 is not between 0 and 1"),
        ({"seed": -1}, "seed: -1 is less than 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
