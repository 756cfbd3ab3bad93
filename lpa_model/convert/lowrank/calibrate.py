"""A calibration text through a dense model, one layer at a time, and the second moments of what its matrices read.

The hidden states of the whole text are held once, [windows, T, d] in float32; logits never are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lpa_model.config import LPAConfig, Projection
from lpa_model.layers import RotaryEmbedding
from lpa_model.model import LPAForCausalLM, PreNormBlock, module_of

SINKS = 4
"""Positions at the beginning of a window that no moment counts: attention sinks, whose states are huge."""
ROWS = 4096
"""Tokens of one forward pass: the peak of memory beside the hidden states."""
SPARSE = 2, 8
"""One token in so many counts for the input of down_proj, and for the slopes: the widest moments cost most."""
BLOCK = 288
"""Least columns of a product: a moment is symmetric, and a little more than half of it is enough."""
OFFSETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Distances of a query and a key over which rotary positions are averaged."""


class Moment:
    """The second moment E[x x^T] of rows x, summed in float64."""

    def __init__(self, width: int) -> None:
        self.lower = torch.zeros(width, width, dtype=torch.float64)  # above the diagonal some products are left out
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """rows [n, width]."""
        width = rows.shape[1]
        step = max(BLOCK, width // 4)
        for start in range(0, width, step):
            end = min(start + step, width)
            self.lower[start:end, :end] += rows[:, start:end].T @ rows[:, :end]
        self.count += len(rows)

    def trace(self) -> float:
        """Of the sum."""
        return float(self.lower.trace())

    def total(self) -> Tensor:
        """The sum, float64 [width, width]."""
        lower = self.lower.tril(-1)
        return lower + lower.T + self.lower.diagonal().diag()

    def mean(self) -> Tensor:
        """float64 [width, width]."""
        return self.total() / self.count


@dataclass(frozen=True)
class LayerMoments:
    """Of one layer, float64; those that were wanted.

    inputs: E[x x^T] of what a projection reads, under the names in INPUT_OF.
    queries, keys: [heads, dh, dh] of the heads' queries and keys, each turned to the other's position.
    slopes: [f, f] of what an error of the output of gate or up is multiplied by.
    """

    inputs: dict[Projection, Tensor]
    queries: Tensor
    keys: Tensor
    slopes: dict[Projection, Tensor]


INPUT_OF: dict[Projection, Projection] = {
    "q": "q",
    "k": "q",
    "v": "q",
    "o": "o",
    "gate": "gate",
    "up": "gate",
    "down": "down",
}
"""The projection under whose name the moment of a projection's input is kept."""


def embed(model: LPAForCausalLM, windows: Tensor) -> Tensor:
    """Token ids int64 [windows, T] -> float32 [windows, T, d], the residual stream before the first layer."""
    hidden: Tensor = model.embed_tokens(windows).float()
    if model.rotary is None:
        hidden += model.embed_positions.weight[: windows.shape[1]].float()
    return hidden


@torch.inference_mode()
def layers(
    model: LPAForCausalLM,
    hidden: Tensor,
    wanted: Sequence[Projection],
    weighed: Sequence[Projection],
    counted: int,
) -> Iterator[tuple[int, LayerMoments]]:
    """The moments of each layer in order over the first `counted` windows; `hidden` [windows, T, d] is moved on through
    the layers in place.

    `wanted`: projections whose inputs' moments are needed; `weighed`: those whose outputs weigh.py weighs.
    """
    rotary = model.rotary
    assert rotary is not None
    for layer, block in enumerate(model.layers):
        assert isinstance(block, PreNormBlock)
        recorder = Recorder(model.config, block, rotary, wanted, weighed)
        with recorder:
            push(block, rotary, hidden[:counted])
        push(block, rotary, hidden[counted:])
        yield layer, recorder.moments()


class InputMoments:
    """Hooks on the linear layers of a block of any kind that add up the moments of what they read while it runs.

    Attention sinks, whose states are hundreds of times larger, count no more than all other positions together. Without
    them SmolLM2 lost six times as much: every position reads what they hold.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.found: dict[str, Moment] = {}
        self.sinks: dict[str, Moment] = {}

    def __enter__(self) -> InputMoments:
        linears = {name: layer for name, layer in self.block.named_modules() if isinstance(layer, nn.Linear)}
        self.handles = []
        for name, layer in linears.items():
            if (source := input_name(name)) not in self.found:
                moments = Moment(layer.in_features), Moment(layer.in_features)
                self.found[source], self.sinks[source] = moments
                step = SPARSE[0] if source == "ffn.down_proj" else 1
                self.handles.append(layer.register_forward_hook(_adding(*moments, step)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def of(self, name: str) -> Tensor:
        """float64 [in, in] of what a linear layer, named within the block, reads."""
        others, sinks = self.found[input_name(name)], self.sinks[input_name(name)]
        larger = sinks.trace() / max(others.trace(), 1e-30)
        return others.mean() + sinks.total() / others.count / max(1.0, larger)


def input_name(name: str) -> str:
    """The same for all linear layers of a block that read the same numbers: A of q, k and v, and gate's and up's."""
    parent, _, layer = name.removesuffix(".down").partition(".")
    joint = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    return f"{parent}.{joint.get(layer, layer)}"


def _adding(moment: Moment, sinks: Moment, step: int) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    def add(_: nn.Module, args: tuple[Tensor], __: Tensor) -> None:
        moment.add(args[0][:, SINKS::step].flatten(0, 1))
        sinks.add(args[0][:, :SINKS].flatten(0, 1))

    return add


def push(block: nn.Module, rotary: nn.Module | None, hidden: Tensor) -> None:
    """Replace `hidden` [windows, T, d] by a layer's output, some windows at a time."""
    step = max(1, ROWS // hidden.shape[1])
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        hidden[part] = block(hidden[part], rotary, None)


class Recorder:
    """Hooks on a block that add up moments while it runs."""

    def __init__(
        self,
        config: LPAConfig,
        block: PreNormBlock,
        rotary: RotaryEmbedding,
        wanted: Sequence[Projection],
        weighed: Sequence[Projection],
    ) -> None:
        self.config, self.block, self.rotary = config, block, rotary
        self.inputs = {name: Moment(config.projection_sizes(name)[0]) for name in {INPUT_OF[name] for name in wanted}}
        self.queries = [Moment(config.head_size) for _ in range(config.num_attention_heads * ("k" in weighed))]
        self.keys = [Moment(config.head_size) for _ in range(config.kv_heads * ("q" in weighed))]
        slopes: tuple[Projection, ...] = ("gate", "up")
        self.slopes = {name: Moment(config.intermediate_size) for name in slopes if name in weighed}
        self.gate: Tensor | None = None

    def __enter__(self) -> None:
        attention, ffn = self.block.attention, self.block.ffn
        hooks = {
            attention.q_proj: self._queries,
            attention.k_proj: self._keys,
            attention.o_proj: self._output,
            ffn.gate_proj: self._gate,
            ffn.up_proj: self._up,
            ffn.down_proj: self._down,
        }
        self.handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _queries(self, _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self._input("q", args[0])
        self._heads(self.queries, output, self.block.attention.q_norm)

    def _keys(self, _: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        self._heads(self.keys, output, self.block.attention.k_norm)

    def _output(self, _: nn.Module, args: tuple[Tensor], __: Tensor) -> None:
        self._input("o", args[0])

    def _gate(self, _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self._input("gate", args[0])
        self.gate = output[:, SINKS :: SPARSE[1]].flatten(0, 1) if self.slopes else None

    def _up(self, _: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        """h = silu(g) u: an error of u is multiplied by silu(g), one of g by u silu'(g)."""
        if (gate := self.gate) is None:
            return
        up, sigmoid = output[:, SINKS :: SPARSE[1]].flatten(0, 1), gate.sigmoid()
        if "up" in self.slopes:
            self.slopes["up"].add(gate * sigmoid)
        if "gate" in self.slopes:
            self.slopes["gate"].add(up * (sigmoid * (1 + gate * (1 - sigmoid))))

    def _down(self, _: nn.Module, args: tuple[Tensor], __: Tensor) -> None:
        self._input("down", args[0])

    def _input(self, name: Projection, rows: Tensor) -> None:
        if name in self.inputs:
            self.inputs[name].add(rows[:, SINKS :: SPARSE[0] if name == "down" else 1].flatten(0, 1))

    def _heads(self, moments: list[Moment], output: Tensor, norm: nn.Module | None) -> None:
        for head, moment in enumerate(moments):
            rows = output[:, SINKS:].unflatten(-1, (-1, self.config.head_size))[..., head, :].flatten(0, 1)
            moment.add(rows if norm is None else norm(rows))

    def moments(self) -> LayerMoments:
        """What has been added up."""

        def heads(moments: list[Moment], sign: int) -> Tensor:
            return torch.stack([turned(self.rotary, moment.mean(), sign) for moment in moments] or [torch.empty(0)])

        return LayerMoments(
            inputs={name: moment.mean() for name, moment in self.inputs.items()},
            queries=heads(self.queries, 1),
            keys=heads(self.keys, -1),
            slopes={name: moment.mean() for name, moment in self.slopes.items()},
        )


def projection_of(block: nn.Module, name: Projection) -> nn.Module:
    """A projection of a block by its name in a config."""
    return block.get_submodule(module_of(name))


def turned(rotary: RotaryEmbedding, moment: Tensor, sign: int) -> Tensor:
    """The mean of R m R^T over the rotations R of OFFSETS, forwards (sign 1) or backwards (-1); moment m [dh, dh]."""
    offsets = [offset for offset in OFFSETS if offset < len(rotary.cos)]
    total = torch.zeros_like(moment)
    for offset in offsets:
        cos, sin = torch.diag(rotary.cos[offset].double()), sign * torch.diag(rotary.sin[offset].double())
        rotation = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
        total += rotation @ moment @ rotation.T
    return total / len(offsets)
