"""`lpa bench models`: what it says of quality, against sums by plain torch; nothing is timed against a limit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lpa_model.checkpoint import load_model, load_tokenizer
from server.bench.models import Pair, read_pairs
from server.cli import app
from tests.tiny import CORPUS, tiny_config, write_checkpoint

PAIRS = "phenomenon\tgood\tbad\nword\tThe robot liked the sea.\tThe robot liked the see.\norder\tA gull.\tGull a.\n"


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "models", *map(str, arguments)], env={"COLUMNS": "200"})


def logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """Of every token but the first, by the plain model in float64's sums."""
    model = load_model(folder, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        found = model.logits(model(torch.tensor([ids]))[0, :-1]).log_softmax(-1)
    return found.gather(1, torch.tensor(ids)[1:, None])[:, 0].double()


def test_quality_is_that_of_the_plain_models(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", tiny_config())
    other = write_checkpoint(tmp_path / "other", tiny_config(num_hidden_layers=3))
    (tmp_path / "text.txt").write_text(CORPUS, encoding="utf-8")
    (tmp_path / "pairs.tsv").write_text(PAIRS, encoding="utf-8")
    asked = (one, other, "--text", tmp_path / "text.txt", "--pairs", tmp_path / "pairs.tsv", "--tokens", 50)
    small = ("--max-length", 20, "--streams", 2, "--context", 8, "--steps", 2, "--rounds", 1, "--dtype", "float32")
    result = bench(*asked, *small, "--weights", "float32", "--plot", tmp_path / "plot.svg", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    tokenizer = load_tokenizer(one)
    ids = tokenizer.encode(CORPUS, add_special_tokens=False).ids[:50]
    sums = [torch.cat([logprobs(folder, part) for part in (ids[:20], ids[20:40], ids[40:])]) for folder in (one, other)]
    for row, found in zip(rows, sums, strict=True):
        text = row["texts"][str(tmp_path / "text.txt")]
        assert text["tokens"] == 47
        assert text["perplexity"] == pytest.approx(math.exp(-found.mean()), rel=1e-4)
    lost = sums[0] - sums[1]
    text = rows[1]["texts"][str(tmp_path / "text.txt")]
    assert text["ratio"] == pytest.approx(lost.mean().exp().item(), rel=1e-4)
    assert text["ratio_stderr"] == pytest.approx((lost.mean().exp() * lost.std() / 47**0.5).item(), rel=1e-3)
    assert rows[0]["texts"][str(tmp_path / "text.txt")]["ratio"] == 1
    assert rows[1]["accuracy"] in (0, 0.5, 1)
    assert rows[1]["parameters"] > rows[0]["parameters"] and rows[0]["cache_bytes"] < rows[1]["cache_bytes"]
    assert set(rows[1]["speeds"]) == {"decode 2", "prefill"} and rows[0]["speeds"]["prefill"]["ratio"] == 1
    picture = (tmp_path / "plot.svg").read_text()
    assert "one" in picture and "other" in picture and "decoding speed at 2 streams, one = 1" in picture
    table = bench(*asked, *small).stdout
    assert "text.txt (47 tokens)" in table and "decoding, 2 streams" in table


def test_the_better_sentence_is_the_more_probable_one(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tiny_config())
    text = tmp_path / "pairs.tsv"
    text.write_text(PAIRS, encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    good = [
        sum(logprobs(folder, [0, *tokenizer.encode(sentence, add_special_tokens=False).ids])).item()
        for pair in read_pairs(text)
        for sentence in (pair.good, pair.bad)
    ]
    small = ("--streams", 1, "--context", 4, "--steps", 1, "--rounds", 1, "--dtype", "float32")
    result = bench(folder, "--pairs", text, *small, "--weights", "float32", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["accuracy"] == ((good[0] > good[1]) + (good[2] > good[3])) / 2


def test_pairs_are_read_as_they_are_written(tmp_path: Path) -> None:
    shipped = read_pairs(Path(__file__).with_name("minimal_pairs.tsv"))
    assert len(shipped) == len(set(shipped)) == 280
    assert all(pair.good != pair.bad for pair in shipped)
    for content, message in (
        ("phenomenon\tgood\nx\ty\n", "has no column 'bad'"),
        ("phenomenon\tgood\tbad\n", "one line at least"),
        ("phenomenon\tgood\tbad\nx\ty\n", "a good and a bad sentence in every line"),
    ):
        path = tmp_path / "p.tsv"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_pairs(path)
    path.write_text('phenomenon\tgood\tbad\nquotes\t"Yes," he said.\t"Yes," him said.\n', encoding="utf-8")
    assert read_pairs(path) == [Pair("quotes", '"Yes," he said.', '"Yes," him said.')]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tiny_config())
    for arguments, message in (
        ([folder, "--context", 120], f"context: 144 tokens with the steps exceed the 128 positions of {folder}"),
        ([folder, "--text", tmp_path / "none"], f"{tmp_path / 'none'}"),
        ([folder, "--plot", tmp_path / "x.pdf"], "plot: 'x.pdf' ends neither in .png nor in .svg"),
    ):
        result = bench(*arguments)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.stderr
        assert message in result.stderr
