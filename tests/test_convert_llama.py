"""`lpa convert llama` is the inverse of `lpa export hf-llama`, and refuses what is no LLaMA."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from lpa_model.checkpoint import load_config, load_model
from lpa_model.convert import stream
from lpa_model.convert.export import export_llama
from lpa_model.convert.llama import convert_llama
from lpa_model.folder import CheckpointError
from server.llm import LLM, SamplingParams
from tests.hub_cache import hub_cache
from tests.llama_oracle import BASE, KINDS, LLAMA3, logits_of, write_folder
from tests.test_cli import assert_one_line, lpa, succeed
from tests.tiny import tiny_config, write_checkpoint


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
    for key, value in (("hidden_act", "gelu"), ("mlp_bias", True), ("sliding_window", 64)):
        (llama / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match=key):
            convert_llama(llama, tmp_path / "out", torch.float32)
    (llama / "config.json").write_text(json.dumps(config))
    tensors = load_file(llama / "model.safetensors")
    save_file({**tensors, "model.layers.0.extra": torch.ones(2)}, llama / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\.0\.extra"):
        convert_llama(llama, tmp_path / "out", torch.float32)
    save_file({**tensors, "model.norm.weight": torch.full((32,), torch.nan)}, llama / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has 32 of 32 numbers that are NaN"):
        convert_llama(llama, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_every_kind_computes_what_its_formulas_say(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {**BASE, **changes}
    tensors = write_folder(tmp_path / "theirs", config, shards=3)
    found = convert_llama(tmp_path / "theirs", tmp_path / "ours")
    assert found.attention_rank is None and found.ffn_rank is None
    model = load_model(tmp_path / "ours", torch.float32, torch.device("cpu"))
    ids = [(7 * i * i + 3) % config["vocab_size"] for i in range(40)]
    logits = model.logits(model(torch.tensor([ids])))[0].double()
    torch.testing.assert_close(logits, logits_of(config, tensors, ids), atol=1e-4, rtol=0)


def test_a_server_of_it_computes_the_same(tmp_path: Path) -> None:
    """Biases, norms of queries and keys and YaRN in the backend, and a text read from its cache."""
    for number, kind in enumerate(("qwen2, yarn", "qwen3, yarn")):
        config = {**BASE, **KINDS[kind]}
        tensors = write_folder(tmp_path / f"theirs{number}", config)
        convert_llama(tmp_path / f"theirs{number}", tmp_path / f"ours{number}")
        ids = [(7 * i * i + 3) % config["vocab_size"] for i in range(40)]
        expected = torch.log_softmax(logits_of(config, tensors, ids), -1)
        with LLM(tmp_path / f"ours{number}", dtype="float32", threads=1, kv_cache_memory=1 << 20) as llm:
            (scores,) = llm.score([ids], method="full").texts
        for i in range(1, len(ids)):
            assert scores.logprobs[i] == pytest.approx(expected[i - 1, ids[i]].item(), abs=1e-4)


def test_dtypes_are_kept_or_made(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    tensors = write_folder(source, BASE)
    mixed = {k: t.half() if "mlp" in k else t.bfloat16() if "attn" in k else t for k, t in tensors.items()}
    save_file(mixed, source / "model.safetensors")
    out = succeed("convert", "llama", source, tmp_path / "kept")
    assert "bfloat16, float16, float32" in out
    kept = load_file(tmp_path / "kept/model.safetensors")
    assert torch.equal(kept["layers.0.ffn.up_proj.weight"], mixed["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(kept["layers.1.attention.q_proj.weight"], mixed["model.layers.1.self_attn.q_proj.weight"])
    assert "in bfloat16" in succeed("convert", "llama", source, tmp_path / "made", "--dtype", "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "made/model.safetensors").values()} == {torch.bfloat16}


def test_a_pickle_of_tensors_is_read(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    tensors = write_folder(source, BASE)
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    convert_llama(source, tmp_path / "ours")
    found = load_file(tmp_path / "ours/model.safetensors")
    assert torch.equal(found["norm.weight"], tensors["model.norm.weight"])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"model_type": "gemma"}, "model_type: 'gemma' is none of llama"),
    "window": ({"model_type": "mistral", "sliding_window": 32}, "sliding_window: 32 is shorter"),
    "window of a newer Qwen": (
        {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
        "sliding_window: 8",
    ),
    "layers without positions": ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers"),
    "scaling": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: type 'dynamic'"),
    "half of a head": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "unknown key": ({"mystery": 1}, "unknown keys mystery"),
    "wrong shape": ({"hidden_size": 32}, r"model\.embed_tokens\.weight has shape \[300, 24\]; the config asks for"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_named_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_folder(tmp_path / "theirs", BASE)
    (tmp_path / "theirs/config.json").write_text(json.dumps({**BASE, **changes}))
    with pytest.raises(CheckpointError, match=message) as raised:
        convert_llama(tmp_path / "theirs", tmp_path / "ours")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    write_folder(source, {**BASE, "vocab_size": 290})
    assert_one_line(
        lpa("convert", "llama", source, tmp_path / "ours"), "the tokenizer has 300 tokens and the model 290"
    )
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(source / "tokenizer.json"))
    assert_one_line(lpa("convert", "llama", source, tmp_path / "ours"), "the tokenizer is a WordLevel model")
    (source / "tokenizer.json").unlink()
    assert_one_line(lpa("convert", "llama", source, tmp_path / "ours"), "tokenizer.json: no such file")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_missing_and_a_truncated_shard(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    write_folder(source, BASE, shards=3)
    second = source / "model-00002-of-00003.safetensors"
    second.write_bytes(second.read_bytes()[:-10])
    assert_one_line(lpa("convert", "llama", source, tmp_path / "ours"), "truncated or not a safetensors file")
    second.unlink()
    assert_one_line(lpa("convert", "llama", source, tmp_path / "ours"), "names a shard")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_killed_conversion_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "theirs"
    write_folder(source, BASE, shards=2)
    convert_llama(source, tmp_path / "whole")

    def killed(done: int, whole: int) -> None:
        if done > whole / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_llama(source, tmp_path / "ours", progress=killed)
    partial = tmp_path / ".ours.partial"
    weights = partial / "model.safetensors.new"
    with pytest.raises(CheckpointError, match=r"no config\.json"):  # it is no model yet
        load_model(partial, torch.float32, torch.device("cpu"))
    with weights.open("ab") as file:
        file.write(b"half a tensor")
    before = weights.stat()
    steps: list[int] = []
    convert_llama(source, tmp_path / "ours", progress=lambda done, whole: steps.append(done))
    assert (tmp_path / "ours/model.safetensors").stat().st_ino == before.st_ino
    assert steps[0] > steps[-1] / 2  # what was there was not written again
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "whole", "ours"}
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_what_another_source_left_is_forgotten(tmp_path: Path) -> None:
    def killed(done: int, whole: int) -> None:
        raise KeyboardInterrupt

    write_folder(tmp_path / "one", BASE)
    other = {**BASE, "intermediate_size": 48}
    tensors = write_folder(tmp_path / "other", other)
    with pytest.raises(KeyboardInterrupt):
        convert_llama(tmp_path / "one", tmp_path / "ours", progress=killed)
    convert_llama(tmp_path / "other", tmp_path / "ours")
    found = load_file(tmp_path / "ours/model.safetensors")
    assert torch.equal(found["embed_tokens.weight"], tensors["model.embed_tokens.weight"])


def test_two_conversions_into_one_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "theirs", BASE)

    def second(done: int, whole: int) -> None:
        with pytest.raises(CheckpointError, match="ours: another conversion is writing it"):
            convert_llama(tmp_path / "theirs", tmp_path / "ours")

    convert_llama(tmp_path / "theirs", tmp_path / "ours", progress=second)
    load_model(tmp_path / "ours", torch.float32, torch.device("cpu"))


def test_memory_is_a_part_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PART", 500)
    write_folder(tmp_path / "theirs", BASE)
    sizes = []

    def noted(path: Path, name: str, tensor: torch.Tensor) -> None:
        sizes.append(tensor.numel())

    monkeypatch.setattr(stream, "check_finite", noted)
    convert_llama(tmp_path / "theirs", tmp_path / "ours")
    assert max(sizes) <= 500 and sum(sizes) == load_config(tmp_path / "ours").parameter_count()


def test_a_model_of_the_hub_is_converted(tmp_path: Path, hub: Path) -> None:
    write_folder(tmp_path / "theirs", BASE)
    hub_cache(hub, "someone/small", tmp_path / "theirs")
    assert "setting2, dense" in succeed("convert", "llama", "someone/small", tmp_path / "ours")
    succeed("convert", "llama", "https://huggingface.co/someone/small", tmp_path / "again", "--revision", "main")
    lines = "someone/none: no such folder; as a name of the Hugging Face hub it could not be fetched: "
    assert_one_line(lpa("convert", "llama", "someone/none", tmp_path / "none"), lines)
    assert_one_line(
        lpa("convert", "llama", "theirs", tmp_path / "none", "--revision", "main"), "--revision: theirs is no"
    )
    assert not (tmp_path / "none").exists()


def test_models_of_the_hub_are_served(tmp_path: Path, hub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "theirs", {**BASE, "model_type": "qwen3"})
    hub_cache(hub, "someone/dense", tmp_path / "theirs")
    hub_cache(hub, "someone/lpa", write_checkpoint(tmp_path / "lpa", tiny_config()))
    for name in ("someone/dense", "someone/lpa"):
        with LLM(name, dtype="float32", threads=1, kv_cache_memory=1 << 20) as llm:
            assert llm.name == name
            (completion,) = llm.generate("The robot", SamplingParams(max_tokens=4))
            assert completion.token_ids
    said = capfd.readouterr().err
    assert said.count("someone/dense is a qwen3 model, which is converted into") == 1
    assert "someone/lpa" not in said
    (converted,) = (tmp_path / "cache/lpa/models").iterdir()
    assert converted.name == "someone--dense--0123456789abcdef0123456789abcdef01234567"
    stamp = (converted / "model.safetensors").stat().st_mtime_ns
    assert re.search(r"qk_norm +│ True", succeed("info", "someone/dense"))
    assert (converted / "model.safetensors").stat().st_mtime_ns == stamp  # once
