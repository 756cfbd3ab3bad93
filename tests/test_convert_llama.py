"""`lpa convert llama` is the inverse of `lpa export hf-llama`, and refuses what is no LLaMA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpa_model.checkpoint import CheckpointError, load_model
from lpa_model.convert.export import export_llama
from lpa_model.convert.llama import convert_llama
from tests.conftest import tiny_config, write_checkpoint
from tests.test_cli import succeed

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_rank": None, "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"attention_bias": True, "rope_scaling": LLAMA3, "rope_theta": 5e5},
    ],
)
def test_what_is_exported_and_converted_computes_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = write_checkpoint(tmp_path / "lpa", tiny_config(**changes))
    export_llama(source, tmp_path / "llama", torch.float32)
    out = succeed("convert", "llama", tmp_path / "llama", tmp_path / "back")
    assert "setting2, dense" in out
    ids = torch.arange(40).reshape(1, -1)
    one, other = (load_model(tmp_path / name, torch.float32, torch.device("cpu")) for name in ("lpa", "back"))
    assert other.config.attention_rank is None and other.config.rope_scaling == one.config.rope_scaling
    torch.testing.assert_close(other.logits(other(ids)), one.logits(one(ids)), atol=1e-4, rtol=1e-4)
    assert (tmp_path / "back/tokenizer.json").is_file()


def test_what_is_no_llama_is_refused_by_name(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "lpa", tiny_config())
    with pytest.raises(CheckpointError, match="model_type: 'lpa' is none of llama"):
        convert_llama(source, tmp_path / "out", torch.float32)
    llama = tmp_path / "llama"
    export_llama(source, llama, torch.float32)
    config = json.loads((llama / "config.json").read_text())
    for key, value in (("hidden_act", "gelu"), ("mlp_bias", True), ("sliding_window", 4096)):
        (llama / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match=key):
            convert_llama(llama, tmp_path / "out", torch.float32)
    (llama / "config.json").write_text(json.dumps(config))
    tensors = load_file(llama / "model.safetensors")
    save_file({**tensors, "model.layers.0.extra": torch.ones(2)}, llama / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\.0\.extra"):
        convert_llama(llama, tmp_path / "out", torch.float32)
    save_file({**tensors, "model.norm.weight": torch.full((32,), torch.nan)}, llama / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds numbers that are not finite"):
        convert_llama(llama, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()
