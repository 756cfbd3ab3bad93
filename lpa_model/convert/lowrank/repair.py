"""Factors trained towards the dense model that they come from: least squares layer by layer, then distillation.

`refit` moves a text through both models one layer at a time and solves for every B, given A and what the layer before
now gives. `distil` then trains A and B of all layers together on the Kullback-Leibler divergence of the dense model's
distribution over the whole vocabulary. The dense model is needed for neither: of it `distil` reads the hidden states
before the head, which both models share, so a step costs no forward pass of the dense one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpa_model.checkpoint import load_model, load_tokenizer, replace_text, save_checkpoint
from lpa_model.convert.lowrank.calibrate import SINKS, push
from lpa_model.convert.lowrank.convert import Budget, Row, factorise
from lpa_model.folder import weights_hash
from lpa_model.layers import LowRankLinear
from lpa_model.model import LPAForCausalLM
from lpa_model.train.config import rate
from lpa_model.train.state import write_state

LEARNING_RATE = 3e-4
WARMUP = 20
"""Steps in which the learning rate rises."""
FINAL = 0.1
"""Share of the learning rate that is left at the last step."""
ROWS = 256
"""Rows of logits held at a time."""
RIDGE = 1e-2
"""How strongly a refitted B is drawn to the one that it replaces, as a share of its latent's variance."""

REFITTED = 16384
"""Tokens that least squares takes; it has a few hundred unknowns for each output."""


