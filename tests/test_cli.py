"""The `lpa` command: what each sub-command prints and writes, and one clear line for each mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from lpa_model.checkpoint import load_config, load_model
from lpa_model.config import Architecture
from lpa_model.train.config import TrainConfig
from server.cli import app
from server.llm import LLM, SamplingParams
from server.routes.pages import settings_tables
from server.serve import greeting
from server.settings import Settings, load_settings
from server.version import package_version
from tests.test_convert_official import POSITIONS, tensors_of, write
from tests.tiny import CORPUS, byte_tokenizer, random_model, tiny_config, write_checkpoint

ROOT = Path(__file__).parent.parent


def lpa(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, env={"COLUMNS": "200", "LPA_THREADS": "1"})


def succeed(*arguments: object, stdin: str | None = None) -> str:
    result = lpa(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_one_line(result: Result, pattern: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.fullmatch(rf"lpa: [^\n]*{pattern}[^\n]*\n", result.stderr), result.stderr


def test_help_is_there_for_every_command_and_loads_nothing_heavy() -> None:
    check = (
        "import sys; from typer.testing import CliRunner; from server.cli import app;"
        "print(CliRunner().invoke(app, ['--help']).stdout);"
        "assert not {'torch', 'fastapi', 'pydantic_settings', 'tokenizers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^  (\w+)  ", done.stdout, re.MULTILINE)
    assert set(commands) == {
        "serve",
        "generate",
        "score",
        "train",
        "tokenize",
        "init",
        "convert",
        "export",
        "quantize",
        "bench",
        "info",
        "chat",
    }
    for command in commands:
        assert "Usage: " in succeed(command, "--help")


def test_serve_has_a_flag_for_every_setting_and_shows_its_default() -> None:
    text = " ".join(succeed("serve", "--help").split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert field.description is not None
        assert field.description in text
    assert "--port INTEGER Port to listen on; 0 takes a free one. [default: 8000]" in text
    assert "--enable-prefix-caching / --no-enable-prefix-caching" in text
    assert "--dtype auto|float32|bfloat16" in text
    assert "--weights auto|float32|bfloat16|int8|int4" in text


def test_version_is_that_of_the_server() -> None:
    assert succeed("--version") == f"lpa {package_version()}\n"


def test_the_help_of_serve_has_the_groups_of_the_documents() -> None:
    """A heading, then its flags, as in the tables of operations.md."""
    found: dict[str, list[str]] = {}
    for line in succeed("serve", "--help").splitlines():
        if heading := re.fullmatch(r"(\S.*):", line):
            found[heading[1]] = []
        elif option := re.match(r"  --([\w-]+)", line):
            found[list(found)[-1]].append(option[1].replace("-", "_"))
    expected = {}
    for part in settings_tables().split("### ")[1:]:
        flags = re.findall(r"^\| `--(?:no-)?([\w-]+)`", part, re.MULTILINE)
        expected[part.splitlines()[0]] = [flag.replace("-", "_") for flag in flags]
    assert [name for names in expected.values() for name in names] == list(Settings.model_fields)
    assert {heading: found[heading] for heading in expected} == expected


def test_help_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    widest = []
    for columns in ("70", "180"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            app(["serve", "--help"])  # CliRunner has a width of its own
        widest.append(max(map(len, capsys.readouterr().out.splitlines())))
    assert 60 < widest[0] <= 70
    assert 120 < widest[1] <= 180


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["ser"], ["serve"]),
        (["serve", "--kv"], ["--kv-cache-layout", "--kv-cache-dtype", "--kv-cache-memory"]),
        (["serve", "--kv-cache-layout", "m"], ["mixed"]),
        (["train", "lpa-tiny", "--mu"], ["--muon-learning-rate"]),
        (["bench", "score", "--api", "e"], ["echo"]),
    ],
)
def test_a_shell_completes_commands_options_and_values(typed: list[str], expected: list[str]) -> None:
    asked = {"_LPA_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["lpa", *typed]), "COMP_CWORD": str(len(typed))}
    result = CliRunner().invoke(app, [], prog_name="lpa", env=asked)
    assert result.stdout.split() == expected


def test_the_start_message_names_the_page_first() -> None:
    settings = load_settings(port=8123)
    assert re.findall(r"http://\S+", greeting(settings, 8123))[0] == "http://127.0.0.1:8123/"


def test_serve_takes_flags_before_variables_and_ends_with_status_0(
    tiny_checkpoints: dict[Architecture, Path], tmp_path: Path
) -> None:
    """And loads neither traces' library, which it does not send, nor a compiler."""
    environment = {"LPA_PORT": "1", "LPA_SERVED_MODEL_NAME": "named-by-variable", "LPA_DTYPE": "float32"}
    environment |= {"LPA_THREADS": "1", "PYTHONPROFILEIMPORTTIME": "1"}
    arguments = ["serve", str(tiny_checkpoints["setting1"]), "--port", "0", "--kv-cache-memory", str(1 << 20)]
    command, log = [sys.executable, "-u", "-m", "server.cli", *arguments], tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as server,
    ):
        try:
            assert server.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
            assert found
            with urllib.request.urlopen(f"{found[0]}/v1/models") as answer:
                assert json.load(answer)["data"][0]["id"] == "named-by-variable"
            server.send_signal(signal.SIGTERM)
            assert server.wait(600) == 0, log.read_text()
        finally:
            server.kill()
    imported = re.findall(r"^import time:.*\| +([\w.]+)$", log.read_text(), re.MULTILINE)
    assert "uvicorn.server" in imported
    assert not [name for name in imported if re.match(r"(opentelemetry\.sdk|ziglang|numba|llvmlite)\b", name)]


