"""Folders that transformers has written, of every kind that `lpa convert llama` takes: the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lpa_model.checkpoint import load_model
from lpa_model.convert.llama import convert_llama
from tests.llama_oracle import BASE, KINDS
from tests.tiny import byte_tokenizer


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_logits_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {**BASE, **changes}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, pad_token_id=None)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "o_proj.bias" not in name:  # which ours has not
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1 if "embed" in name else 0.2))
            if "norm.weight" in name:
                parameter.add_(1)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    byte_tokenizer().save(str(tmp_path / "theirs/tokenizer.json"))
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    convert_llama(tmp_path / "theirs", tmp_path / "ours")
    ours = load_model(tmp_path / "ours", torch.float32, torch.device("cpu"))
    ids = torch.tensor([[(7 * i * i + 3) % config["vocab_size"] for i in range(64)]])
    with torch.inference_mode():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=0)
