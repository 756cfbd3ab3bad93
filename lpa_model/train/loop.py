"""The plain loop behind `lpa train`.

AdamW (optionally Muon for the matrices of the blocks), linear warm-up and cosine decay, clipping, checkpoints and
exact resume: the batch of a step follows from (seed, step) alone, so a run that was interrupted and resumed ends
with the same weights as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from lpa_model.backends.features import has_bfloat16, resolve_device
from lpa_model.checkpoint import replace_text, save_checkpoint
from lpa_model.config import LPAConfig
from lpa_model.init import initialize
from lpa_model.model import LPAForCausalLM
from lpa_model.train.config import TrainConfig
from lpa_model.train.data import batch, check_lengths
from lpa_model.train.loss import accumulate, bits_per_byte, make_loss
from lpa_model.train.metrics import Metrics, Row
from lpa_model.train.optimizer import optimizers
from lpa_model.train.state import STATE, read_state, write_state
from lpa_model.train.tokenizer import TokenIds
from lpa_model.train.tokens import Tokens

METRICS = "metrics.csv"
VALIDATED = 65536
"""Tokens that a validation on the way takes; the last one takes the whole text."""


@dataclass(frozen=True)
class Progress:
    """A step's `loss` in nats per token, the speed since the last report, and `validation` in bits per byte, if any."""

    step: int
    loss: float
    tokens_per_second: float
    validation: float | None


def train(
    model_config: LPAConfig,
    config: TrainConfig,
    tokenizer: Tokenizer,
    tokens: TokenIds,
    valid: Tokens,
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
    bfloat16 model folder is written to `out/model`. `out/metrics.csv` has a line for every step that `report_every`
    divides or that was validated. `stopping` is called after every step; once it is true, state and model are
    written, and the iterator ends.

    Raises:
        ValueError: as `check_lengths`; what is in `out` is of another model or of another run that still writes; a
            loss, gradient or weight is not finite: what was written before stays.
    """
    for name, every in (
        ("report_every", report_every),
        ("validate_every", validate_every),
        ("checkpoint_every", checkpoint_every),
    ):
        if every < 1:
            raise ValueError(f"{name}: {every} is less than 1")
    place = resolve_device(device)
    check_lengths(config, len(tokens), len(valid.ids))
    model = LPAForCausalLM(model_config)
    initialize(model, config.seed)  # before it is moved: the same weights on every device
    model.to(place)
    opts = optimizers(model, config)
    step, written = 0, None
    if (saved := read_state(out / STATE, place)) is not None:
        try:
            model.load_state_dict(saved["model"])
            for optimizer, values in zip(opts, saved["optimizers"], strict=True):
                given = [dict(group) for group in optimizer.param_groups]
                optimizer.load_state_dict(values)
                for group, now in zip(optimizer.param_groups, given, strict=True):
                    group |= {name: now[name] for name in ("initial_lr", "weight_decay")}  # not the earlier start's
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{out / STATE}: is of a model of other sizes or of another optimizer: give another --out"
            ) from error
        step, written = saved["step"], saved.get("metrics")
    if step >= config.steps:
        return
    loss_of = make_loss(model, torch.bfloat16 if has_bfloat16(place) else torch.float32)
    if compile_loss:
        loss_of = torch.compile(loss_of, dynamic=False)
    kept = f"the state of step {step} is kept" if step else "no state was written yet"
    with closing(Metrics(out / METRICS, written)) as metrics:
        replace_text(out / "train.json", json.dumps(asdict(config), indent=1) + "\n")
        started, reported = time.perf_counter(), step
        while step < config.steps:
            for optimizer in opts:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * config.rate(step)
            loss = accumulate(loss_of, *batch(tokens, step, config, place), config.gradient_accumulation)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for optimizer in opts:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            last, stopped = step == config.steps, stopping()
            reports, validates = step % report_every == 0 or last, step % validate_every == 0 or last
            keeps = step % checkpoint_every == 0 or last or stopped
            if not (reports or validates or keeps):
                continue
            nats, length = loss.item(), norm.item()
            speed = (config.tokens_before(step) - config.tokens_before(reported)) / (time.perf_counter() - started)
            for what, fine in (
                (f"loss {nats}", math.isfinite(nats)),
                (f"norm of the gradient {length}", math.isfinite(length)),
                ("a weight is not finite", not (validates or keeps) or _all_finite(model)),
            ):
                if not fine:
                    raise ValueError(f"step {step}: {what}: training has diverged; {kept}; try a lower learning_rate")
            bits = None
            if validates:
                part = valid.ids[: None if last else VALIDATED]
                measured = valid.num_bytes * len(part) / len(valid.ids)
                bits = bits_per_byte(model, part, measured, config.sequence_length)
            if validates or stopped:
                save_checkpoint(out / "model", model, tokenizer, torch.bfloat16, tokenizer_files=out)
            if reports or validates:
                metrics.add(
                    Row(
                        step=step,
                        tokens=config.tokens_before(step),
                        loss=nats,
                        learning_rate=config.learning_rate * config.rate(step - 1),
                        grad_norm=length,
                        validation_loss=None if bits is None else bits * valid.nats_per_bit,
                        bits_per_byte=bits,
                        tokens_per_second=speed,
                    )
                )
            if keeps:
                states = [optimizer.state_dict() for optimizer in opts]
                write_state(
                    out / STATE,
                    {"model": model.state_dict(), "optimizers": states, "step": step, "metrics": metrics.length()},
                )
                kept = f"the state of step {step} is kept"
            yield Progress(step, nats, speed, bits)
            if stopped:
                return
            started, reported = time.perf_counter(), step


def _all_finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())