def test_serve_takes_a_flag_of_a_list_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Settings] = []
    monkeypatch.setattr("server.serve.serve", lambda settings, hashing: taken.append(settings) or 0)
    succeed("serve", "--served-model-name", "a", "--served-model-name", "b,c", "--api-key", "k")
    succeed("serve")
    assert [settings.model_names for settings in taken] == [("a", "b", "c"), ("lpa-tiny",)]
    assert [len(settings.client_keys) for settings in taken] == [1, 0]


def test_mistakes_with_serve_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_one_line(lpa("serve", "--port", "65536"), r"--port \(LPA_PORT\): .*65535, not '65536'")
    assert_one_line(lpa("serve", tmp_path, "--model", tmp_path), "--model: the model folder is given twice")
    monkeypatch.setenv("LPA_MAX_QUEUE", "many")
    assert_one_line(lpa("serve"), r"--max-queue \(LPA_MAX_QUEUE\): .*'many'")
    refused = lpa("serve", "--api-key", "secret", "--api-key", "", "--api-key-file", tmp_path / "nowhere")
    assert_one_line(refused, r"--api-key-file \(LPA_API_KEY_FILE\): cannot be read")
    assert "secret" not in refused.stderr
    monkeypatch.delenv("LPA_MAX_QUEUE")
    assert lpa("serve", "--no-such-flag").exit_code == 2

    truncated = write_checkpoint(tmp_path / "model", tiny_config())
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_one_line(lpa("serve", truncated, "--port", "0"), r"model\.safetensors: truncated")


def test_generate_streams_the_most_probable_text(tiny_checkpoint: Path, architecture: Architecture) -> None:
    model, tokenizer = random_model(tiny_config(architecture)), byte_tokenizer()
    ids = tokenizer.encode("The robot").ids
    prompt = len(ids)
    for _ in range(20):
        ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    expected = tokenizer.decode(ids[prompt:])
    asked = ("--model", tiny_checkpoint, "--max-tokens", 20, "--temperature", 0, "--dtype", "float32")
    assert succeed("generate", "The robot", *asked) == expected + "\n"
    assert succeed("generate", "-", *asked, stdin="The robot") == expected + "\n"
    assert succeed("generate", "The robot", *asked, "--stop", expected[3:6]) == expected.split(expected[3:6])[0] + "\n"


def test_generate_follows_its_seed(tiny_checkpoints: dict[Architecture, Path]) -> None:
    asked = ("generate", "The sea", "--model", tiny_checkpoints["setting2"], "--max-tokens", 30, "--temperature", 1)
    first = succeed(*asked, "--seed", 5)
    assert first == succeed(*asked, "--seed", 5)
    assert first != succeed(*asked, "--seed", 6)


def test_mistakes_with_generate_are_one_line(tiny_checkpoints: dict[Architecture, Path], tmp_path: Path) -> None:
    model = ("--model", tiny_checkpoints["setting2"])
    assert_one_line(lpa("generate", "a", "--model", tmp_path / "none"), "none: no such model folder")
    assert_one_line(lpa("generate", "", *model), "prompt: is empty")
    assert_one_line(
        lpa("generate", "a", *model, "--max-tokens", 128), "prompt: 1 tokens and max_tokens 128 make 129. .* 128 tokens"
    )


