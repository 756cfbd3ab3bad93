"""Folders of quantised weights: written, read back to the same numbers, and refused where something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpa_model.backends import select
from lpa_model.checkpoint import held_otherwise, load_model, save_checkpoint, stored_weights
from lpa_model.config import Architecture
from lpa_model.convert.export import export_llama
from lpa_model.convert.export_transformers import export_transformers
from lpa_model.convert.quantize import quantize_folder
from lpa_model.folder import CheckpointError
from lpa_model.model import LPAForCausalLM
from lpa_model.quantization import QuantizedLinear, WeightType, hold_weights
from server.llm import LLM
from tests.test_cli import assert_one_line, lpa, succeed
from tests.tiny import byte_tokenizer, random_model, tiny_config, write_checkpoint

CPU = torch.device("cpu")
KINDS: tuple[WeightType, ...] = ("int8", "int4")
CASES = {
    "setting1": tiny_config("setting1", ffn_rank=6, lm_head_bias=True),
    "setting2": tiny_config("setting2", attention_bias=True),
    "tied": tiny_config("setting2", tie_word_embeddings=True, attention_rank=None),
}


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_quantising_at_load_gives(tmp_path: Path, case: str, weights: WeightType) -> None:
    source, folder = write_checkpoint(tmp_path / "m", CASES[case]), tmp_path / "q"
    matrices = quantize_folder(source, folder, weights)
    expected, found = load_model(source, torch.float32, CPU), load_model(folder, torch.float32, CPU)
    expected.embed_tokens.weight = nn.Parameter(expected.embed_tokens.weight.bfloat16().float(), requires_grad=False)
    hold_weights(expected, weights)
    layers = {name: layer for name, layer in found.named_modules() if isinstance(layer, nn.Linear)}
    assert {matrix.name for matrix in matrices} == set(layers)
    assert all(isinstance(layer, QuantizedLinear) for layer in layers.values())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    with torch.inference_mode():
        ids = torch.arange(50).unsqueeze(0)
        assert torch.equal(found.logits(found(ids)), expected.logits(expected(ids)))
    assert (stored_weights(source), stored_weights(folder), held_otherwise(folder)) == (None, weights, {})
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "weights": weights, "format_version": "1"}


def test_a_matrix_of_large_error_stays_as_it_is_and_is_listed(tmp_path: Path) -> None:
    config = tiny_config()
    model = random_model(config)
    odd = model.layers[1].ffn.down_proj
    odd.weight.data.fill_(0.06)  # just under half a step of the largest number of its group
    odd.weight.data[:, ::32] = 1.0
    save_checkpoint(tmp_path / "m", model, byte_tokenizer(), torch.float32)
    kept = [
        matrix for matrix in quantize_folder(tmp_path / "m", tmp_path / "q", "int4") if matrix.weights == "bfloat16"
    ]
    assert [matrix.name for matrix in kept] == ["layers.1.ffn.down_proj"]
    assert held_otherwise(tmp_path / "q") == {"bfloat16": ["layers.1.ffn.down_proj"]}
    assert "layers.1.ffn.down_proj" in succeed("info", tmp_path / "q")
    found = load_model(tmp_path / "q", torch.float32, CPU)
    assert torch.equal(found.layers[1].ffn.down_proj.weight, odd.weight.bfloat16().float())
    check_served(tmp_path / "q", found)


def check_served(folder: Path, plain: LPAForCausalLM) -> None:
    """A folder that is served scores a text nearly as the plain model does."""
    with LLM(folder, threads=1, block_size=32, kv_cache_memory=1 << 20, dtype="float32") as llm:
        scores = llm.score(["matrices of both kinds"]).texts[0]
    ids = torch.tensor([scores.token_ids])
    with torch.inference_mode():
        wanted = plain.logits(plain(ids))[0].log_softmax(-1)
    for place in range(1, len(scores.token_ids)):
        assert scores.logprobs[place] == pytest.approx(float(wanted[place - 1, ids[0, place]]), abs=0.2)


def change(path: Path, edit: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


NAME = "layers.0.ffn.down_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, m: m.update(format_version="2"), "format_version '2' of quantised weights is not one that this"),
        (lambda t, m: m.update(weights="int3"), "weights 'int3' are neither int8 nor int4"),
        (lambda t, m: m.pop("weights"), "unexpected tensor .*codes"),
        (lambda t, m: t.pop(f"{NAME}.scales"), f"missing tensor {NAME}.scales"),
        (lambda t, m: t.pop(f"{NAME}.codes"), f"missing tensor {NAME}.codes"),
        (lambda t, m: t.update({f"{NAME}.scales": t[f"{NAME}.scales"].float()}), "scales holds torch.float32"),
        (lambda t, m: t.update({f"{NAME}.codes": t[f"{NAME}.codes"].short()}), "neither int8 nor uint8"),
        (lambda t, m: t.update({f"{NAME}.codes": t[f"{NAME}.codes"][:, :32].clone()}), "codes has shape"),
        (lambda t, m: t.update({f"{NAME}.scales": t[f"{NAME}.scales"][1:].clone()}), "scales has shape"),
        (lambda t, m: t[f"{NAME}.codes"][3].fill_(-128), "codes has -128"),
        (lambda t, m: t[f"{NAME}.scales"][0].fill_(torch.inf), f"{NAME}.scales has"),
        (lambda t, m: t.update({f"{NAME}.weight": torch.zeros(32, 48)}), "both .*weight and .*codes"),
    ],
)
def test_reading_is_strict(
    tmp_path: Path, edit: Callable[[dict[str, Tensor], dict[str, str]], None], message: str
) -> None:
    folder = tmp_path / "q"
    quantize_folder(write_checkpoint(tmp_path / "m", tiny_config()), folder, "int8")
    change(folder / "model.safetensors", edit)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, torch.float32, CPU)


def test_what_does_not_fit_is_refused(tmp_path: Path, architecture: Architecture) -> None:
    source, folder = write_checkpoint(tmp_path / "m", tiny_config(architecture)), tmp_path / "q"
    calibrated = () if architecture == "setting2" else ("--calibrate-tokens", 0)
    assert "in int4" in succeed("quantize", source, folder, "--weights", "int4", *calibrated)
    assert_one_line(lpa("quantize", folder, tmp_path / "again"), "holds int4 weights already")
    assert_one_line(lpa("quantize", source, folder), "is not an empty folder")
    asked = ("generate", "x", "--model", folder, "--weights", "int8")
    assert_one_line(lpa(*asked), "the folder holds int4, which does not become int8; take auto")
    with pytest.raises(ValueError, match="weights: the folder holds int4"):
        select.choose(tiny_config(), weights="bfloat16", stored="int4")
    if architecture == "setting2":
        with pytest.raises(CheckpointError, match="holds int4 weights; export the folder that it was made of"):
            export_llama(folder, tmp_path / "llama", torch.float32)
    with pytest.raises(CheckpointError, match="holds int4 weights; export the folder that it was made of"):
        export_transformers(folder, tmp_path / "hf", torch.float32)
    assert not (tmp_path / "hf").exists()


def test_factors_are_not_made_of_quantised_weights(tmp_path: Path) -> None:
    dense, folder = write_checkpoint(tmp_path / "m", tiny_config(attention_rank=None)), tmp_path / "q"
    quantize_folder(dense, folder, "int8")
    made = lpa("convert", "lowrank", folder, tmp_path / "factors", "--rank", 32, "--calibrate-tokens", 128)
    assert_one_line(made, "holds int8 weights; factorise the folder that it was made of")
    assert not (tmp_path / "factors").exists()


def test_a_quantised_folder_and_quantising_at_load_are_the_same_server(tmp_path: Path) -> None:
    source, folder = write_checkpoint(tmp_path / "m", tiny_config(num_attention_heads=1, head_dim=32)), tmp_path / "q"
    quantize_folder(source, folder, "int8")
    asked = ("generate", "Hello", "--max-tokens", 12, "--temperature", 0, "--dtype", "float32")
    assert succeed(*asked, "--model", folder) == succeed(*asked, "--model", source, "--weights", "int8")
    compared = json.loads(succeed("score", "--compare", source, folder, Path(__file__), "--json", "--dtype", "float32"))
    assert (compared["a"]["dtype"], compared["b"]["dtype"]) == ("float32", "float32, int8 weights")
    assert 0 < compared["comparison"]["kl_divergence"] < 0.01
    assert compared["comparison"]["perplexity_ratio"] == pytest.approx(1, abs=0.05)
