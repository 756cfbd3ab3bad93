"""Rounding that makes up for itself: against the formula column by column, never worse than to the nearest, and a
whole model rounded by a text."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lpa_model.backends.cpu.plan import _alike
from lpa_model.checkpoint import held_otherwise, load_model, save_checkpoint, stored_weights
from lpa_model.config import Architecture
from lpa_model.convert import compensate
from lpa_model.convert import quantize as quantize_module
from lpa_model.convert.compensate import DAMPING, compensated, output_errors, to_nearest
from lpa_model.convert.lowrank.calibrate import SINKS, InputMoments, embed, push
from lpa_model.convert.quantize import SHARE_IN_8_BITS, quantize_folder
from lpa_model.quantization import GROUP, int4_scales, quantize
from tests.test_cli import assert_one_line, lpa, succeed
from tests.test_quantize import check_served
from tests.tiny import CORPUS, byte_tokenizer, random_model, tiny_config, write_checkpoint

CPU = torch.device("cpu")
CASES: dict[str, Any] = {
    "setting1": {"architecture": "setting1", "ffn_rank": 6},
    "setting2": {"attention_bias": True},
    "dense": {"attention_rank": None, "num_key_value_heads": 2},
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment_of(seed: int, width: int, rows: int) -> Tensor:
    """Of inputs that go together, and of which some are far larger than others."""
    x = (normal(seed, rows, width) * torch.logspace(0, -2, width)) @ normal(seed + 1, width, width)
    return (x.T @ x / rows).double()


def column_by_column(weight: Tensor, moment: Tensor) -> Tensor:
    """Round a column, and move all columns behind it to where the error is least; each time with the inverse of what is
    left of the moment."""
    left = weight.double().clone()
    width = left.shape[1]
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(width).double()
    rounded, scale = torch.zeros_like(left), torch.empty(0)
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(width)]
    for j in range(width):
        if j % GROUP == 0:
            counts = torch.stack([1 / inverses[k][0, 0] for k in range(j, j + GROUP)]).float()
            scale = int4_scales(left[:, None, j : j + GROUP].float(), counts[None])[:, 0, 0].double()
        rounded[:, j] = (left[:, j] / scale).round().clamp(-8, 7) * scale
        off = left[:, j] - rounded[:, j]
        left[:, j:] -= torch.outer(off, inverses[j][0] / inverses[j][0, 0])
        assert torch.allclose(left[:, j], rounded[:, j])
    return rounded


@pytest.mark.parametrize("width", [32, 96])
def test_the_rounded_columns_are_those_of_the_slow_formula(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate, "SWEEPS", 0)
    weight, moment = normal(1, 7, width), moment_of(2, width, 300)
    expected = column_by_column(weight, moment)
    found = compensate._compensated(weight, moment)
    torch.testing.assert_close(found.dequantized().double(), expected, rtol=0, atol=1e-6)
    off = weight.double() - expected
    errors, nearest = (off @ moment * off).sum(1), to_nearest(weight, moment, 4).errors
    assert errors.sum() < 0.6 * nearest.sum()
    torch.testing.assert_close(compensated(weight, moment).errors, torch.minimum(errors, nearest))


@given(
    seed=st.integers(0, 1000),
    outputs=st.integers(1, 6),
    width=st.integers(1, 80),
    rows=st.sampled_from((1, 3, 200)),
    size=st.sampled_from((0.0, 1e-12, 1.0, 1e6)),
)
def test_no_output_is_worse_than_rounded_to_the_nearest(
    seed: int, outputs: int, width: int, rows: int, size: float
) -> None:
    weight, moment = normal(seed, outputs, width) ** 3, moment_of(seed, width, rows) * size
    found = compensated(weight, moment)
    nearest = quantize(weight, 4).dequantized()[:, :width].double()
    off = weight.double() - nearest
    assert (found.errors <= (off @ moment * off).sum(1) * (1 + 1e-9) + 1e-30).all()
    torch.testing.assert_close(found.errors, output_errors(weight, moment, found.weight))
    codes, scales = found.weight.codes, found.weight.scales
    assert codes.shape == (outputs, -(-width // GROUP) * GROUP) and scales.shape == (outputs, codes.shape[1] // GROUP)
    assert scales.isfinite().all() and (codes >= -8).all() and (codes <= 7).all()


def test_scales_and_codes_are_better_after_each_turn() -> None:
    weight, moment = normal(5, 9, 96).double(), moment_of(6, 96, 200)
    found = quantize(weight, 4)
    errors = [output_errors(weight, moment, found)]
    for _ in range(3):
        for change in (compensate._with_scales, compensate._with_codes):
            found = change(weight @ moment, moment, found)
            errors.append(output_errors(weight, moment, found))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-9)).all()
    assert errors[-1].sum() < 0.5 * errors[0].sum()


@pytest.mark.parametrize("weighted", [False, True])
def test_scales_are_near_the_best_of_all(weighted: bool) -> None:
    groups = normal(3, 40, 1, GROUP)
    counts = normal(4, 1, GROUP).abs() if weighted else torch.ones(1, GROUP)
    scales = int4_scales(groups, counts if weighted else None).float()

    def error(scale: Tensor) -> Tensor:
        return ((groups - (groups / scale).round().clamp(-8, 7) * scale).square() * counts).sum(2)

    peak = groups.abs().amax(2, keepdim=True)
    tried = torch.stack([error(sign * peak / step) for sign in (1, -1) for step in torch.linspace(3.5, 12, 400)])
    best = tried.amin(0)
    assert (error(scales) <= 1.25 * best).all()
    assert error(scales).sum() <= 1.03 * best.sum()
    assert error(scales).sum() < 0.95 * torch.minimum(error(peak / 7), error(-peak / 8)).sum()


def test_moments_that_are_not_finite_are_refused() -> None:
    moment = moment_of(1, 32, 40)
    moment[3, 4] = math.nan
    with pytest.raises(ValueError, match="second moment of the inputs has numbers that are not finite"):
        compensated(normal(1, 4, 32), moment)


def second_moment(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def windows_of(count: int, length: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("case", CASES)
def test_moments_are_those_of_what_each_layer_reads(case: str) -> None:
    model, windows = random_model(tiny_config(**CASES[case])), windows_of(5, 40)
    read: dict[str, tuple[Tensor, Tensor]] = {}  # [windows, T, in] of the first positions and of others
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"
    }
    for name, layer in layers.items():
        step = 2 if name.removesuffix(".down").endswith("ffn.down_proj") else 1
        layer.register_forward_hook(
            lambda _, args, __, name=name, step=step: read.update({name: (args[0][:, :SINKS], args[0][:, SINKS::step])})
        )
    with torch.inference_mode():
        model(windows)
        wanted = {}
        for name, parts in read.items():
            wanted[name] = second_moment(torch.cat([rows.flatten(0, 1) for rows in parts]).double())
            wanted[name] *= sum(len(rows.flatten(0, 1)) for rows in parts) / len(parts[1].flatten(0, 1))
        hidden = embed(model, windows)
        for number, block in enumerate(model.layers):
            with InputMoments(block) as moments:
                push(block, model.rotary, hidden)
            for place in [name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]:
                found = moments.of(place)
                expected = wanted.pop(f"layers.{number}.{place}")
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.diagonal().mean()))
    assert not wanted


def test_a_state_hundreds_of_times_larger_counts_as_all_others() -> None:
    block = nn.Sequential(nn.Linear(4, 2))
    rows = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    rows[:, 0] = torch.tensor([300.0, 0, 0, -400])
    with InputMoments(block) as moments:
        block(rows)
    found, others = moments.of("0"), second_moment(rows[:, SINKS:].flatten(0, 1).double())
    assert float(found.trace()) == pytest.approx(2 * float(others.trace()))
    direction = torch.tensor([0.6, 0, 0, -0.8], dtype=torch.float64)
    assert float(direction @ (found - others) @ direction) == pytest.approx(float(others.trace()), rel=1e-3)


def divergence(model: Any, other: Any, windows: Tensor) -> float:
    with torch.inference_mode():
        a, b = (m.logits(m(windows)).double().log_softmax(-1) for m in (model, other))
        return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("case", CASES)
def test_a_text_brings_a_model_nearer_and_says_how_near(tmp_path: Path, case: str) -> None:
    source = write_checkpoint(tmp_path / "m", tiny_config(**CASES[case]))
    windows, held_out = windows_of(40), windows_of(50)[40:]
    done: list[tuple[int, int]] = []
    matrices = quantize_folder(source, tmp_path / "q", "int4", windows, lambda *at: done.append(at))
    quantize_folder(source, tmp_path / "nearest", "int4")
    exact, found, nearest = (load_model(tmp_path / name, torch.float32, CPU) for name in ("m", "q", "nearest"))
    near, far = (divergence(exact, model, held_out) for model in (found, nearest))
    assert near < 0.8 * far
    layers = [matrix for matrix in matrices if matrix.name != "lm_head"]
    estimated = sum(matrix.nats or 0.0 for matrix in layers)
    assert 0.4 * near < estimated < 2.5 * near
    assert done[-1] == (len(exact.layers), len(exact.layers))
    eight = {matrix.name for matrix in layers if matrix.weights == "int8"}
    assert held_otherwise(tmp_path / "q") == ({"int8": sorted(eight)} if eight else {})
    assert stored_weights(tmp_path / "q") == "int4"
    padded = {name: layer.codes.numel() for name, layer in found.named_modules() if hasattr(layer, "codes")}
    assert sum(padded[name] for name in eight) <= SHARE_IN_8_BITS * sum(padded[matrix.name] for matrix in layers)


def test_a_served_model_of_both_is_the_plain_one(
    tmp_path: Path, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads the same numbers has the same bits, and what is cached as a latent keeps its codes."""
    monkeypatch.setattr(quantize_module, "NATS", 0.0)
    source = write_checkpoint(tmp_path / "m", tiny_config(architecture, num_key_value_heads=None))
    quantize_folder(source, tmp_path / "q", "int4", windows_of(20))
    names = held_otherwise(tmp_path / "q")["int8"]
    joint = {f"layers.{layer}.attention.{name}_proj.down" for layer in (0, 1) for name in "qkv"}
    assert names and all(len(joint & set(names) & of_layer) in (0, 3) for of_layer in _by_layer(joint))
    check_served(tmp_path / "q", load_model(tmp_path / "q", torch.float32, CPU))