def test_chat_renders_the_conversation_by_the_template(tiny_checkpoints: dict[Architecture, Path]) -> None:
    folder = tiny_checkpoints["setting2"]
    template = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"
    params = SamplingParams(max_tokens=8, temperature=0)
    with LLM(folder, dtype="float32") as llm:
        (first,) = llm.generate("<s>Be kind.<u>Hello<a>", params)
        (second,) = llm.generate(f"<s>Be kind.<u>Hello<a>{first.text}<u>Why?<a>", params)
    asked = ("chat", "--model", folder, "--dtype", "float32", "--max-tokens", 8, "--temperature", 0)
    talk = lpa(*asked, "--system", "Be kind.", "--chat-template", template, stdin="Hello\n\nWhy?\n")
    assert (talk.exit_code, talk.stdout, talk.stderr) == (0, f"{first.text}\n{second.text}\n", "")


def test_chat_says_what_it_leaves_out(tiny_checkpoints: dict[Architecture, Path]) -> None:
    """The context of 128 tokens has space for one exchange of 40 bytes, and none for a message of 200."""
    asked = ("chat", "--model", tiny_checkpoints["setting2"], "--max-tokens", 30)
    talk = lpa(*asked, stdin=f"{'a' * 200}\n{'b' * 40}\n{'c' * 40}\n")
    assert talk.exit_code == 0
    assert re.search(
        "has no chat template: .*\nthe message is too long: .*\nthe context of 128 tokens is full", talk.stderr
    )


def training_run(tmp_path: Path) -> list[object]:
    """Arguments of a training run of a tiny model, all but --steps."""
    config, data, valid = (tmp_path / name for name in ("shape.json", "data.txt", "valid.txt"))
    config.write_text(json.dumps(tiny_config(eos_token_id=None).to_dict()))
    data.write_text(CORPUS * 3)
    valid.write_text(CORPUS[:200])
    files = ["--data", data, "--valid", valid, "--out", tmp_path / "run"]
    return ["train", config, *files, "--batch-tokens", 64, "--sequence-length", 16, "--checkpoint-every", 2]


@pytest.fixture
def run(tmp_path: Path) -> list[object]:
    return training_run(tmp_path)


def test_train_writes_a_model_that_can_be_scored_and_knows_when_it_is_done(run: list[object], tmp_path: Path) -> None:
    out = tmp_path / "run"
    printed = succeed(*run, "--steps", 4, "--learning-rate", 0.01, "--validate-every", 2)
    found = re.search(r"validation: ([\d.]+) bits per byte, perplexity ([\d.]+); .*/run/model", printed)
    assert found
    assert re.search(r"step 2: loss [\d.]+ .* tokens/s  validation [\d.]+ bits/byte", printed)
    config = load_config(out / "model")
    assert config.eos_token_id == 0
    load_model(out / "model", torch.bfloat16, torch.device("cpu"))
    asked = ("score", tmp_path / "valid.txt", "--model", out / "model", "--dtype", "float32", "--json")
    scored = json.loads(succeed(*asked, "--max-length", 16, "--stride", 15))["aggregate"]
    assert scored["perplexity"] == pytest.approx(float(found[2]), rel=0.05)  # weights were rounded to bfloat16
    assert json.loads((out / "train.json").read_text())["learning_rate"] == 0.01
    assert "has all of its 4 steps already" in succeed(*run, "--steps", 4, "--learning-rate", 0.01)


def test_the_help_of_train_says_what_every_option_is() -> None:
    options = re.findall(
        r"^  --([\w-]+)(?: / --\S+)?(?: \S+)?((?:.*\n {8,})*.*)", succeed("train", "--help"), re.MULTILINE
    )
    assert {name.replace("-", "_") for name, _ in options} >= {field.name for field in dataclasses.fields(TrainConfig)}
    for name, text in options:
        assert re.search(r"\w{2,}.*\.|Show this", " ".join(text.split())), name
    assert "[default: 1000]" in " ".join(dict(options)["steps"].split())


