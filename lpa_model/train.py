"""Training an LPA model from text: the plain loop behind `lpa train`.

AdamW (Muon for the matrices of the blocks, if asked), linear warm-up and cosine decay, clipping, checkpoints and
exact resume: the batch of a step follows from (seed, step) alone, so a run that was interrupted and resumed ends
with the same weights as one that was not.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from lpa_model.backends.features import has_bfloat16, resolve_device
from lpa_model.checkpoint import save_checkpoint
from lpa_model.config import LPAConfig
from lpa_model.model import LPAForCausalLM
from lpa_model.muon import Muon

END_OF_TEXT = "<|endoftext|>"

TokenIds = NDArray[np.unsignedinteger[Any]]
"""Of a text: uint16, or uint32 where the vocabulary has more entries than that holds."""


def _option(default: Any, text: str) -> Any:
    """A field and what `lpa train --help` says of it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyperparameters: all that determines the weights, besides the model's config and the data.

    A step sees `batch_tokens` tokens in sequences of `sequence_length`; the first `short_steps` steps use
    `short_sequence_length` instead, which is cheaper while the model has little use for a long context.
    """

    steps: int = _option(1000, "Steps of the run, those of an earlier start included.")
    batch_tokens: int = _option(8192, "Tokens of a step.")
    sequence_length: int = _option(1024, "Tokens of a sequence, at most the model's context.")
    short_sequence_length: int = _option(256, "Tokens of a sequence in the first --short-steps.")
    short_steps: int = _option(0, "Steps at the beginning with shorter sequences, which are cheaper.")
    learning_rate: float = _option(2e-3, "Peak learning rate of AdamW.")
    muon_learning_rate: float | None = _option(
        None, "Train the matrices of the blocks with Muon at this peak learning rate (default: AdamW for all)."
    )
    final_fraction: float = _option(0.05, "Share of the peak learning rate that is left at the last step.")
    warmup_steps: int = _option(100, "Steps in which the learning rate rises to its peak.")
    weight_decay: float = _option(0.1, "Decoupled weight decay of the matrices of the blocks.")
    clip: float = _option(1.0, "Largest norm of the gradient; a longer one is scaled down.")
    seed: int = _option(0, "Initial weights and the order of the text follow from it.")

    def __post_init__(self) -> None:
        for name in ("sequence_length", "short_sequence_length")[: 2 if self.short_steps else 1]:
            if not 1 <= getattr(self, name) <= self.batch_tokens:
                raise ValueError(
                    f"{name}: {getattr(self, name)} is not between 1 and batch_tokens, {self.batch_tokens}"
                )

    def rate(self, step: int) -> float:
        """The factor on the learning rates at a step: linear warm-up, then cosine decay to `final_fraction`."""
        return rate(step, self.steps, self.warmup_steps, self.final_fraction)


def rate(step: int, steps: int, warmup: int, final: float) -> float:
    """The factor on a learning rate: linear warm-up, then cosine decay to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def write_state(path: Path, state: dict[str, Any]) -> None:
    """What a run goes on from; the file is replaced whole."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@dataclass(frozen=True)
class Progress:
    """A step's `loss` in nats per token, the speed since the last report, and `validation` in bits per byte, if any."""

    step: int
    loss: float
    tokens_per_second: float
    validation: float | None


def read_text(path: Path) -> str:
    """A UTF-8 text file, gzipped if its name ends in .gz."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        return str(file.read())


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer whose entry 0 is the end-of-text token between documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> TokenIds:
    """Token ids of a text, encoded paragraph by paragraph to bound the memory."""
    kind = np.min_scalar_type(max(1 << 8, tokenizer.get_vocab_size() - 1))
    chunks = text.split("\n\n")
    pieces = [chunk + "\n\n" for chunk in chunks[:-1]] + [chunks[-1]]
    ids: list[TokenIds] = []
    for start in range(0, len(pieces), 4096):
        for encoding in tokenizer.encode_batch(pieces[start : start + 4096], add_special_tokens=False):
            ids.append(np.array(encoding.ids, dtype=kind))
    return np.concatenate(ids)


def prepare(data: Path, valid: Path, out: Path, vocab_size: int) -> tuple[Tokenizer, TokenIds, str]:
    """The tokenizer, training tokens and validation text; the first two are kept in `out` for the next start."""
    if not (out / "tokens.npy").exists():
        text = read_text(data)
        tokenizer = train_tokenizer(text, vocab_size)
        tokenizer.save(str(out / "tokenizer.json"))
        np.save(out / "new.npy", encode(tokenizer, text))
        (out / "new.npy").replace(out / "tokens.npy")
    tokens: TokenIds = np.load(out / "tokens.npy", mmap_mode="r")
    return Tokenizer.from_file(str(out / "tokenizer.json")), tokens, read_text(valid)


def check_lengths(config: TrainConfig, num_tokens: int, num_valid_tokens: int) -> None:
    """ValueError if the training text is no longer than a sequence, or the validation text has less than two tokens."""
    longest = max(config.sequence_length, config.short_sequence_length if config.short_steps else 0)
    if num_tokens <= longest:
        raise ValueError(
            f"sequence_length: {longest} is too long for training data of {num_tokens} tokens: give more text, or a "
            f"sequence_length below {num_tokens}"
        )
    if num_valid_tokens < 2:
        raise ValueError(f"valid: the text has {num_valid_tokens} tokens; validation takes two or more")


def initialize(model: LPAForCausalLM, seed: int) -> None:
    """Normal weights: 0.02 for embeddings, 1/sqrt(fan in) for matrices, smaller where a branch joins the stream."""
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
                if ".o_proj." in name or ".down_proj." in name:
                    std *= depth if name.endswith((".up.weight", "_proj.weight")) else 1.0
                parameter.normal_(std=std, generator=generator)


def batch(tokens: TokenIds, step: int, config: TrainConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step, int64 [sequences, T]: windows at random offsets that depend on (seed, step)."""
    length = config.short_sequence_length if step < config.short_steps else config.sequence_length
    starts = np.random.default_rng((config.seed, step)).integers(0, len(tokens) - length, config.batch_tokens // length)
    windows = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":  # from pageable memory the copy would wait until the steps before are done
        windows = windows.pin_memory().to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]


