"""Codes and scales of weights: how near they are, that nothing changes the second time, and layers made of them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lpa_model.quantization import (
    GROUP,
    Bits,
    QuantizedLinear,
    WeightType,
    bytes_of,
    hold_weights,
    quantize,
    quantized_input,
    round_weights,
)
from tests.tiny import random_model, tiny_config

each_bits = pytest.mark.parametrize("bits", get_args(Bits))


def weights(seed: int, outputs: int, width: int, size: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, width, generator=generator) ** 3 * size


@each_bits
@given(
    seed=st.integers(0, 1000),
    outputs=st.integers(1, 9),
    width=st.integers(1, 100),
    size=st.sampled_from((1e-20, 1e-3, 1.0, 1e4)),
)
def test_every_number_is_within_half_a_step_and_the_second_time_changes_next_to_nothing(
    bits: Bits, seed: int, outputs: int, width: int, size: float
) -> None:
    weight = weights(seed, outputs, width, size)
    found = quantize(weight, bits)
    plain = found.dequantized()
    assert found.codes.shape == plain.shape == (outputs, -(-width // GROUP) * GROUP)
    assert (plain[:, width:] == 0).all()
    steps = found.scales.float().abs().repeat_interleave(GROUP, 1)[:, :width]
    error = (plain[:, :width] - weight).abs()
    if bits == 8:
        assert (error <= steps * 0.501).all()
        assert (found.codes.abs() <= 127).all()
    else:  # the largest number of a group may be further away where all others are nearer
        largest = torch.nn.functional.pad(weight, (0, -width % GROUP)).unflatten(1, (-1, GROUP)).norm(dim=2)
        assert (error.square().sum() <= (largest * 0.25).square().sum()).all()
        assert (found.codes >= -8).all() and (found.codes <= 7).all()
    again = quantize(plain, bits).dequantized()
    if bits == 8:
        assert torch.equal(again, plain)
    else:  # the same, or codes in the same proportions of which the scale is rounded otherwise
        assert ((again - plain).abs() <= plain.abs() / 128).all()


@each_bits
def test_zeros_stay_zeros(bits: Bits) -> None:
    assert (quantize(torch.zeros(3, 40), bits).dequantized() == 0).all()


def test_inputs_are_within_half_a_step_of_their_groups() -> None:
    x = weights(3, 7, 70, 2.0)
    found = quantized_input(x)
    for start in range(0, 70, GROUP):
        part = x[:, start : start + GROUP]
        step = part.abs().amax(1, keepdim=True) / 127
        assert ((found[:, start : start + GROUP] - part).abs() <= 0.501 * step).all()
    assert quantized_input(x.bfloat16()).dtype is torch.bfloat16
    assert (quantized_input(torch.full((1, 32), 1e-38)) == 0).all()


@pytest.mark.parametrize("kind", get_args(WeightType))
def test_a_model_holds_its_weights_in_a_type(kind: WeightType) -> None:
    model, plain = random_model(tiny_config()), random_model(tiny_config())
    if hold_weights(model, kind) is torch.bfloat16:
        round_weights(model)
    layers = dict(model.named_modules())
    assert isinstance(layers["lm_head"], nn.Linear)
    for name, layer in plain.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        held = layers[name]
        assert isinstance(held, QuantizedLinear) is (kind in ("int8", "int4"))
        if kind in ("int8", "int4"):
            bits: Bits = 8 if kind == "int8" or name == "lm_head" else 4
            expected = quantize(layer.weight, bits).dequantized()[:, : layer.in_features]
        else:
            expected = layer.weight if kind == "float32" else layer.weight.bfloat16().float()
        assert torch.equal(held.weight, expected), name
    with torch.inference_mode():
        ids = torch.arange(40).unsqueeze(0)
        exact, found = (m.logits(m(ids)).log_softmax(-1) for m in (plain, model))
    difference = (exact - found).abs().mean()
    assert difference == 0 if kind == "float32" else 0 < difference < (0.5 if kind == "int4" else 0.05)


def test_bytes_of_a_weight() -> None:
    assert [bytes_of(kind) for kind in get_args(WeightType)] == [4, 2, 1.0625, 0.5625]