def test_what_train_advises_for_a_small_text_works(run: list[object], tmp_path: Path) -> None:
    """First the tokenizer is too large for the text, then the sequence too long."""
    (tmp_path / "data.txt").write_text("The sun is bright. The moon is not.\n")
    large = json.loads((tmp_path / "shape.json").read_text()) | {"vocab_size": 5000}
    (tmp_path / "shape.json").write_text(json.dumps(large))
    asked = [*run, "--steps", 1, "--sequence-length", 64]
    refused = lpa(*asked)
    assert_one_line(refused, r"data: the text gives a tokenizer of \d+ entries.*: give --vocab-size \d+, or more text")
    advised = re.findall(r"--vocab-size \d+", refused.stderr)[0].split()
    assert lpa(*asked).stderr == refused.stderr
    refused = lpa(*asked, *advised)
    assert_one_line(refused, "sequence_length: 64 is too long .*: give more text, or a sequence_length below")
    below = int(re.findall(r"below (\d+)", refused.stderr)[0])
    assert "validation: " in succeed(*asked, *advised, "--sequence-length", below - 1)
    assert_one_line(lpa(*asked), rf"out: the earlier start in .*: give {' '.join(advised)}, or another --out")
    (tmp_path / "valid.txt").write_text("")
    assert_one_line(lpa(*asked, *advised, "--sequence-length", 4, "--steps", 2), "valid.txt: has no text")


def test_mistakes_with_train_are_one_line(run: list[object], tmp_path: Path) -> None:
    assert_one_line(lpa(*run, "--steps", 1, "--sequence-length", 65), "sequence_length: 65 .* batch_tokens, 64")
    assert_one_line(lpa("train", "lpa-huge", *run[2:], "--steps", 1), r"lpa-huge: neither .* preset \(lpa-tiny, ")
    assert_one_line(lpa(*run, "--steps", 1, "--device", "cuda:99"), "device: cuda:99 is not there: torch ")
    assert_one_line(lpa("train", "lpa-130m", *run[2:], "--steps", 1), "data: .* vocab_size is 32000")
    more = ("--steps", 1, "--batch-tokens", 256, "--sequence-length", 129)
    assert_one_line(lpa(*run, *more), "sequence_length: 129 is more than the model's context of 128")
    (tmp_path / "data.txt").unlink()
    fresh = [*run, "--steps", 1, "--out", tmp_path / "other"]
    assert_one_line(lpa(*fresh), "data.txt: No such file or directory")
    missing = lpa("train", "lpa-tiny", "--data", "a", "--valid", "b")
    assert missing.exit_code == 2
    assert "--out" in missing.stderr


def test_init_takes_presets_and_configs(tmp_path: Path) -> None:
    config = tmp_path / "shape.json"
    config.write_text(json.dumps(tiny_config("setting1").to_dict()))
    count = tiny_config("setting1").parameter_count()
    printed = succeed("init", config, tmp_path / "model", "--seed", 3, "--dtype", "bfloat16")
    assert f"{count:,} random parameters in bfloat16" in printed
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == count
    succeed("generate", "Hello", "--model", tmp_path / "model", "--max-tokens", 4, "--dtype", "float32")
    succeed("init", "lpa-tiny", tmp_path / "tiny")
    assert load_config(tmp_path / "tiny").num_hidden_layers == 6


def test_ranks_of_a_preset_can_be_changed(run: list[object], tmp_path: Path) -> None:
    succeed("init", "lpa-tiny", tmp_path / "low-all", "--ffn-rank", 32)
    succeed("init", "vanilla-tiny", tmp_path / "low-ffn", "--ffn-rank", 32)
    succeed("init", "lpa-tiny", tmp_path / "vanilla", "--attention-rank", "dense")
    found = [load_config(tmp_path / name) for name in ("low-all", "low-ffn", "vanilla")]
    assert [(config.attention_rank, config.ffn_rank) for config in found] == [(64, 32), (None, 32), (None, None)]
    assert load_model(tmp_path / "low-ffn", torch.float32, torch.device("cpu")).config == found[1]
    succeed(*run, "--steps", 1, "--attention-rank", 7, "--ffn-rank", 9)
    trained = load_config(tmp_path / "run" / "model")
    assert (trained.attention_rank, trained.ffn_rank) == (7, 9)
    tensors = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert tensors["layers.1.ffn.gate_proj.down.weight"].shape == (9, 32)
    for key, value, message in (
        ("--ffn-rank", "small", "ffn_rank: 'small' is neither a number nor dense"),
        ("--attention-rank", 0, r"attention_rank \(q, layer 0\): 0"),
        ("--ffn-rank", 705, r"ffn_rank \(gate, layer 0\): 705 is more than 704"),
    ):
        assert_one_line(lpa("init", "lpa-tiny", tmp_path / "m", key, value), message)
    assert_one_line(lpa(*run, "--steps", 1, "--ffn-rank", "small"), "ffn_rank: 'small' is neither")


