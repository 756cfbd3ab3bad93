"""The dense LLaMA that an export writes computes what the model computes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from typer.testing import CliRunner

from lpa_model.checkpoint import save_checkpoint
from lpa_model.config import LPAConfig
from lpa_model.convert.export import export_llama
from lpa_model.folder import CheckpointError
from server.cli import app
from tests.tiny import byte_tokenizer, random_model, tiny_config, write_checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, dict[str, Any]] = {
    "low-rank": {},
    "dense": {"attention_rank": None},
    "per-layer": {"attention_rank": {"q": [8, None], "k": [None, 6], "v": [5, None], "o": 8}},
    "low-rank-ffn": {"ffn_rank": 6},
    "mixed-ffn": {"ffn_rank": {"gate": None, "up": [6, 9], "down": [None, 5]}},
    "qk-norm": {"qk_norm": True, "num_key_value_heads": 2, "attention_bias": True, "norm_eps": 1e-2},
    "gqa-head-dim": {"num_key_value_heads": 2, "head_dim": 6},
    "bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "linear-rope": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0},
    "llama3-rope": {"rope_scaling": LLAMA3},
    "bos": {"bos_token_id": 7, "norm_eps": 1e-3},
    "all-of-llama": {
        "num_key_value_heads": 2,
        "attention_bias": True,
        "ffn_rank": {"gate": 6, "up": [None, 7], "down": 5},
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
    },
    "all-of-qwen3": {
        "qk_norm": True,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "ffn_rank": 9,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "tie_word_embeddings": True,
        "eos_token_id": (0, 5),
    },
}


def dense_logits(folder: Path, ids: list[int]) -> Tensor:
    """A LLaMA written out from its definition, in float64, from the folder's files alone: [T, vocab]."""
    config = json.loads((folder / "config.json").read_text())
    w = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, kv_heads, width = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    turns = torch.tensor([config["rope_theta"] ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        turns = turns / scaling["factor"]
    elif scaling["rope_type"] == "llama3":
        turns = torch.tensor([llama3(float(turn), scaling) for turn in turns], dtype=torch.float64)
    length = len(ids)
    spin = torch.polar(torch.ones(length, width // 2).double(), torch.arange(length).double()[:, None] * turns)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name]

    def project(x: Tensor, name: str, count: int) -> Tensor:  # [T, d] -> [count, T, width]
        y = x @ w[name + ".weight"].T + w.get(name + ".bias", 0)
        return y.view(length, count, width).transpose(0, 1)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * spin
        return torch.cat((turned.real, turned.imag), -1)

    x = w["model.embed_tokens.weight"][ids]
    hidden = torch.ones(length, length).triu(1).bool()
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        y = norm(x, f"{p}.input_layernorm.weight")
        q = project(y, f"{p}.self_attn.q_proj", heads)
        k = project(y, f"{p}.self_attn.k_proj", kv_heads)
        if config["model_type"] == "qwen3":
            q, k = norm(q, f"{p}.self_attn.q_norm.weight"), norm(k, f"{p}.self_attn.k_norm.weight")
        q, k = rotate(q), rotate(k).repeat_interleave(heads // kv_heads, 0)
        v = project(y, f"{p}.self_attn.v_proj", kv_heads).repeat_interleave(heads // kv_heads, 0)
        scores = (q @ k.transpose(1, 2) / math.sqrt(width)).masked_fill(hidden, -math.inf)
        o = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + o @ w[f"{p}.self_attn.o_proj.weight"].T + w.get(f"{p}.self_attn.o_proj.bias", 0)
        y = norm(x, f"{p}.post_attention_layernorm.weight")
        gate, up = (y @ w[f"{p}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"{p}.mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ w[head].T


def llama3(turn: float, scaling: dict[str, Any]) -> float:
    wavelength, original = 2 * math.pi / turn, scaling["original_max_position_embeddings"]
    if wavelength < original / scaling["high_freq_factor"]:
        return turn
    if wavelength > original / scaling["low_freq_factor"]:
        return turn / scaling["factor"]
    span = scaling["high_freq_factor"] - scaling["low_freq_factor"]
    smooth = (original / wavelength - scaling["low_freq_factor"]) / span
    return (1 - smooth) * turn / scaling["factor"] + smooth * turn


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_dense_model_gives_the_same_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    source, folder = write_checkpoint(tmp_path / "lpa", config), tmp_path / "llama"
    parameters = export_llama(source, folder, torch.float32)
    ids = [(7 * i * i + 3) % config.vocab_size for i in range(100)]
    expected = random_model(config).logits(random_model(config)(torch.tensor([ids])))[0]
    torch.testing.assert_close(dense_logits(folder, ids).float(), expected, rtol=0, atol=1e-4)
    twin = config.vanilla()
    zeros = config.num_hidden_layers * config.hidden_size * config.attention_bias  # LLaMA's bias on the output
    assert parameters == twin.parameter_count() + zeros
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"]
    generation = json.loads((folder / "generation_config.json").read_text())
    for name in ("bos_token_id", "eos_token_id"):  # LLaMA's defaults are 1 and 2, so none is written too
        value = getattr(config, name)
        assert written[name] == generation[name] == (list(value) if isinstance(value, tuple) else value)


def test_weights_are_stored_as_asked_and_rounded_once(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "lpa", tiny_config())
    export_llama(source, tmp_path / "llama", torch.bfloat16)
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    pair = random_model(tiny_config()).layers[1].attention.o_proj
    product = pair.up.weight.double() @ pair.down.weight.double()
    assert torch.equal(tensors["model.layers.1.self_attn.o_proj.weight"], product.bfloat16())
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "lpa", tiny_config(bos_token_id=7))
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}", "tokenizer_class": "Other"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    export_llama(source, tmp_path / "llama", torch.float32)
    text = "The robot liked thé waves.\n"
    written = Tokenizer.from_file(str(tmp_path / "llama" / "tokenizer.json"))
    assert written.encode(text).ids == byte_tokenizer().encode(text).ids
    assert json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text()) == {
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ messages }}",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": byte_tokenizer().id_to_token(7),
        "eos_token": "<|endoftext|>",
    }
    assert (tmp_path / "llama" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize(
    ("config", "reason"),
    [(tiny_config("setting1"), "setting 1 has learned positions"), (tiny_config(lm_head_bias=True), "lm_head_bias")],
    ids=["setting1", "head-bias"],
)
def test_what_llama_cannot_express_is_refused(tmp_path: Path, config: LPAConfig, reason: str) -> None:
    source = write_checkpoint(tmp_path / "lpa", config)
    with pytest.raises(CheckpointError, match=reason):
        export_llama(source, tmp_path / "llama", torch.float32)
    assert not (tmp_path / "llama").exists()


def test_the_command_writes_a_folder_and_overwrites_none(tmp_path: Path) -> None:
    source, folder = write_checkpoint(tmp_path / "lpa", tiny_config()), tmp_path / "llama"
    arguments = ["export", "hf-llama", str(source), str(folder), "--dtype", "bfloat16"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "LLaMA" in done.stdout
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    again = CliRunner().invoke(app, arguments)
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr == f"lpa: {folder}: exists and is not an empty folder\n"
    (source / "tokenizer_config.json").write_text("{")
    broken = CliRunner().invoke(app, [*arguments[:3], str(tmp_path / "other")])
    assert broken.exit_code == 2
    assert "tokenizer_config.json: not JSON" in broken.stderr


def test_memory_mapped_bfloat16_sources_are_read_exactly(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    save_checkpoint(tmp_path / "lpa", model, byte_tokenizer(), torch.bfloat16)
    export_llama(tmp_path / "lpa", tmp_path / "llama", torch.float32)
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight.bfloat16().float())
