"""config.json as Hugging Face's tools write it: its own keys beside ours, other spellings, a byte order mark.

It knows keys, not models. What changes a result is taken over or refused; what changes none is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_TYPE = "lpa"

UNUSED = frozenset(
    {
        *("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path"),
        *("auto_map", "tokenizer_class", "_attn_implementation", "attn_implementation", "return_dict"),
        *("output_attentions", "output_hidden_states", "use_return_dict", "torchscript", "problem_type"),
        *("use_cache", "pad_token_id", "unk_token_id", "sep_token_id", "is_decoder", "id2label", "label2id"),
        # of training
        *("initializer_range", "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop"),
        *("gradient_checkpointing", "_commit_hash", "unsloth_version"),
    }
)
"""Keys that change no result: who wrote the file, how it trains, what other libraries do with it."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False,),
    "use_bias": (False,),
    "pretraining_tp": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "max_window_layers": (None,),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
}
"""Keys of other architectures, and the values at which they have no effect."""

ALIASES = {"rms_norm_eps": "norm_eps", "layer_norm_eps": "norm_eps", "layer_norm_epsilon": "norm_eps"}
ACTIVATIONS = {"setting1": ("relu",), "setting2": ("silu", "swish")}
LLAMA_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Model types that `lpa convert llama` reads."""


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in UTF-8, -16 or -32, with a byte order mark or without.

    Raises:
        ValueError: the file holds something else; the message names it.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def own_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `LPAConfig` that a config.json says, in its own words or in Hugging Face's.

    Raises:
        ValueError: the file describes another architecture, or a key needs what LPA models do not have.
    """
    if (model_type := values.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
        raise ValueError(_other_model(model_type))
    found = {name: value for name, value in values.items() if name != "model_type" and name not in UNUSED}
    for name, allowed in NEUTRAL.items():
        if name in found and (value := found.pop(name)) not in allowed:
            raise ValueError(f"{name}: {value!r} is not supported; LPA models have nothing of the kind")
    if "hidden_act" in found:
        allowed = ACTIVATIONS.get(str(found.get("architecture")), ())
        if (value := found.pop("hidden_act")) not in allowed:
            raise ValueError(f"hidden_act: {value!r} is not this architecture's activation ({' or '.join(allowed)})")
    for alias, name in ALIASES.items():
        if alias in found:
            value = found.pop(alias)
            if found.setdefault(name, value) not in (value, None):
                raise ValueError(f"{alias}: {value!r} contradicts {name} {found[name]!r}")
            found[name] = value
    _rotary_keys(found)
    return found


def _rotary_keys(found: dict[str, Any]) -> None:
    """`rope_parameters` of newer files, and the kind of scaling that scales nothing."""
    parameters = found.pop("rope_parameters", None)
    if isinstance(parameters, Mapping):
        if (theta := parameters.get("rope_theta")) is not None:
            found.setdefault("rope_theta", theta)
        kept = {name: value for name, value in parameters.items() if name != "rope_theta"}
        if (share := kept.pop("partial_rotary_factor", None)) not in (1, None):
            raise ValueError(f"partial_rotary_factor: {share!r} is not supported; all of a head rotates")
        found.setdefault("rope_scaling", kept or None)
    elif parameters is not None:
        raise ValueError(f"rope_parameters: {parameters!r} is neither null nor an object")
    scaling = found.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) == "default":
        found["rope_scaling"] = None


def _other_model(model_type: object) -> str:
    if model_type in LLAMA_TYPES:
        remedy = "`lpa convert llama SOURCE FOLDER` makes an LPA model of it"
    else:
        remedy = "only LPA models are read, and what `lpa convert` makes of others (`lpa convert --help`)"
    return f"model_type: {model_type!r} is another architecture; {remedy}"
