"""An exported model in transformers: the same logits, the same greedy text, the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lpa_model.convert.export import export_llama
from server.engine.engine import build_engine
from server.engine.request import Request, SamplingParams
from server.settings import load_settings
from tests.test_export import CASES as WITH_ORACLE
from tests.tiny import byte_tokenizer, random_model, tiny_config, write_checkpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, dict[str, Any]] = {
    **WITH_ORACLE,
    "yarn-rope": {"rope_scaling": YARN, "ffn_rank": 7},
    "yarn-qwen3": {"rope_scaling": {**YARN, "beta_fast": 16, "attention_factor": 1.5}, "qk_norm": True},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_transformers_computes_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    source, folder = write_checkpoint(tmp_path / "lpa", config), tmp_path / "llama"
    export_llama(source, folder, torch.float32)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, nothing left over
    assert theirs.dtype == torch.float32
    ids = [(7 * i * i + 3) % config.vocab_size for i in range(100)]
    ours = random_model(config)
    with torch.inference_mode():
        logits = theirs(torch.tensor([ids])).logits[0]
        generated = theirs.generate(
            torch.tensor([ids[:60]]), attention_mask=torch.ones(1, 60), max_new_tokens=20, do_sample=False
        )[0, 60:]
    torch.testing.assert_close(logits, ours.logits(ours(torch.tensor([ids])))[0], rtol=0, atol=1e-4)

    engine = build_engine(source, load_settings(dtype="float32", threads=1, kv_cache_memory=1 << 20).engine_options())
    engine.add_request(Request("r", ids[:60], SamplingParams(max_tokens=20, temperature=0)))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert tokens == generated.tolist()


def test_the_tokenizer_is_the_same(tmp_path: Path) -> None:
    export_llama(write_checkpoint(tmp_path / "lpa", tiny_config(bos_token_id=7)), tmp_path / "llama", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    text = "The robot liked thé waves.\n  \t<|endoftext|>And then?"
    ids = byte_tokenizer().encode(text).ids
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 7)
    assert tokenizer.model_max_length == 128
    saved = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
