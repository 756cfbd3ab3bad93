"""The tokenizer in a GGUF file (`tokenizer.ggml.*`) as a `tokenizers.Tokenizer`, and the files that go with it.

A file tells a BPE's vocabulary and merges, and of its pre-tokenizer the name only: PRE_TOKENIZERS has those that are
known. A SentencePiece vocabulary has scores, which merges follow from (`spm`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lpa_model.config import LPAConfig
from lpa_model.convert.spm import BYTE, CONTROL, UNKNOWN, USER_DEFINED, sentencepiece_tokenizer
from lpa_model.folder import CheckpointError

Contents = Callable[[str], Any]
"""Metadata by key; None for one that is not there."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES_AND_SPACES}"
)

GPT2_KINDS = ("gpt-2", "olmo")
DIGIT_KINDS = ("smollm", "starcoder", "refact", "command-r")  # GPT-2's, with every digit by itself
LLAMA3_KINDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral")
PRE_TOKENIZERS = (*GPT2_KINDS, *DIGIT_KINDS, *LLAMA3_KINDS, "smaug-bpe", "dbrx", "qwen2", "tekken")
"""`tokenizer.ggml.pre` of the files that are read."""

ENDS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
        *("<EOT>", "<|eot|>", "<|END_OF_TURN_TOKEN|>"),
    }
)
"""Control tokens at which texts end even if the file says otherwise, as in llama.cpp."""


def read_tokenizer(path: Path, contents: Contents) -> Tokenizer:
    """The tokenizer of the file; texts begin and end as it says (add_bos_token, add_eos_token).

    Raises:
        CheckpointError: it is broken, or its kind or pre-tokenizer is not supported.
    """
    tokens, kinds = _tokens(path, contents)
    model = contents("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(path, contents, tokens, kinds)
    elif model == "llama":
        scores = _list(path, contents, "tokenizer.ggml.scores", len(tokens))
        try:
            tokenizer = sentencepiece_tokenizer(
                list(zip(tokens, scores, kinds, strict=True)),
                byte_fallback=BYTE in kinds,
                add_dummy_prefix=contents("tokenizer.ggml.add_space_prefix") is not False,
            )
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path}: tokenizer.ggml.tokens and scores make no tokenizer: {error}") from error
    else:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model {model!r} is not supported (gpt2, which is BPE, and llama, which is "
            "SentencePiece, are)"
        )
    _add_ends(path, contents, tokenizer, tokens)
    if tokenizer.get_vocab_size() != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens has texts twice")
    return tokenizer


def special_id(path: Path, contents: Contents, name: str) -> int | None:
    """`tokenizer.ggml.NAME_token_id`, or None; CheckpointError where it is no token."""
    key = f"tokenizer.ggml.{name}_token_id"
    if (value := contents(key)) is None:
        return None
    if type(value) is not int or not 0 <= value < len(contents("tokenizer.ggml.tokens") or ()):
        raise CheckpointError(f"{path}: {key} {value!r} is none of the tokenizer's tokens")
    return value


def end_ids(path: Path, contents: Contents) -> list[int]:
    """Where texts end: eos first, then eot and eom, then control tokens of ENDS."""
    tokens, kinds = _tokens(path, contents)
    named = [special_id(path, contents, name) for name in ("eos", "eot", "eom")]
    by_text = [i for i, token in enumerate(tokens) if token in ENDS and kinds[i] in (CONTROL, USER_DEFINED)]
    return list(dict.fromkeys(i for i in (*named, *by_text) if i is not None))


def tokenizer_files(path: Path, contents: Contents, tokenizer: Tokenizer, config: LPAConfig) -> dict[str, str]:
    """tokenizer_config.json, generation_config.json and chat_template.jinja, as texts by name."""
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token_id := special_id(path, contents, theirs)) is not None:
            described[f"{ours}_token"] = tokenizer.id_to_token(token_id)
    files = {}
    template = contents("tokenizer.chat_template")
    others = contents("tokenizer.chat_templates")
    if others:  # the names of further ones
        named = [{"name": name, "template": contents(f"tokenizer.chat_template.{name}")} for name in others]
        first = [{"name": "default", "template": template}] if template is not None else []
        described["chat_template"] = first + named
    elif template is not None:
        files["chat_template.jinja"] = template
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None}
    files["tokenizer_config.json"] = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    files["generation_config.json"] = json.dumps(special, indent=2) + "\n"
    return files


def _tokens(path: Path, contents: Contents) -> tuple[list[str], list[int]]:
    tokens = contents("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens is no list of texts: the file has no tokenizer")
    return tokens, _list(path, contents, "tokenizer.ggml.token_type", len(tokens))


def _list(path: Path, contents: Contents, key: str, length: int) -> list[Any]:
    value = contents(key)
    if not isinstance(value, list) or len(value) != length:
        raise CheckpointError(f"{path}: {key} does not have a number for each of the {length} tokens")
    return value


def _byte_level(path: Path, contents: Contents, tokens: list[str], kinds: list[int]) -> Tokenizer:
    pre = contents("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        said = "is missing" if pre is None else f"{pre!r} is not supported"
        raise CheckpointError(f"{path}: tokenizer.ggml.pre {said} ({', '.join(PRE_TOKENIZERS)} are)")
    merges = contents("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: tokenizer.ggml.merges is missing")
    pairs = []
    for merge in merges:
        if (space := merge.find(" ", 1)) < 0:
            raise CheckpointError(f"{path}: tokenizer.ggml.merges has {merge!r}, which is no pair")
        pairs.append((merge[:space], merge[space + 1 :]))
    ignore = pre in (*LLAMA3_KINDS, "tekken")
    ids = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(ids, pairs, ignore_merges=ignore))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens and merges make no tokenizer: {error}") from error
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre in GPT2_KINDS:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in DIGIT_KINDS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pattern = {"qwen2": QWEN2, "tekken": TEKKEN}.get(pre, LLAMA3)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _add_ends(path: Path, contents: Contents, tokenizer: Tokenizer, tokens: list[str]) -> None:
    """Put BOS and EOS around texts, where the file or else its kind says so."""
    default = contents("tokenizer.ggml.model") == "llama" or contents("tokenizer.ggml.pre") in (
        *LLAMA3_KINDS,
        "tekken",
    )
    wanted = {}
    for name, used in (("bos", default), ("eos", False)):
        said = contents(f"tokenizer.ggml.add_{name}_token")
        if used if said is None else said:
            if (token_id := special_id(path, contents, name)) is None:
                raise CheckpointError(
                    f"{path}: tokenizer.ggml.add_{name}_token is true, and there is no {name}_token_id"
                )
            wanted[name] = (tokens[token_id], token_id)
    byte_level = contents("tokenizer.ggml.model") == "gpt2"
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
    if wanted:
        around = [wanted["bos"][0]] if "bos" in wanted else []
        behind = [wanted["eos"][0]] if "eos" in wanted else []
        steps.append(
            processors.TemplateProcessing(
                single=[*around, "$A", *behind],
                pair=[*around, "$A", *behind, *(f"{token}:1" for token in around), "$B:1"]
                + [f"{token}:1" for token in behind],
                special_tokens=list(wanted.values()),
            )
        )
    if steps:
        tokenizer.post_processor = steps[0] if len(steps) == 1 else processors.Sequence(steps)
