"""The plain forward against one written out here in float64, and the types of streams and logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lpa_model.config import Architecture, LPAConfig
from lpa_model.model import LPAForCausalLM, without_weights
from tests.tiny import random_model, tiny_config

PER_LAYER = {"q": [8, None], "k": [None, 6], "v": 5, "o": [3, 9]}
LINEAR = {"rope_type": "linear", "factor": 2.0}
CASES: list[tuple[Architecture, dict[str, Any]]] = [
    ("setting1", {}),
    ("setting1", {"attention_rank": None, "ffn_rank": 7}),
    ("setting1", {"attention_rank": PER_LAYER, "num_key_value_heads": 2, "head_dim": 6, "lm_head_bias": True}),
    ("setting1", {"tie_word_embeddings": True, "norm_eps": 0.1}),
    ("setting1", {"ffn_rank": {"up": [7, None], "down": [None, 5]}}),
    ("setting2", {}),
    ("setting2", {"attention_rank": None, "ffn_rank": 7, "rope_theta": 50.0}),
    ("setting2", {"attention_rank": PER_LAYER, "num_key_value_heads": 2, "head_dim": 6, "lm_head_bias": True}),
    ("setting2", {"attention_bias": True, "num_key_value_heads": 1, "rope_scaling": LINEAR}),
    ("setting2", {"attention_bias": True, "attention_rank": None, "tie_word_embeddings": True, "norm_eps": 0.1}),
    ("setting2", {"ffn_rank": {"gate": None, "up": [7, 9], "down": [None, 5]}}),
    ("setting2", {"qk_norm": True, "num_key_value_heads": 2, "norm_eps": 0.1}),
    ("setting2", {"qk_norm": True, "attention_rank": None, "attention_bias": True, "head_dim": 6}),
]


class Naive:
    """The model's formulas over its named parameters: one sequence, one head and one query at a time."""

    def __init__(self, model: LPAForCausalLM) -> None:
        self.config = model.config
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def logits(self, ids: list[int]) -> Tensor:
        """[T, vocab] in float64."""
        config, weights = self.config, self.weights
        one = config.architecture == "setting1"
        x = weights["embed_tokens.weight"][ids]
        if one:
            x = x + weights["embed_positions.weight"][: len(ids)]
        for layer in range(config.num_hidden_layers):
            at = f"layers.{layer}."
            for norm, branch in (("attention_norm", self.attention), ("ffn_norm", self.ffn)):
                x = x + (self.norm(at + norm, branch(at, x)) if one else branch(at, self.norm(at + norm, x)))
        if not one:
            x = self.norm("norm", x)
        head = weights["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
        return x @ head.T + weights.get("lm_head.bias", torch.zeros(1))

    def linear(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.down.weight" in self.weights:
            return self.linear(f"{name}.up", self.linear(f"{name}.down", x))
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", torch.zeros(1))

    def norm(self, name: str, x: Tensor) -> Tensor:
        eps = self.config.norm_eps
        if self.config.architecture == "setting1":
            x = x - x.mean(-1, keepdim=True)
        x = x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * self.weights[f"{name}.weight"]
        return x + self.weights.get(f"{name}.bias", torch.zeros(1))

    def ffn(self, at: str, x: Tensor) -> Tensor:
        up = self.linear(at + "ffn.up_proj", x)
        if self.config.architecture == "setting1":
            return self.linear(at + "ffn.down_proj", up.clamp(min=0))
        gate = self.linear(at + "ffn.gate_proj", x)
        return self.linear(at + "ffn.down_proj", gate * gate.sigmoid() * up)

    def turned(self, x: Tensor) -> Tensor:
        """x [T, dh] of one head."""
        if self.config.architecture == "setting1":
            return x
        half = x.shape[1] // 2
        factor = self.config.rope_scaling["factor"] if self.config.rope_scaling else 1.0
        rates = torch.tensor([self.config.rope_theta ** (-i / half) / factor for i in range(half)]).double()
        angles = torch.arange(len(x)).double()[:, None] * rates
        a, b = x[:, :half], x[:, half:]
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), 1)

    def attention(self, at: str, x: Tensor) -> Tensor:
        width, heads = self.config.head_size, self.config.num_attention_heads
        q, k, v = (self.linear(f"{at}attention.{name}_proj", x) for name in "qkv")
        outputs = []
        for head in range(heads):
            shared = head // (heads // self.config.kv_heads) * width
            query, key = q[:, head * width : (head + 1) * width], k[:, shared : shared + width]
            if self.config.qk_norm:
                query, key = self.norm(f"{at}attention.q_norm", query), self.norm(f"{at}attention.k_norm", key)
            query, key, value = self.turned(query), self.turned(key), v[:, shared : shared + width]
            rows = [(key[: t + 1] @ query[t] / math.sqrt(width)).softmax(0) @ value[: t + 1] for t in range(len(x))]
            outputs.append(torch.stack(rows))
        return self.linear(f"{at}attention.o_proj", torch.cat(outputs, 1))


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_plain_forward_equals_the_formulas(architecture: Architecture, changes: dict[str, Any]) -> None:
    model = random_model(tiny_config(architecture, **changes))
    ids = torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    found = model.logits(model(ids))
    assert found.std() > 0.5
    for row in range(2):
        expected = Naive(model).logits(ids[row].tolist())
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-4)


def bfloat16_model(config: LPAConfig) -> LPAForCausalLM:
    model = random_model(config).to(torch.bfloat16)
    if model.rotary is not None:  # the tables stay float32, as after loading
        model.rotary.build(config, torch.device("cpu"))
    return model


def bfloat16_run(config: LPAConfig) -> tuple[list[torch.dtype], Tensor, LPAForCausalLM]:
    """(dtype of the stream after every block, logits of four tokens, the model)."""
    model = bfloat16_model(config)
    streams: list[torch.dtype] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: streams.append(output.dtype))
    hidden = model(torch.tensor([[5, 6, 7, 8]]))[0]
    return streams, model.logits(hidden), model


def test_stream_and_logits_are_float32_with_bfloat16_weights(architecture: Architecture) -> None:
    config = tiny_config(architecture, hidden_size=16, num_attention_heads=2, attention_rank=4, intermediate_size=8)
    streams, logits, model = bfloat16_run(config)
    assert streams == [torch.float32] * 2
    assert logits.dtype == torch.float32
    expected = Naive(model).logits([5, 6, 7, 8])
    assert (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 0.1


def test_a_small_branch_is_not_lost_in_a_large_stream() -> None:
    """In bfloat16, 256 + 0.5 is 256; the float32 stream keeps it."""
    config = tiny_config(hidden_size=16, num_attention_heads=2, attention_rank=4, intermediate_size=8)
    model = bfloat16_model(config)
    model.embed_tokens.weight.fill_(256.0)
    for layer in model.layers:  # every branch adds little
        layer.attention.o_proj.up.weight.mul_(1e-3)
        layer.ffn.down_proj.weight.mul_(1e-3)
    outputs: list[Tensor] = []
    model.layers[-1].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model(torch.tensor([[1, 2]]))
    moved = outputs[0] - 256.0
    assert 0 < moved.abs().max() < 0.5


def test_tied_models_share_one_matrix() -> None:
    model = LPAForCausalLM(tiny_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_model_without_weights_draws_no_numbers(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw them on the device `meta` imports half of torch's compiler, for seconds."""
    for draw in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, draw, lambda *_, **__: pytest.fail("numbers were drawn"))
    model = without_weights(tiny_config(architecture))
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(pytest.fail.Exception, match="numbers were drawn"):
        LPAForCausalLM(tiny_config(architecture))