def prepare(
    source: Path,
    work: Path,
    budget: Budget,
    windows: Tensor,
    more: Tensor,
    held_out: Tensor,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
    cuts: Path | None = None,
) -> list[Row]:
    """Factors of the dense folder `source`, refitted, in `work/model`, and beside them all that `distil` needs.

    Factors are cut by `windows`; `distil` trains on these and on `more`, both [windows, T]. What is there already is
    kept: a run that was interrupted goes on. `cuts` is as in `factorise`, whose rows are returned.

    Raises:
        ValueError: `work` is of another start; the message says how they differ.
    """
    facts = {
        "source": weights_hash(source),
        **{name: value for name, value in dataclasses.asdict(budget).items()},
        "text": hashlib.blake2b(windows.numpy().tobytes() + more.numpy().tobytes(), digest_size=8).hexdigest(),
        "calibrated": windows.numel(),
    }
    start = work / "start.json"
    if start.is_file():
        found = json.loads(start.read_text(encoding="utf-8"))
        if other := [f"{name} {found['facts'].get(name)}" for name in facts if found["facts"].get(name) != facts[name]]:
            raise ValueError(f"{work}: is of a start with {', '.join(other)}: finish that one, or remove the folder")
        return [Row(**row) for row in found["rows"]]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rows = factorise(
        source,
        work / "cut",
        budget,
        windows,
        torch.float32,
        more=more,
        states=work / "states.safetensors",
        cuts=cuts,
        progress=lambda done, total: progress("cutting", done, total),
    )
    model, dense = (load_model(folder, torch.float32, torch.device("cpu")) for folder in (work / "cut", source))
    for parameter in model.parameters():  # they are the file's, which is read only
        parameter.data = parameter.data.clone()
    layers = model.config.num_hidden_layers
    count = max(1, REFITTED // windows.shape[1])
    refit(model, dense, windows[:count], lambda done: progress("least squares", done, layers))
    with torch.inference_mode():
        save_file({"states": torch.cat([dense(window[None]) for window in held_out])}, work / "held_out.safetensors")
    save_checkpoint(work / "model", model, load_tokenizer(source), torch.float32, tokenizer_files=source)
    shutil.rmtree(work / "cut")
    written = {"facts": facts, "rows": [dataclasses.asdict(row) for row in rows]}
    replace_text(start, json.dumps(written) + "\n")
    return rows


def repair(
    work: Path,
    folder: Path,
    windows: Tensor,
    held_out: Tensor,
    steps: int,
    dtype: torch.dtype,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """`distil` what `prepare` left in `work`, going on where an earlier call ended; at the end write the model folder
    `folder` and remove `work`."""
    model = load_model(work / "model", torch.float32, torch.device("cpu"))
    states, kept = (load_file(work / f"{name}.safetensors")["states"] for name in ("states", "held_out"))
    step = 0
    for found in distil(model, windows, states, (held_out, kept), steps, work / "state.pt", stopping=stopping):
        step = found.step
        yield found
    if step not in (0, steps):
        return
    new = work / "repaired"
    save_checkpoint(new, model, load_tokenizer(work / "model"), dtype, tokenizer_files=work / "model")
    new.replace(folder)
    shutil.rmtree(work)


class Fit:
    """Sums of one factored projection: its latents z = A x', and what its output ought to be."""

    def __init__(self, layer: LowRankLinear) -> None:
        rank, out = layer.down.out_features, layer.up.out_features
        self.layer = layer
        self.latent: Tensor | None = None
        self.second = torch.zeros(rank, rank, dtype=torch.float64)
        self.cross = torch.zeros(out, rank, dtype=torch.float64)

    def keep(self, latent: Tensor) -> None:
        """latent [windows, T, rank], of which `add` has the wanted outputs."""
        self.latent = latent

    def add(self, wanted: Tensor) -> None:
        """wanted [windows, T, out] of the latents that came last."""
        assert self.latent is not None
        latent, rows = self.latent[:, SINKS:].flatten(0, 1), wanted[:, SINKS:].flatten(0, 1)
        self.second += latent.T @ latent
        self.cross += rows.T @ latent

    def solve(self) -> None:
        """B = (E[y z^T] + ridge B) (E[z z^T] + ridge)^-1; the ridge is relative to each latent's variance."""
        up = self.layer.up.weight
        ridge = RIDGE * self.second.diagonal()
        total = self.second + torch.diag(ridge + 1e-12 * ridge.mean() + 1e-30)
        solved = torch.linalg.solve(total, (self.cross + up.double() * ridge).T).T
        up.copy_(solved.float())


@torch.inference_mode()
def refit(model: LPAForCausalLM, dense: LPAForCausalLM, windows: Tensor, progress: Callable[[int], None]) -> None:
    """Solve for every B of `model` in place, layer by layer, on the text `windows` [windows, T]."""
    hidden = model.embed_tokens(windows).float()
    reference = hidden.clone()
    for number, (block, twin) in enumerate(zip(model.layers, dense.layers, strict=True)):
        pairs = [
            (Fit(module), twin.get_submodule(name))
            for name, module in block.named_modules()
            if isinstance(module, LowRankLinear)
        ]
        if pairs:
            with ExitStack() as stack:
                for fit, original in pairs:
                    stack.enter_context(_hooked(fit.layer.down, fit.keep))
                    stack.enter_context(_hooked(original, fit.add))
                for row in range(len(hidden)):
                    part = slice(row, row + 1)
                    block(hidden[part], model.rotary, None)
                    reference[part] = twin(reference[part], dense.rotary, None)
            for fit, _ in pairs:
                fit.solve()
        else:
            push(twin, dense.rotary, reference)
        push(block, model.rotary, hidden)
        progress(number + 1)


def _hooked(module: nn.Module, take: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    return module.register_forward_hook(lambda _, __, output: take(output))


@dataclass(frozen=True)
class Step:
    """KL of the dense model's distribution and this one's, in nats per token: `loss` of the step's window (None before
    the first step), and `validation` on text held out, if it was measured."""

    step: int
    loss: float | None
    validation: float | None


def distil(
    model: LPAForCausalLM,
    windows: Tensor,
    teacher: Tensor,
    held_out: tuple[Tensor, Tensor],
    steps: int,
    state: Path,
    *,
    validate_every: int = 16,
    checkpoint_every: int = 25,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Train the factors of `model` in place, one window a step, going on from the file `state` if it is there.

    Args:
        windows: token ids int64 [windows, T]; which one a step takes follows from its number alone.
        teacher: the dense model's states before its head, [windows, T, d] float32.
        held_out: such a pair that is not trained on.
        stopping: called after every step; once it is true, the state is written and the iterator ends.

    A new run first yields step 0, the model as it came.
    """
    model.requires_grad_(False)
    for module in (module for module in model.modules() if isinstance(module, LowRankLinear)):
        for side in (module.down, module.up):
            side.weight = nn.Parameter(side.weight.clone())  # what is loaded is the file's, which is read only
    factors = {
        f"{name}.{side}.weight": getattr(module, side).weight
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
        for side in ("down", "up")
    }
    optimizer = torch.optim.AdamW(factors.values(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    step = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        with torch.no_grad():
            for name, parameter in factors.items():
                parameter.copy_(saved["factors"][name])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    else:
        yield Step(0, None, validate(model, *held_out))
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(step, steps, WARMUP, FINAL)
        epoch, at = divmod(step, len(windows))
        index = int(np.random.default_rng((0, epoch)).permutation(len(windows))[at])
        loss = divergence(model, windows[index], teacher[index], train=True)
        nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        last, stopped = step == steps, stopping()
        if step % checkpoint_every == 0 or last or stopped:
            written = {"factors": dict(factors), "optimizer": optimizer.state_dict(), "step": step}
            write_state(state, written)
        validation = None
        if step % validate_every == 0 or last:
            validation = validate(model, *held_out)
        yield Step(step, loss, validation)
        if stopped:
            return


def validate(model: LPAForCausalLM, windows: Tensor, teacher: Tensor) -> float:
    """Mean divergence over held-out windows."""
    with torch.inference_mode():
        found = [divergence(model, ids, states) for ids, states in zip(windows, teacher, strict=True)]
    return sum(found) / len(found)


def divergence(model: LPAForCausalLM, ids: Tensor, teacher: Tensor, train: bool = False) -> float:
    """KL(dense || model) per token of one window, ids [T] and states [T, d]; with `train` gradients are added up.

    Logits are made some rows at a time, and so are their gradients, which are the difference of the distributions.
    """
    hidden = model(ids[None])[0]
    states = hidden.detach().requires_grad_(train)
    total = 0.0
    for start in range(0, len(ids), ROWS):
        rows = slice(start, start + ROWS)
        with torch.no_grad():
            wanted = model.logits(teacher[rows]).log_softmax(-1)
        logits = model.logits(states[rows])
        with torch.no_grad():
            found = logits.log_softmax(-1)
            shares = wanted.exp()
            total += (wanted.sub_(found).mul_(shares)).sum().item() / len(ids)
        if train:
            logits.backward(found.exp_().sub_(shares).div_(len(ids)))
    if train:
        hidden.backward(states.grad)
    return total
