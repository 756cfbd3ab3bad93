"""The native folder: what is written comes back, and what is wrong is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpa_model.backends.features import has_bfloat16, resolve_dtype
from lpa_model.checkpoint import (
    check_finite,
    load_config,
    load_model,
    load_tokenizer,
    load_tokenizer_config,
    save_checkpoint,
)
from lpa_model.config import Architecture
from lpa_model.folder import CheckpointError
from tests.tiny import byte_tokenizer, random_model, tiny_config, write_checkpoint

CPU = torch.device("cpu")
IDS = torch.arange(5, 45)[None]


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of the folder by name ('.' written as '__'); None removes one."""
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")


def load(folder: Path) -> Tensor:
    """Logits of the folder's model in float32."""
    model = load_model(folder, torch.float32, CPU)
    return model.logits(model(IDS))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_rank": None, "ffn_rank": 5, "lm_head_bias": True},
        {"tie_word_embeddings": True, "num_key_value_heads": 2},
        {"attention_rank": {"q": [8, None], "k": 6, "v": None, "o": 8}, "ffn_rank": 5},
    ],
)
def test_round_trip(tmp_path: Path, architecture: Architecture, changes: dict[str, Any]) -> None:
    """The loaded model is the one that was built directly, rotary tables included, which no file holds."""
    config = tiny_config(architecture, **changes)
    folder = write_checkpoint(tmp_path / "model", config, seed=3)
    model, built = load_model(folder, torch.float32, CPU), random_model(config, seed=3)
    assert model.config == config
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert dict(model.named_buffers()).keys() == dict(built.named_buffers()).keys()
    pairs = [(model.named_parameters(), built.named_parameters()), (model.named_buffers(), built.named_buffers())]
    for found, expected in pairs:
        for (name, tensor), (expected_name, expected_tensor) in zip(found, expected, strict=True):
            assert name == expected_name
            assert torch.equal(tensor, expected_tensor), name
    assert torch.equal(model.logits(model(IDS)), built.logits(built(IDS)))
    assert load_tokenizer(folder).get_vocab() == byte_tokenizer().get_vocab()


def test_who_may_read_the_other_files_may_read_the_weights(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", random_model(tiny_config()), byte_tokenizer(), torch.float32)
    assert len({file.stat().st_mode for file in (tmp_path / "m").iterdir()}) == 1


def test_rotary_tables_are_scaled_as_the_config_says(tmp_path: Path) -> None:
    config = tiny_config(rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 4.0})
    folder = write_checkpoint(tmp_path / "model", config)
    built = random_model(config)
    assert torch.equal(load(folder), built.logits(built(IDS)))
    assert not torch.equal(load(folder), load(write_checkpoint(tmp_path / "plain", tiny_config())))


