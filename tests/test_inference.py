"""A model prepared for inference computes what it computed before, by the plain forward and through the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpa_model.attention import Attention
from lpa_model.checkpoint import load_model
from lpa_model.config import Architecture
from lpa_model.inference import PackedLinear, PackedSwiGLU, can_pack, prepare_for_inference
from lpa_model.layers import SwiGLU
from lpa_model.model import LPAForCausalLM
from tests.conftest import random_model, tiny_config, write_checkpoint
from tests.test_attention import CASES, LAYOUTS, run

CPU = torch.device("cpu")
IDS = torch.tensor([[(7 * i * i + 3) % 300 for i in range(50)]])


def bfloat16(model: LPAForCausalLM) -> LPAForCausalLM:
    """The model with its weights rounded, as a checkpoint would be read; tables of positions stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def prepared(model: LPAForCausalLM) -> LPAForCausalLM:
    prepare_for_inference(model)
    return model


@pytest.mark.parametrize(("architecture", "changes"), CASES.values(), ids=CASES)
def test_float32_logits_stay(architecture: Architecture, changes: dict[str, Any]) -> None:
    config = tiny_config(architecture, **changes)
    plain, model = random_model(config), prepared(random_model(config))
    expected = plain.logits(plain(IDS))
    torch.testing.assert_close(model.logits(model(IDS)), expected, rtol=0, atol=1e-5)
    for layout in LAYOUTS:  # run compares every row that comes through the cache with the plain forward
        run(model, layout, num_blocks=32, choice=3, seed=1)
    joint = [module.joint_down is not None for module in model.modules() if isinstance(module, Attention)]
    low_rank = [all(config.rank(name, layer) for name in ("q", "k", "v")) for layer in range(2)]
    assert joint == low_rank


@pytest.mark.parametrize(("architecture", "changes"), [*CASES.values(), ("setting2", {"ffn_rank": 6})])
def test_bfloat16_is_as_near_to_the_truth_as_before(architecture: Architecture, changes: dict[str, Any]) -> None:
    config = tiny_config(architecture, **changes)
    plain = bfloat16(random_model(config))
    exact = random_model(config)
    exact.load_state_dict({name: tensor.float() for name, tensor in plain.state_dict().items()})
    truth = exact.logits(exact(IDS))
    before = (plain.logits(plain(IDS)) - truth).square().mean().sqrt()
    model = prepared(plain)
    after = (model.logits(model(IDS)) - truth).square().mean().sqrt()
    assert after < 1.25 * before
    assert any(isinstance(module, nn.Linear) for module in model.modules()) != can_pack(bfloat16(exact))


def test_packed_products_are_those_of_torch_to_the_bit() -> None:
    model = bfloat16(random_model(tiny_config()))
    if not can_pack(model):  # the processor has nothing to pack for: then nothing is packed
        assert not any(isinstance(module, PackedLinear) for module in prepared(model).modules())
        return
    generator = torch.Generator().manual_seed(0)
    for width_in, width_out, bias in ((768, 384, False), (128, 768, True), (96, 4096, False), (33, 17, True)):
        linear = nn.Linear(width_in, width_out, bias=bias).bfloat16().requires_grad_(False)
        packed = PackedLinear(linear)
        for rows in (1, 8, 100):
            x = torch.randn(rows, width_in, generator=generator).bfloat16()
            assert torch.equal(packed(x), F.linear(x, linear.weight, linear.bias))
            wide = torch.randn(rows, width_in + 5, generator=generator).bfloat16()
            assert torch.equal(packed(wide[:, 3:-2]), F.linear(wide[:, 3:-2], linear.weight, linear.bias))


def test_fused_gates_round_less_than_separate_ones() -> None:
    model = bfloat16(random_model(tiny_config(hidden_size=256, intermediate_size=704)))
    packs = can_pack(model)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = next(module for module in model.modules() if isinstance(module, SwiGLU))
    gate, up, down = (layer.weight.double() for layer in (plain.gate_proj, plain.up_proj, plain.down_proj))
    truth = (F.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
    before = (plain(x).double() - truth).square().mean()
    prepare_for_inference(model)
    fused = model.layers[0].ffn
    assert isinstance(fused, PackedSwiGLU) == packs
    assert (fused(x).double() - truth).square().mean() <= before


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_the_mapped_file_is_let_go(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / "m", tiny_config(**changes), dtype=torch.bfloat16)
    model = load_model(folder, torch.bfloat16, CPU)
    mapped = str(folder / "model.safetensors")
    assert mapped in Path("/proc/self/maps").read_text()
    prepare_for_inference(model)
    if can_pack(model):
        assert mapped not in Path("/proc/self/maps").read_text()
    assert model.logits(model(IDS)).isfinite().all()
