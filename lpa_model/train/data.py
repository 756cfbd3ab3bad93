"""The tokens of a run, from text or from folders of `lpa tokenize`, and the windows of them that a step sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from lpa_model.checkpoint import load_tokenizer, replace_text
from lpa_model.train.config import TrainConfig
from lpa_model.train.state import STATE
from lpa_model.train.text import is_jsonl, pieces
from lpa_model.train.tokenizer import END_OF_TEXT, TokenIds, train_tokenizer
from lpa_model.train.tokens import Tokens, read_tokens, source_of, tokenizer_hash, write_tokens

TOKENS, VALID = "tokens.safetensors", "valid.safetensors"

Report = Callable[[str, int], None]
"""Called with what is done, and the bytes of the files that have been read for it."""


def _quiet(task: str, read: int) -> None: ...


@dataclass(frozen=True)
class Data:
    """What a run is trained and validated on."""

    tokenizer: Tokenizer
    train: Tokens
    valid: Tokens


def tokenize(
    sources: Sequence[Path],
    folder: Path,
    *,
    tokenizer: Tokenizer | int,
    end_of_text: str = END_OF_TEXT,
    field: str = "text",
    report: Report = _quiet,
) -> tuple[Tokenizer, Tokens]:
    """Write tokenizer.json and tokens.safetensors of text or JSONL files into the existing `folder`.

    Args:
        tokenizer: or the entries of one that is trained on the text.

    Raises:
        ValueError: as `pieces`, or the tokenizer has no `end_of_text`.
        OSError: a file cannot be read or written.
    """
    check_field(sources, field)
    if isinstance(tokenizer, int):
        task = "training the tokenizer"
        text = pieces(sources, "", field, lambda read: report(task, read))
        tokenizer = train_tokenizer(text, tokenizer)
    elif tokenizer.token_to_id(end_of_text) is None:
        raise ValueError(f"end_of_text: the tokenizer has no token {end_of_text!r}")
    text = pieces(sources, end_of_text, field, lambda read: report("tokenizing", read))
    replace_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    return tokenizer, write_tokens(
        folder / TOKENS, tokenizer, text, end_of_text, tuple(source_of(path) for path in sources)
    )


def check_field(sources: Sequence[Path], field: str) -> None:
    """Raises ValueError for a field other than the default where no source is JSONL, which alone has fields."""
    if field != "text" and not any(is_jsonl(path) for path in sources):
        raise ValueError(f"field: {field!r} has no effect: no file's name ends in .jsonl or .ndjson")


def prepare(data: Path, valid: Path, out: Path, vocab_size: int, field: str = "text", report: Report = _quiet) -> Data:
    """The tokenizer, the training and the validation tokens of a run in the folder `out`.

    `data` is a folder of `lpa tokenize`, or text on which a tokenizer is trained; its tokens are kept in `out` for the
    next start. `valid` is such a folder or text, too, and is tokenized at every start. What an earlier start has left
    in `out` binds this one once it has kept a state; before that, tokens of other data or of a tokenizer of another
    size are made again.

    Raises:
        ValueError: as `tokenize` and `read_tokens`; `out` is of a start with other data.
        OSError: a file cannot be read or written.
    """
    check_field([data, valid], field)
    kept, started = out / "tokenizer.json", (out / STATE).exists()
    if data.is_dir():
        tokenizer = load_tokenizer(data)
        train = read_tokens(data / TOKENS, tokenizer)
        if started and tokenizer_hash(load_tokenizer(out)) != tokenizer_hash(tokenizer):
            raise ValueError(f"{out}: an earlier start had another tokenizer than {data}: give another --out")
        replace_text(kept, tokenizer.to_str(pretty=True))
    elif (out / TOKENS).exists() and (started or _fits(out, data, vocab_size)):
        tokenizer = load_tokenizer(out)
        train = read_tokens(out / TOKENS, tokenizer)
        if data.exists() and (source_of(data),) != train.sources:
            raise ValueError(
                f"{out}: an earlier start was on {', '.join(train.sources)}, and data is {source_of(data)} now: give "
                "another --out"
            )
    elif started:
        raise ValueError(f"{out}: an earlier start was on a folder of tokens: give that as data, or another --out")
    else:
        tokenizer, train = tokenize(
            [data], out, tokenizer=vocab_size, field=field if is_jsonl(data) else "text", report=report
        )
    if valid.is_dir():
        return Data(tokenizer, train, read_tokens(valid / TOKENS, tokenizer))
    end = tokenizer.id_to_token(train.end_of_text)
    assert end is not None
    text = pieces([valid], end, field, lambda read: report("tokenizing the validation text", read))
    return Data(tokenizer, train, write_tokens(out / VALID, tokenizer, text, end))


def _fits(out: Path, data: Path, vocab_size: int) -> bool:
    """Whether the tokens in `out` are those that a first start would make. One that was killed may have left half."""
    tokenizer = load_tokenizer(out)
    try:
        train = read_tokens(out / TOKENS, tokenizer)
    except ValueError:
        return False
    return tokenizer.get_vocab_size() == vocab_size and (not data.exists() or (source_of(data),) == train.sources)


def check_lengths(config: TrainConfig, num_tokens: int, num_valid_tokens: int) -> None:
    """ValueError if the training text is no longer than a sequence, or the validation text has less than two tokens."""
    if num_tokens <= config.longest:
        raise ValueError(
            f"sequence_length: {config.longest} is too long for training data of {num_tokens} tokens: give more text, "
            f"or a sequence_length below {num_tokens}"
        )
    if num_valid_tokens < 2:
        raise ValueError(f"valid: the text has {num_valid_tokens} tokens; validation takes two or more")


def batch(tokens: TokenIds, step: int, config: TrainConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step, int64 [sequences, T]: windows at random offsets that depend on (seed, step)."""
    length = config.length(step)
    starts = np.random.default_rng((config.seed, step)).integers(0, len(tokens) - length, config.sequences(step))
    windows = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":  # from pageable memory the copy would wait until the steps before are done
        windows = windows.pin_memory().to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]
