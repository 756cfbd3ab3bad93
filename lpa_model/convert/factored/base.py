"""The model that was factored, by its config.json: LLaMA, Mistral, Qwen2 or Qwen3 as a setting-2 config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lpa_model.config import LPAConfig

BASES = ("llama", "mistral", "qwen2", "qwen3")

WRITTEN_OUT = frozenset(
    {
        # how to generate
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
        # of other kinds of model
        *("cross_attention_hidden_size", "decoder_start_token_id", "tie_encoder_decoder", "finetuning_task"),
        *("task_specific_params", "prefix", "pruned_heads", "chunk_size_feed_forward"),
        # of other libraries
        *("use_bfloat16", "tf_legacy_loss"),
    }
)
"""Keys that transformers' `config.to_dict()` has beside the model's own, and that change nothing here."""


def base_config(values: Mapping[str, Any], *, max_position_embeddings: int | None = None) -> LPAConfig:
    """The dense LPA config of a Hugging Face config.

    Args:
        max_position_embeddings: a shorter context than the config's.

    Raises:
        ValueError: another architecture, or a key needs what LPA models do not have; the message names it.
    """
    found = {name: value for name, value in values.items() if name not in WRITTEN_OUT}
    kind = found.get("model_type")
    if kind not in BASES:
        raise ValueError(f"model_type: {kind!r} is none of {', '.join(BASES)}")
    if max_position_embeddings is not None:
        given = found.get("max_position_embeddings")
        if isinstance(given, int) and max_position_embeddings > given:
            raise ValueError(f"max_position_embeddings: {max_position_embeddings} is more than the model's {given}")
        found["max_position_embeddings"] = max_position_embeddings
    _window(found)
    found["qk_norm"] = kind == "qwen3"
    found["attention_bias"] = kind == "qwen2" or found.get("attention_bias", False)
    return LPAConfig.from_dict({**found, "architecture": "setting2", "model_type": "lpa"})


def _window(found: dict[str, Any]) -> None:
    """Takes keys of a sliding window away where it is as long as the context, or not used."""
    used = found.pop("use_sliding_window", True)
    window, context = found.pop("sliding_window", None), found.get("max_position_embeddings")
    for name in ("max_window_layers", "layer_types"):
        found.pop(name, None)
    if not used or window is None or not isinstance(context, int):
        return
    if not isinstance(window, int) or window < context:
        raise ValueError(
            f"sliding_window: {window!r} is shorter than max_position_embeddings {context}, and LPA models attend to "
            f"all positions; --max-position-embeddings {window} takes the part in which both are the same"
        )