def test_info_lists_the_ranks_of_a_mixed_model(tmp_path: Path) -> None:
    config = tiny_config(ffn_rank={"gate": None, "up": [7, None], "down": 5}, qk_norm=True)
    (tmp_path / "shape.json").write_text(json.dumps(config.to_dict()))
    text = succeed("info", tmp_path / "shape.json")
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines()]
    start = rows.index(["ffn_rank", "gate: dense"])
    assert rows[start + 1 : start + 3] == [["", "up: 7, dense"], ["", "down: 5"]]
    assert ["qk_norm", "True"] in rows
    assert ["gate", "░░", "dense", "of 32"] in rows  # a block for each layer
    assert ["up", "▂░", "7, some dense", "of 32"] in rows
    assert ["down", "▂▂", "5", "of 32"] in rows
    assert f"{config.vanilla().parameter_count():,} (" in text


def test_mistakes_with_init_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    assert_one_line(lpa("init", "lpa-tiny", tmp_path / "full"), "full: exists and is not an empty folder")
    assert_one_line(lpa("init", "lpa-9b", tmp_path / "m"), "lpa-9b: neither")
    (tmp_path / "small.json").write_text(json.dumps(tiny_config(vocab_size=200).to_dict()))
    assert_one_line(lpa("init", tmp_path / "small.json", tmp_path / "m"), "vocab_size: 200 is less than 257")
    (tmp_path / "broken.json").write_text("{")
    assert_one_line(lpa("init", tmp_path / "broken.json", tmp_path / "m"), "broken.json: not JSON")
    assert not (tmp_path / "m").exists()


def test_convert_official_passes_its_options_on(tmp_path: Path) -> None:
    source = write(tmp_path / "official", tensors_of("setting2"))
    asked = ("convert", "official", source, tmp_path / "model")
    assert_one_line(lpa(*asked), "--max-position-embeddings")
    printed = succeed(*asked, "--max-position-embeddings", POSITIONS, "--dtype", "bfloat16")
    config = load_config(tmp_path / "model")
    assert config.max_position_embeddings == POSITIONS
    assert f"model: setting2, {config.parameter_count():,} parameters in bfloat16" in printed
    assert {t.dtype for t in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    one = write(tmp_path / "one", tensors_of("setting1"))
    assert_one_line(lpa("convert", "official", one, tmp_path / "other"), "--num-heads")


def test_info_shows_a_preset_beside_its_dense_twin() -> None:
    text = succeed("info", "lpa-370m")
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines()]
    # 24 layers of 2r = 640, d + r = 1344 and 2d = 2048 numbers, in int8 with 2, 9 and 16 scales of 2 bytes
    assert ["latent (default)", "15,360", "15,456", "30,720", "61,440", "3.20x"] in rows
    assert ["mixed", "32,256", "32,688", "64,512", "129,024", "1.52x"] in rows
    assert ["full", "49,152", "49,920", "98,304", "196,608", "1.00x"] in rows
    assert ["dense twin", "49,152", "49,920", "98,304", "196,608", "1.00x"] in rows
    assert ["attention_rank", "320"] in rows
    assert ["ffn_rank", "dense"] in rows
    assert not any("format_version" in row for row in rows)


def test_info_reads_folders_and_says_how_they_are_stored(tiny_checkpoint: Path, architecture: Architecture) -> None:
    text = succeed("info", tiny_checkpoint)
    assert re.search(r"stored as +│ float32", text)
    assert f"{tiny_config(architecture).parameter_count():,}" in text
    assert f"{tiny_config(architecture, attention_rank=None).parameter_count():,} (" in text
    assert re.search(r"architecture +│ lpa-tiny|hidden_size +│ 256", succeed("info"))  # the embedded model
    assert_one_line(lpa("info", tiny_checkpoint / "config"), "config: neither a model folder")


def test_weights_that_are_not_finite_are_refused_by_every_command(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tiny_config())
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"][3] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    for command in (
        ["serve", folder, "--port", "0"],
        ["score", "--model", folder, "-"],
        ["generate", "the sea", "--model", folder],
        ["export", "hf-llama", folder, tmp_path / "out"],
    ):
        result = lpa(*command, stdin="the sea")
        assert result.exit_code == 2, result.output
        assert "norm.weight has 1 of 32 numbers that are NaN or infinite" in result.output