def optimizers(model: LPAForCausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the blocks' matrices and AdamW for the rest; no decay on vectors and embeddings."""
    blocks = [p for p in model.layers.parameters() if p.ndim == 2]
    inside = set(blocks)
    rest = [p for p in model.parameters() if p not in inside]
    groups = [{"params": rest, "weight_decay": 0.0}]
    if config.muon_learning_rate is None:
        groups.append({"params": blocks, "weight_decay": config.weight_decay})
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    ]
    if config.muon_learning_rate is not None:
        found.append(Muon(blocks, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return found


def bits_per_byte(model: LPAForCausalLM, tokens: TokenIds, num_bytes: int, length: int) -> float:
    """-log2 p per UTF-8 byte over disjoint windows; the first token of a window has no context and is not scored."""
    total, scored = 0.0, 0
    device = model.embed_tokens.weight.device
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, length):
            ids = torch.from_numpy(tokens[start : start + length].astype(np.int64)).to(device)
            if len(ids) < 2:
                continue
            logits = model.logits(model(ids[None, :-1])[0])
            total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
            scored += len(ids) - 1
    return total / scored * len(tokens) / num_bytes / math.log(2)


def make_loss(model: LPAForCausalLM, dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Mean cross-entropy of a batch in the arithmetic of inference: weights in `dtype`, residual stream float32."""
    parameters = dict(model.named_parameters())

    def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if dtype == torch.float32:
            hidden, head = model(ids), model.lm_head.weight
        else:  # the embedding table keeps float32: its gradient is a sum over thousands of tokens
            cast = {name: p if "embed" in name else p.to(dtype) for name, p in parameters.items()}
            hidden, head = torch.func.functional_call(model, cast, (ids,)), model.lm_head.weight.to(dtype)
        logits = F.linear(hidden.flatten(0, 1).to(head.dtype), head, model.lm_head.bias).float()
        return F.cross_entropy(logits, targets.flatten())

    return loss


def train(
    model_config: LPAConfig,
    config: TrainConfig,
    tokenizer: Tokenizer,
    tokens: TokenIds,
    valid_text: str,
    out: Path,
    *,
    device: str = "cpu",
    report_every: int = 1,
    validate_every: int = 200,
    checkpoint_every: int = 100,
    compile_loss: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Train until `config.steps` or until `stopping()`, resuming from `out/state.pt` if it is there.

    Yields a Progress every `report_every` steps, and where the model is validated or the state is kept: only there the
    loop waits for a GPU, which is otherwise given the next steps while it computes.

    The float32 weights, optimizer state and step are in `out/state.pt`; at the end (and at every validation) the
    bfloat16 model folder is written to `out/model`. `stopping` is asked after every step; then both are written, the
    model is not validated, and the iterator ends.

    Raises:
        ValueError: as `check_lengths`.
    """
    place = resolve_device(device)
    valid_ids = encode(tokenizer, valid_text)
    num_bytes = len(valid_text.encode())
    check_lengths(config, len(tokens), len(valid_ids))
    model = LPAForCausalLM(model_config)
    initialize(model, config.seed)  # before it is moved: the same weights on every device
    model.to(place)
    opts = optimizers(model, config)
    state, step = out / "state.pt", 0
    if state.exists():
        saved = torch.load(state, map_location=place, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(opts, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        step = saved["step"]
    loss_of = make_loss(model, torch.bfloat16 if has_bfloat16(place) else torch.float32)
    if compile_loss:
        loss_of = torch.compile(loss_of, dynamic=False)
    (out / "train.json").write_text(json.dumps(asdict(config), indent=1) + "\n")

    started, reported = time.perf_counter(), step
    while step < config.steps:
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * config.rate(step)
        loss = loss_of(*batch(tokens, step, config, place))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        last, stopped = step == config.steps, stopping()
        if not last and not stopped and all(step % every for every in (report_every, validate_every, checkpoint_every)):
            continue
        nats = loss.item()
        speed = (step - reported) * config.batch_tokens / (time.perf_counter() - started)
        validation = None
        if stopped and not last:
            save_checkpoint(out / "model", model, tokenizer, torch.bfloat16, tokenizer_files=out)
        elif step % validate_every == 0 or last:
            limit = None if last else 65536
            part = valid_ids[:limit]
            measured = num_bytes * len(part) / len(valid_ids)
            validation = bits_per_byte(model, part, round(measured), config.sequence_length)
            save_checkpoint(out / "model", model, tokenizer, torch.bfloat16, tokenizer_files=out)
        if step % checkpoint_every == 0 or last or stopped:
            written = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in opts],
                "step": step,
            }
            write_state(state, written)
        yield Progress(step, nats, speed, validation)
        if stopped:
            return
        started, reported = time.perf_counter(), step