def test_a_tied_head_is_stored_once_and_shared(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config(tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_model(folder, torch.float32, CPU)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_shards_with_an_index(tmp_path: Path, architecture: Architecture) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config(architecture))
    whole = load(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    assert torch.equal(load(folder), whole)

    (folder / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        load(folder)
    for text in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json: not a shard index"):
            load(folder)
    for shard in ("../one.safetensors", 1):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert f"names a shard {shard!r}" in str(caught.value)


def test_bfloat16_storage_loads_as_either_type(tmp_path: Path) -> None:
    config = tiny_config()
    folder = write_checkpoint(tmp_path / "model", config, dtype=torch.bfloat16)
    rounded = random_model(config).to(torch.bfloat16)
    wide, narrow = (load_model(folder, dtype, CPU) for dtype in (torch.float32, torch.bfloat16))
    for name, parameter in rounded.named_parameters():
        assert torch.equal(narrow.get_parameter(name), parameter)
        assert torch.equal(wide.get_parameter(name), parameter.float())
    assert wide.rotary is not None and narrow.rotary is not None
    assert wide.rotary.cos.dtype == narrow.rotary.cos.dtype == torch.float32
    expected = rounded.float()
    expected.rotary.build(config, CPU)  # a module's .to() rounds its tables too
    assert torch.equal(wide.logits(wide(IDS)), expected.logits(expected(IDS)))


def test_only_matrices_in_bfloat16_stay_narrow(tmp_path: Path, architecture: Architecture) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config(architecture), dtype=torch.bfloat16)
    rewrite(folder, layers__0__attention__q_proj__up__weight=torch.ones(32, 8))
    found = load_model(folder, torch.float32, CPU, widen=False)
    for name, parameter in found.named_parameters():
        narrow = parameter.ndim == 2 and "layers.0.attention.q_proj.up" not in name
        assert parameter.dtype == (torch.bfloat16 if narrow else torch.float32), name


def test_missing_extra_and_wrongly_shaped_tensors_are_named(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for number, (name, tensor) in enumerate(tensors.items()):  # one mistake each, in turn
        wrong = (None, torch.zeros(*tensor.shape, 1), torch.zeros(tensor.shape, dtype=torch.int32))[number % 3]
        changed = {key: value for key, value in {**tensors, name: wrong}.items() if value is not None}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert name in str(caught.value)
    save_file({**tensors, "layers.2.norm.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensor layers\.2\.norm\.weight"):
        load(folder)


def test_wrong_shapes_say_both_shapes(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    rewrite(folder, embed_tokens__weight=torch.zeros(7, 32))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape \[7, 32\].*\[300, 32\]"):
        load(folder)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.ffn.down_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, tiny_checkpoints: dict[Architecture, Path], bad: float, name: str, dtype: torch.dtype
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoints["setting2"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = bad
    save_file(tensors, folder / "model.safetensors")
    count = tensors[name].numel()
    with pytest.raises(CheckpointError, match=f"model.safetensors: {re.escape(name)} has 1 of {count} numbers"):
        load_model(folder, dtype, CPU)


def test_large_weights_that_are_finite_are_taken(tmp_path: Path, tiny_checkpoints: dict[Architecture, Path]) -> None:
    """Their sum is not."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoints["setting2"], folder)
    rewrite(folder, norm__weight=torch.full((32,), 3e38))
    load_model(folder, torch.float32, CPU)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, tiny_checkpoint: Path, kept: int) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        load(folder)


def test_missing_files_are_named(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such model folder"):
        load_config(tmp_path / "nowhere")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = shutil.copytree(tiny_checkpoint, tmp_path / file)
        (folder / file).unlink()
        with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
            load(folder)
            load_tokenizer(folder)


def test_broken_json_is_named(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    for text in ('{"architecture": "setting2"', "[]", "{}", "\x00"):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            load(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        load(folder)
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(folder)


def test_the_config_decides_what_is_needed(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Weights of another rank do not slip in."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "attention_rank": 9}))
    with pytest.raises(CheckpointError, match=r"layers\.\d\.attention\.._proj\."):
        load(folder)


def test_every_part_of_a_mixed_model_is_needed(tmp_path: Path) -> None:
    config = tiny_config(ffn_rank={"gate": None, "up": [7, None], "down": 5}, qk_norm=True)
    write_checkpoint(tmp_path / "model", config)
    for name in (
        "layers.0.ffn.gate_proj.weight",
        "layers.0.ffn.up_proj.down.weight",
        "layers.1.ffn.up_proj.weight",
        "layers.1.ffn.down_proj.up.weight",
        "layers.1.attention.q_norm.weight",
        "layers.0.attention.k_norm.weight",
    ):
        folder = shutil.copytree(tmp_path / "model", tmp_path / name)
        rewrite(folder, **{name: None})
        with pytest.raises(CheckpointError, match=f"missing tensor {re.escape(name)}$"):
            load(folder)
    folder = tmp_path / "model"
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "qk_norm": False}))
    with pytest.raises(CheckpointError, match=r"unexpected tensor layers\.\d\.attention\.[kq]_norm\.weight"):
        load(folder)


def test_saving_again_replaces_every_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config("setting1"), seed=1)
    names = sorted(path.name for path in folder.iterdir())
    model = random_model(tiny_config("setting2"), seed=2)
    save_checkpoint(folder, model, byte_tokenizer(), torch.float32)
    assert sorted(path.name for path in folder.iterdir()) == names
    assert torch.equal(load(folder), model.logits(model(IDS)))


def test_dtype_names() -> None:
    assert resolve_dtype("float32", CPU) == torch.float32
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16
    assert resolve_dtype("auto", CPU) == (torch.bfloat16 if has_bfloat16(CPU) else torch.float32)


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    model, tokenizer = random_model(tiny_config()), byte_tokenizer()
    save_checkpoint(folder, model, tokenizer, torch.float32, tokenizer_files=source)
    assert load_tokenizer_config(folder) == {}
    (source / "tokenizer_config.json").write_text('{"eos_token": "é"}', encoding="utf-8")
    (source / "chat_template.jinja").write_text("{{ 'é' }}\n", encoding="utf-8")
    (source / "other.json").write_text("{}")
    save_checkpoint(folder, model, tokenizer, torch.float32, tokenizer_files=source)
    assert load_tokenizer_config(folder) == {"eos_token": "é"}
    assert (folder / "chat_template.jinja").read_bytes() == (source / "chat_template.jinja").read_bytes()
    assert not (folder / "other.json").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_numbers_that_are_not_finite_are_counted(dtype: torch.dtype) -> None:
    numbers = torch.arange(-50, 50).float()
    check_finite(Path("file"), "name", numbers.to(dtype))
    check_finite(Path("file"), "name", numbers[:0].to(dtype))
    for wrong in (float("nan"), float("inf"), -float("inf")):
        numbers[[7, 70]] = wrong
        with pytest.raises(CheckpointError, match="file: name has 2 of 100 numbers that are NaN or infinite"):
            check_finite(Path("file"), "name", numbers.to(dtype))
