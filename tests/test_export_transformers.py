"""The folder for transformers, seen from here: it stays a model folder, and has the code that its config names.

tests/extra/test_transformers.py runs it in transformers.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpa_model.checkpoint import load_config, load_model
from lpa_model.config import Architecture
from lpa_model.convert.export_transformers import export_transformers
from lpa_model.folder import CheckpointError
from tests.test_cli import assert_one_line, lpa, succeed
from tests.test_export import LLAMA3
from tests.tiny import random_model, tiny_config, write_checkpoint


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "eos_token_id": (0, 5), "rope_scaling": LLAMA3, "rope_theta": 5e5},
        {"ffn_rank": {"gate": [6, None], "up": 5, "down": None}, "qk_norm": True, "num_key_value_heads": 2},
    ],
)
def test_the_folder_is_read_as_the_model_that_it_was(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = write_checkpoint(tmp_path / "lpa", tiny_config(**changes))
    export_transformers(source, tmp_path / "hf", torch.float32)
    assert load_config(tmp_path / "hf") == load_config(source)
    one, other = (load_model(tmp_path / name, torch.float32, torch.device("cpu")) for name in ("lpa", "hf"))
    ids = torch.arange(40)[None]
    assert torch.equal(one.logits(one(ids)), other.logits(other(ids)))


@pytest.mark.parametrize("architecture", ["setting1", "setting2"])
def test_files_and_names_are_those_that_transformers_looks_for(tmp_path: Path, architecture: Architecture) -> None:
    source, folder = write_checkpoint(tmp_path / "lpa", tiny_config(architecture, bos_token_id=7)), tmp_path / "hf"
    (source / "chat_template.jinja").write_text("{{ messages }}")
    out = succeed("export", "transformers", source, folder, "--dtype", "bfloat16")
    assert f"{tiny_config(architecture).parameter_count():,} parameters in bfloat16" in out
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("lpa", "bfloat16")
    assert ("rope_parameters" in config) == (architecture == "setting2")
    for target in config["auto_map"].values():
        module, name = target.split(".")
        tree = ast.parse((folder / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 7, "eos_token_id": 0}
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    tensors = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"model", "lm_head"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert_one_line(lpa("export", "transformers", source, folder), "exists and is not an empty folder")


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "lpa", tiny_config())
    model = random_model(tiny_config())
    assert model.norm is not None
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": model.norm.weight}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight is there twice"):
        load_model(folder, torch.float32, torch.device("cpu"))
