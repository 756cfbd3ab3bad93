"""The model that was factored, by its config.json, which other projects write out in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lpa_model.config import LPAConfig
from lpa_model.convert.llama import config_of

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
    """The dense LPA config of a Hugging Face config (`config_of`), with a shorter context if one is given.

    Raises:
        ValueError: another architecture, or a key needs what LPA models do not have; the message names it.
    """
    found = {name: value for name, value in values.items() if name not in WRITTEN_OUT}
    window, context = found.get("sliding_window"), max_position_embeddings
    if context is not None and isinstance(window, int) and window >= context:
        found["sliding_window"] = None
    try:
        config = config_of(found)
    except ValueError as error:
        if str(error).startswith("sliding_window") and context is None:
            raise ValueError(f"{error}; --max-position-embeddings {window} takes the context within it") from error
        raise
    if context is None:
        return config
    if context > config.max_position_embeddings:
        raise ValueError(
            f"max_position_embeddings: {context} is more than the model's {config.max_position_embeddings}"
        )
    return dataclasses.replace(config, max_position_embeddings=context)
