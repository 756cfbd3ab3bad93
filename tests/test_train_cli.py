"""`lpa train --config`, `lpa tokenize`, the figure of a run, and what mistakes with them say."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lpa_model.checkpoint import load_config
from lpa_model.train.config import TrainConfig
from lpa_model.train.metrics import Row
from server.bench.plot import plot_training
from server.cli.train import _kind, _options, _parameters
from tests.test_cli import assert_one_line, lpa, succeed
from tests.tiny import CORPUS, tiny_config

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with texts, a shape and the options of a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shape.json").write_text(json.dumps(tiny_config(eos_token_id=None).to_dict()))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"story": CORPUS}) + "\n" for _ in range(4)))
    (tmp_path / "valid.txt").write_text(CORPUS)
    (tmp_path / "run.toml").write_text(
        'preset = "shape.json"\ndata = "data.jsonl"\nvalid = "valid.txt"\nout = "run"\nfield = "story"\n'
        "vocab_size = 290\nsteps = 3\nbatch_tokens = 64\nsequence_length = 16\nlearning_rate = 1\n"
        "warmup_steps = 0\nffn_rank = 5\n"
    )
    return tmp_path


def test_options_come_from_the_command_line_then_the_file_then_the_defaults(folder: Path) -> None:
    result = lpa("train", "--config", "run.toml", "--steps", 2, "--learning-rate", 0.01, "--plot", "loss.svg")
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert lines[0].startswith("command line: ") and lines[1].startswith("run.toml: ")
    assert set(lines[0].removeprefix("command line: ").split(", ")) == {
        "steps 2",
        "learning_rate 0.01",
        "plot loss.svg",
    }
    assert "warmup_steps 0" in lines[1] and "steps 3" not in lines[1] and "learning_rate" not in lines[1]
    assert "seed 0" in lines[2] and "batch_tokens" not in lines[2]
    written = json.loads((folder / "run" / "train.json").read_text())
    assert (written["steps"], written["learning_rate"], written["batch_tokens"]) == (2, 0.01, 64)
    config = load_config(folder / "run" / "model")
    assert (config.vocab_size, config.ffn_rank) == (290, 5)
    assert len(ET.parse(folder / "loss.svg").findall(f".//{SVG}text")) > 5
    again = lpa("train", "--config", "run.toml", "--learning-rate", 0.01)
    assert "the earlier start in run had steps 2" in again.stderr.splitlines()
    assert "step 3: " in again.stdout


def test_every_option_is_a_key(folder: Path) -> None:
    values = {int: 64, float: 0.5, bool: True, str: "x", Path: "p"}
    names = {parameter.name for parameter, _ in _parameters()} - {"config"}
    assert names > {"preset", "data", "plot", "device", *TrainConfig.__dataclass_fields__}
    lines, expected = [], {}
    for parameter, _ in _parameters():
        if parameter.name != "config":
            kind = _kind(parameter.annotation)
            lines.append(f"{parameter.name} = {json.dumps(values[kind])}\n")
            expected[parameter.name] = kind(values[kind])
    (folder / "all.toml").write_text("".join(lines))
    assert _options({"config": folder / "all.toml"})[0] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning-rate = 1", "run.toml: unknown key learning-rate; did you mean learning_rate?"),
        ("sequence_lenght = 1", "run.toml: unknown key sequence_lenght; did you mean sequence_length?"),
        ("[model]", "run.toml: unknown key model; there are preset, data"),
        ("seed = 1.5", "run.toml: seed: 1.5 is not a whole number"),
        ("seed = true", "run.toml: seed: True is not a whole number"),
        ('clip = "1"', "run.toml: clip: '1' is not a number"),
        ("compile_loss = 1", "run.toml: compile_loss: 1 is not true or false"),
        ("plot = 1", "run.toml: plot: 1 is not a path"),
        ("clip =", "run.toml: not TOML: .*line 13"),
        ("steps = 4", "run.toml: not TOML: .*line 13"),
        ("clip = nan", "clip: nan is not a positive number"),
        ("report_every = 0", "report_every: 0 is less than 1"),
    ],
)
def test_mistakes_in_the_file_are_named(folder: Path, line: str, message: str) -> None:
    with (folder / "run.toml").open("a") as file:
        file.write(line + "\n")
    result = lpa("train", "--config", "run.toml")
    assert result.exit_code == 2
    assert re.search(f"^lpa: {message}", result.stderr, re.MULTILINE), result.stderr


def test_what_is_required_may_stand_in_either(folder: Path) -> None:
    (folder / "empty.toml").write_text("steps = 1\n")
    assert_one_line(lpa("train", "--config", "empty.toml"), "preset: give PRESET or CONFIG.json, or preset in the file")
    assert_one_line(lpa("train", "shape.json", "--config", "empty.toml"), "data: give --data, or data in the file")
    assert_one_line(lpa("train", "--config", "none.toml"), "none.toml: No such file")


def test_bad_lines_of_the_data_are_named_and_nothing_is_left(folder: Path) -> None:
    with (folder / "data.jsonl").open("a") as file:
        file.write('{"text": "a"}\n')
    assert_one_line(lpa("train", "--config", "run.toml"), r"data\.jsonl, line 5: has no field 'story', but 'text'")
    assert not (folder / "run" / "tokens.safetensors").exists()
    assert_one_line(lpa("tokenize", "data.jsonl", "tokens", "--field", "story", "--vocab-size", 300), "line 5: has no")
    assert sorted(path.name for path in folder.iterdir()) == [
        "data.jsonl",
        "run",
        "run.toml",
        "shape.json",
        "valid.txt",
    ]


def test_a_run_on_folders_of_tokens(folder: Path) -> None:
    said = succeed("tokenize", "data.jsonl", "valid.txt", "tokens", "--field", "story", "--vocab-size", 290)
    assert "tokens (uint16) in documents: 5; " in said and "a tokenizer of 290 entries" in said
    assert sorted(path.name for path in (folder / "tokens").iterdir()) == ["tokenizer.json", "tokens.safetensors"]
    succeed("tokenize", "valid.txt", "valid", "--tokenizer", "tokens")
    run = ("train", "shape.json", "--data", "tokens", "--valid", "valid", "--out", "run", "--steps", 1)
    sizes = ("--batch-tokens", 64, "--sequence-length", 16)
    assert_one_line(lpa(*run, *sizes), "data: tokens has a tokenizer of 290 entries, .* is 300: give --vocab-size 290")
    assert "validation: " in succeed(*run, *sizes, "--vocab-size", 290)
    assert load_config(folder / "run" / "model").eos_token_id == 0
    assert_one_line(lpa("tokenize", "valid.txt", "valid", "--tokenizer", "tokens"), "valid: exists and is not an empty")
    assert_one_line(lpa("tokenize", "valid.txt", "other"), "vocab_size or tokenizer: one of them")
    assert_one_line(lpa("tokenize", "none.txt", "other", "--vocab-size", 300), "none.txt: No such file")
    assert_one_line(
        lpa("tokenize", "valid.txt", "other", "--tokenizer", "tokens", "--end-of-text", "</s>"), "has no token '</s>'"
    )
    assert not (folder / "other").exists()


def test_the_figure_has_both_losses_on_one_axis(tmp_path: Path) -> None:
    rows = [
        Row(step, 64 * step, 6 - step / 50, 0.1, 1.0, 5.5 if step % 20 == 0 else None, 1.0, 9.0)
        for step in range(1, 101)
    ]
    plot_training(rows, "tiny in run", tmp_path / "a.svg")
    texts = ["".join(element.itertext()).strip() for element in ET.parse(tmp_path / "a.svg").iter(f"{SVG}text")]
    for expected in (
        "tiny in run: 100 steps, 6,400 tokens",
        "step",
        "loss, nats per token",
        "training, one step",
        "training, mean of the last 5 reports",
        "validation",
        "5.500",
    ):
        assert expected in texts
    plot_training(rows[:1], "tiny in run", tmp_path / "a.png")
    with pytest.raises(ValueError, match="plot: the run has no line"):
        plot_training([], "tiny in run", tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()
