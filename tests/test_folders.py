"""Model folders as people bring them: other tools' keys and encodings, tokenizers with more tokens than the model."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from typer.testing import CliRunner

from lpa_model.checkpoint import load_config, load_model, load_tokenizer, save_checkpoint
from lpa_model.folder import CheckpointError
from server.cli import app
from server.engine import tokenizer as engine_tokenizer
from server.errors import InvalidRequest
from tests.serving import Served, serving
from tests.tiny import VOCAB_SIZE, byte_tokenizer, random_model, tiny_config, write_checkpoint

ADDED = "<|im_start|>"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "config.json") -> None:
    path = folder / name
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", tiny_config())


def larger_tokenizer() -> Tokenizer:
    """The byte tokenizer with one special token more than the model has ids for."""
    tokenizer = Tokenizer.from_str(byte_tokenizer().to_str())
    tokenizer.add_special_tokens([AddedToken(ADDED, special=True)])
    assert tokenizer.token_to_id(ADDED) == VOCAB_SIZE
    return tokenizer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("larger") / "model"
    save_checkpoint(folder, random_model(tiny_config()), larger_tokenizer(), torch.float32)
    with serving(folder) as served:
        yield served


def test_a_model_smaller_than_its_tokenizer_is_served(served: Served) -> None:
    assert served.complete(prompt="Once", max_tokens=4, logprobs=2)["usage"]["completion_tokens"] == 4
    assert served.post("/tokenize", prompt=f"a{ADDED}").json()["tokens"][-1] == VOCAB_SIZE
    grammar = {"structured_outputs": {"choice": [ADDED, "no"]}}
    text = served.complete(prompt="Once", max_tokens=20, **grammar)["choices"][0]["text"]
    assert text in (ADDED, "no")  # the characters can be written, though the token cannot


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/completions", {"prompt": f"a{ADDED}b"}, "prompt"),
        ("/v1/completions", {"prompt": ["a", f"{ADDED}b"]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [5, VOCAB_SIZE]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "bad_words": [ADDED]}, "bad_words"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ADDED}]}, "messages"),
        ("/v1/perplexity", {"input": f"hello {ADDED} world"}, "input"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
    ],
)
def test_a_token_that_the_model_lacks_is_refused_where_it_is_used(
    served: Served, path: str, body: dict[str, Any], where: str
) -> None:
    response = served.post(path, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == where
    assert str(VOCAB_SIZE) in error["message"]
    assert served.idle()


def test_loglikelihood_refuses_a_token_that_the_model_lacks(served: Served) -> None:
    response = served.post("/v1/loglikelihood", context="a", continuations=[f" {ADDED}"])
    assert ADDED in response.text


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, VOCAB_SIZE + 700])
def test_an_id_beyond_the_vocabulary_in_tokenizer_json(folder: Path, token_id: int) -> None:
    def foreign(values: dict[str, Any]) -> None:
        last = max(values["model"]["vocab"], key=values["model"]["vocab"].__getitem__)
        values["model"]["vocab"][last] = token_id

    rewrite(folder, foreign, "tokenizer.json")
    tokenizer = engine_tokenizer.load_tokenizer(folder, load_config(folder))
    assert tokenizer.encode("Once") and tokenizer.token_bytes(VOCAB_SIZE - 1) == b""
    with pytest.raises(InvalidRequest, match=f"prompt: the text has the token .* whose id {token_id} the model lacks"):
        tokenizer.check([1, token_id], "prompt")
    tokenizer.check([1, VOCAB_SIZE - 1], "prompt")


def test_an_absurd_id_in_tokenizer_json_is_named(folder: Path) -> None:
    rewrite(folder, lambda values: values["model"]["vocab"].update({"zzz": 2**31}), "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: token 'zzz' has the id 2147483648"):
        load_tokenizer(folder)


@pytest.mark.parametrize("foreign", ["<unk>", "日本", "a b", "\u2581the", ""])
def test_a_foreign_string_in_a_byte_level_vocabulary_is_its_own_bytes(folder: Path, foreign: str) -> None:
    def replace(values: dict[str, Any]) -> None:
        values["model"]["merges"] = []
        vocab = values["model"]["vocab"]
        last = max(vocab, key=vocab.__getitem__)
        vocab[foreign] = vocab.pop(last)

    rewrite(folder, replace, "tokenizer.json")
    tokenizer = engine_tokenizer.load_tokenizer(folder, load_config(folder))
    found = tokenizer.token_bytes(VOCAB_SIZE - 1)
    assert found.decode() == tokenizer.decode([VOCAB_SIZE - 1])  # the library's own reading
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("ab"))) == b"ab"


HF_KEYS: dict[str, Any] = {
    "architectures": ["LPAForCausalLM"],
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "_name_or_path": "someone/model",
    "use_cache": True,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "hidden_act": "silu",
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": {"rope_type": "default"},
}


def test_hugging_face_keys_are_read(folder: Path) -> None:
    expected = load_config(folder)
    rewrite(folder, lambda values: values.update(HF_KEYS))
    assert load_config(folder) == expected
    assert load_model(folder, torch.float32, torch.device("cpu")).config == expected


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("keys", "changes"),
    [
        ({"rope_scaling": {"type": "default"}}, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": None}, {"rope_theta": 5e5}),
        ({"rope_parameters": LINEAR}, {"rope_scaling": LINEAR}),
        ({"rms_norm_eps": 1e-5, "norm_eps": None}, {"norm_eps": 1e-5}),
        ({"model_type": "lpa"}, {}),
    ],
)  # fmt: skip
def test_other_spellings_say_the_same(folder: Path, keys: dict[str, Any], changes: dict[str, Any]) -> None:
    def write(values: dict[str, Any]) -> None:
        values.update(keys)
        for name in [name for name, value in values.items() if value is None]:
            del values[name]

    rewrite(folder, write)
    assert load_config(folder) == tiny_config(**changes)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window: 4096"),
        ({"rms_norm_eps": 1e-5, "norm_eps": 1e-6}, "rms_norm_eps: 1e-05 contradicts norm_eps 1e-06"),
        ({"unheard_of": 1}, "unknown keys unheard_of"),
        ({"model_type": "llama"}, "model_type: 'llama' is another architecture; `lpa convert llama"),
        ({"model_type": "gpt2"}, "model_type: 'gpt2' is another architecture; only LPA models are read"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_what_is_no_lpa_model_is_said_by_its_key(folder: Path, keys: dict[str, Any], words: str) -> None:
    rewrite(folder, lambda values: values.update(keys))
    with pytest.raises(CheckpointError) as caught:
        load_config(folder)
    assert str(folder / "config.json") in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read(folder: Path, name: str, encoding: str) -> None:
    (folder / "tokenizer_config.json").write_text('{"bos_token": "é"}', encoding="utf-8")
    text = (folder / name).read_text(encoding="utf-8")
    (folder / name).write_text(text, encoding=encoding)
    assert engine_tokenizer.load_tokenizer(folder, load_config(folder)).special_tokens["bos_token"] == "é"


def test_a_byte_order_mark_before_a_tokenizer_and_a_template(folder: Path) -> None:
    for name, text in (
        ("tokenizer.json", (folder / "tokenizer.json").read_text()),
        ("chat_template.jinja", "{{ messages[0].content }}"),
    ):
        (folder / name).write_bytes(codecs.BOM_UTF8 + text.encode())
    tokenizer = engine_tokenizer.load_tokenizer(folder, load_config(folder))
    assert tokenizer.render_chat([{"role": "user", "content": "hello"}]) == "hello"
    assert load_tokenizer(folder).encode("Once").ids == byte_tokenizer().encode("Once").ids


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lpa-130m", "is a preset, a shape without weights"),
        ("vanilla-tiny", "`lpa init vanilla-tiny FOLDER`"),
        ("lpa-tiny", "the embedded lpa-tiny"),
        (
            "meta-llama/Llama-3.2-1B",
            "meta-llama/Llama-3.2-1B: no such folder; as a name of the Hugging Face",
        ),
        (
            "https://huggingface.co/org/name",
            "org/name: no such folder; as a name of the Hugging Face",
        ),
        ("nowhere", "nowhere: no such model folder"),
        ("some/where/else", "some/where/else: no such model folder"),
    ],
)
def test_a_name_that_is_no_folder_says_what_it_is(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    for arguments in (["generate", "a", "--model", name], ["score", "text.txt", "--model", name]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert words in result.stderr, result.stderr


def test_a_file_and_a_training_run_in_the_place_of_a_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.safetensors: is a file; a model is a folder"):
        load_config(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"the model of this training run is {folder}"):
        load_config(folder.parent)


NUMBERS = (0, -1, 1.5, True, "8", [8], {}, 10**12, 10**30, 10**400, float("inf"), float("nan"), float("-inf"))


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "num_key_value_heads", "head_dim", "attention_rank", "ffn_rank", "rope_theta",
            "norm_eps", "rope_scaling", "architecture", "tie_word_embeddings", "bos_token_id"],
)  # fmt: skip
def test_absurd_values_in_config_json_are_named(folder: Path, key: str) -> None:
    for value in (*NUMBERS, None):
        rewrite(folder, lambda values, value=value: values.__setitem__(key, value))  # type: ignore[misc]
        try:
            load_model(folder, torch.float32, torch.device("cpu"))
        except CheckpointError as error:
            assert str(folder) in str(error)
    rewrite(folder, lambda values: values.__setitem__(key, 10**400))
    with pytest.raises(CheckpointError, match=key):
        load_config(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": ["linear"], "factor": 2}},
        {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
        {"hidden_size": 2**24, "num_attention_heads": 1, "intermediate_size": 2**24},
        {"num_attention_heads": 2**24, "head_dim": 2**24, "num_key_value_heads": 2**24},
        {"max_position_embeddings": 2**24, "head_dim": 1024},
    ],
)
def test_absurd_combinations_are_refused_before_anything_is_built(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        tiny_config(**changes)


def test_json_that_is_too_deep_or_has_too_many_digits_is_no_traceback(folder: Path) -> None:
    for text in ("[" * 200_000, '{"vocab_size": ' + "9" * 10_000 + "}", "\udcff".encode("utf-8", "surrogateescape")):
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
            load_config(folder)