def _by_layer(names: set[str]) -> list[set[str]]:
    return [{name for name in names if name.startswith(f"layers.{layer}.")} for layer in (0, 1)]


def test_codes_of_4_bits_are_widened_beside_those_of_8() -> None:
    few, many = quantize(normal(1, 32, 64), 4), quantize(normal(2, 32, 64), 8)
    found = _alike([few, many])
    assert [weight.bits for weight in found] == [8, 8]
    assert all(torch.equal(a.dequantized(), b.dequantized()) for a, b in zip(found, (few, many), strict=True))
    assert [weight.dtype for weight in _alike([few, normal(3, 32, 64).bfloat16()])] == [torch.bfloat16] * 2


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "NATS", 0.0)
    source, folder, text = write_checkpoint(tmp_path / "m", tiny_config()), tmp_path / "q", tmp_path / "text"
    short = tmp_path / "short"
    short.write_text("Too short.", encoding="utf-8")
    text.write_text(CORPUS * 20, encoding="utf-8")
    said = succeed("quantize", source, folder, "--weights", "int4", "--calibrate", text, "--calibrate-tokens", 2048)
    assert "calibrated on 2,048 tokens" in said and "bits for each weight of the layers" in said
    assert "ffn.down_proj" in said and not list(tmp_path.glob(".*"))
    eight, listed = held_otherwise(folder)["int8"], succeed("info", folder)
    assert eight and all(f"{name.split('.', 2)[2]}: " in listed for name in eight)
    for options, message in (
        (("--calibrate", tmp_path / "none"), "none: No such file or directory"),
        (("--calibrate", short), "calibrate: the text has no two windows of"),
        (("--calibrate", text, "--weights", "int8"), "calibrate: is for --weights int4"),
        (("--calibrate", text, "--calibrate-tokens", 0), "calibrate_tokens: 0 takes no text"),
    ):
        given = options if "--weights" in options else (*options, "--weights", "int4")
        assert_one_line(lpa("quantize", source, tmp_path / "not", *given), message)
        assert not (tmp_path / "not").exists()


def test_a_model_that_overflows_on_the_text_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    model.layers[1].ffn.up_proj.weight.data.fill_(3e38)
    save_checkpoint(tmp_path / "m", model, byte_tokenizer(), torch.float32)
    with pytest.raises(ValueError, match=r"layers\.1\.ffn\.down_proj: the second moment of the inputs has numbers"):
        quantize_folder(tmp_path / "m", tmp_path / "q", "int4", windows_of(4))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
