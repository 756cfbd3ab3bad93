"""Export for transformers with the factors kept: the model's own code goes into the folder (`hf_code`).

The folder stays a model folder of this project: its config.json has the same keys beside Hugging Face's, and reading
takes tensors with transformers' `model.` before their names.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lpa_model.checkpoint import (
    check_unquantized,
    load_config,
    load_model,
    load_tokenizer,
    load_tokenizer_config,
    write_weights,
)
from lpa_model.config import LPAConfig
from lpa_model.convert.export import write_json, write_tokenizer

CODE = Path(__file__).parent / "hf_code"
FILES = ("configuration_lpa.py", "modeling_lpa.py")


def export_transformers(source: Path, folder: Path, dtype: torch.dtype) -> int:
    """Write the model folder `source` into `folder` for `AutoModelForCausalLM.from_pretrained(trust_remote_code=True)`.

    Weights are stored in `dtype`. Returns the number of parameters.

    Raises:
        CheckpointError: the source cannot be read, or its weights are quantised.
    """
    config = load_config(source)
    check_unquantized(source, "export")
    tokenizer = load_tokenizer(source)
    load_tokenizer_config(source)  # a broken file is an error before anything is written
    model = load_model(source, torch.float32, torch.device("cpu"))
    tensors = {
        name if name.startswith("lm_head.") else f"model.{name}": parameter.to(dtype).contiguous()
        for name, parameter in model.named_parameters()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", transformers_config(config, dtype))
    write_tokenizer(folder, source, config, tokenizer)
    for name in FILES:
        shutil.copyfile(CODE / name, folder / name)
    write_weights(folder / "model.safetensors", tensors)
    return sum(tensor.numel() for tensor in tensors.values())


def transformers_config(config: LPAConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json`: our keys, rotary ones as transformers 5 has them, and where the code is."""
    values = config.to_dict()
    theta, scaling = values.pop("rope_theta"), values.pop("rope_scaling")
    if config.rotary:
        scaling = dict(scaling or {"rope_type": "default"})
        kind = scaling.pop("type", None)
        values["rope_parameters"] = {"rope_theta": theta, "rope_type": kind, **scaling}
    return {
        "architectures": ["LPAForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_lpa.LPAConfig",
            "AutoModel": "modeling_lpa.LPAModel",
            "AutoModelForCausalLM": "modeling_lpa.LPAForCausalLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        **values,
    }
