"""Which backend computes what: every preset, dtype, layout and block size on every kind of processor."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lpa_model.backends import features, select
from lpa_model.config import PRESETS, CacheLayout
from lpa_model.quantization import WeightType
from tests.tiny import random_model, tiny_config

# column -> options
COLUMNS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, int8 weights": {"dtype": "bfloat16", "weights": "int8"},
    "bfloat16, int8 cache": {"dtype": "bfloat16", "cache_dtype": "int8"},
}
# processor's best instruction set -> backend by column
EXPECTED = {
    "amx": (
        "cpu (amx, float32)",
        "cpu (amx, bfloat16)",
        "cpu (amx, bfloat16, int8 weights)",
        "cpu (amx, bfloat16, int8 cache)",
    ),
    "avx512bf16": (
        "cpu (avx512bf16, float32)",
        "cpu (avx512bf16, bfloat16)",
        "cpu (avx512bf16, bfloat16, int8 weights)",
        "cpu (avx512bf16, bfloat16, int8 cache)",
    ),
    "avx512": (
        "cpu (avx512, float32)",
        "cpu (avx512, bfloat16)",
        "cpu (avx512, bfloat16, int8 weights)",
        "cpu (avx512, bfloat16, int8 cache)",
    ),
    "avxvnni": (
        "cpu (avxvnni, float32)",
        "cpu (avxvnni, bfloat16)",
        "cpu (avxvnni, bfloat16, int8 weights)",
        "cpu (avxvnni, bfloat16, int8 cache)",
    ),
    "avx2": (
        "cpu (avx2, float32)",
        "cpu (avx2, bfloat16)",
        "cpu (avx2, bfloat16, int8 weights)",
        "cpu (avx2, bfloat16, int8 cache)",
    ),
    "neonbf16": (
        "cpu (neonbf16, float32)",
        "cpu (neonbf16, bfloat16)",
        "cpu (neonbf16, bfloat16, int8 weights)",
        "cpu (neonbf16, bfloat16, int8 cache)",
    ),
    "i8mm": (
        "cpu (i8mm, float32)",
        "cpu (i8mm, bfloat16)",
        "cpu (i8mm, bfloat16, int8 weights)",
        "cpu (i8mm, bfloat16, int8 cache)",
    ),
    "dotprod": (
        "cpu (dotprod, float32)",
        "cpu (dotprod, bfloat16)",
        "cpu (dotprod, bfloat16, int8 weights)",
        "cpu (dotprod, bfloat16, int8 cache)",
    ),
    "neon": (
        "cpu (neon, float32)",
        "cpu (neon, bfloat16)",
        "cpu (neon, bfloat16, int8 weights)",
        "cpu (neon, bfloat16, int8 cache)",
    ),
    "scalar": (
        "cpu (scalar, float32)",
        "cpu (scalar, bfloat16)",
        "cpu (scalar, bfloat16, int8 weights)",
        "cpu (scalar, bfloat16, int8 cache)",
    ),
}
X86 = ("amx", "avx512bf16", "avx512", "avxvnni", "avx2", "scalar")
ARM = ("neonbf16", "i8mm", "dotprod", "neon", "scalar")
LAYOUTS = ("auto", *get_args(CacheLayout))


def sets_of(best: str) -> tuple[str, ...]:
    family = X86 if best in X86 else ARM
    return family[family.index(best) :]


@pytest.mark.parametrize("best", EXPECTED)
def test_every_case_has_the_expected_backend(best: str) -> None:
    columns = zip(COLUMNS.values(), EXPECTED[best], strict=True)
    for (name, config), (types, expected), layout, block_size in itertools.product(
        PRESETS.items(), columns, LAYOUTS, select.BLOCK_SIZES
    ):
        options: dict[str, Any] = {**types, "layout": layout, "block_size": block_size}
        choose = partial(select.choose, config, **options, instruction_sets=sets_of(best))
        if layout in ("latent", "mixed") and name.startswith("vanilla"):
            with pytest.raises(ValueError, match=f"kv_cache_layout: {layout} needs low-rank projections"):
                choose()
        elif layout == "latent" and config.rotary:
            with pytest.raises(ValueError, match=r"kv_cache_layout: latent would rebuild .*; take mixed"):
                choose()
        else:
            choice = choose()
            assert (choice.name, choice.batch_invariant) == (expected, True), (name, options)
            assert all(reason for _, reason in choice.refused)


def test_the_documents_have_the_table() -> None:
    page = (Path(__file__).parent.parent / "server" / "docs" / "architecture.md").read_text()
    lines = [f"| processor | {' | '.join(COLUMNS)} |", f"| --- {'| --- ' * len(COLUMNS)}|"]
    lines += [f"| {best} | {' | '.join(expected)} |" for best, expected in EXPECTED.items()]
    assert "\n" + "\n".join(lines) + "\n\n" in page


def test_a_name_is_that_of_the_loaded_backend() -> None:
    sets = features.instruction_sets()
    options = itertools.product(select.CANDIDATES, get_args(WeightType), (torch.float32, torch.int8))
    for candidate, weights, cache_dtype in options:
        case = select.Case(tiny_config(), torch.float32, torch.device("cpu"), "mixed", 32, sets, weights, cache_dtype)
        if candidate.refuses(case) is None:
            choice = select.Choice(case, candidate, ())
            backend = choice.build(random_model(tiny_config()))
            assert (backend.name, backend.batch_invariant) == (choice.name, choice.batch_invariant)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layout": "wide"}, "kv_cache_layout: 'wide' is none of auto, latent, mixed, full"),
        ({"dtype": "bfloat16", "weights": "float32"}, "weights: float32 has no kernels with dtype bfloat16; take one"),
        ({"cache_dtype": "int4"}, "kv_cache_dtype: 'int4' is none of auto, int8"),
        ({"device": "tpu"}, "device: 'tpu' is none of cpu, cuda and cuda:N"),
    ],
)
def test_options_that_do_not_fit_are_named(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select.choose(tiny_config(), **keys)  # type: ignore[arg-type]


def test_what_is_refused_says_why_and_what_would_help() -> None:
    choice = select.choose(tiny_config(), dtype="float32", block_size=32, instruction_sets=sets_of("avx2"))
    assert (choice.candidate, choice.refused) == (select.C, ())
    odd = select.choose(tiny_config(), dtype="float32", block_size=5, instruction_sets=sets_of("avx2"))
    reasons = (("cpu", "block_size 5 is odd; take 32, 64 or 128"), ("cuda", "is for GPUs"))
    assert (odd.candidate, odd.refused) == (select.TORCH, reasons)
    bare = select.choose(tiny_config(), dtype="float32", instruction_sets=())
    assert bare.candidate is select.TORCH
    assert bare.refused[0][1].startswith("its kernels are not compiled; `make kernels` does it")


def test_weights_are_of_the_dtype_that_is_named_and_else_bfloat16() -> None:
    cpu, avx2 = torch.device("cpu"), sets_of("avx2")
    bfloat16 = features.has_bfloat16(cpu)
    auto = torch.bfloat16 if bfloat16 else torch.float32
    for dtype, weights, sets, expected in (
        ("float32", "auto", avx2, (torch.float32, "float32")),
        ("bfloat16", "auto", avx2, (torch.bfloat16, "bfloat16")),
        ("auto", "auto", avx2, (auto, "bfloat16")),
        ("auto", "auto", (), (auto, "bfloat16" if bfloat16 else "float32")),
        ("auto", "float32", avx2, (torch.float32, "float32")),
        ("auto", "int4", avx2, (auto, "int4")),
        ("float32", "bfloat16", avx2, (torch.float32, "bfloat16")),
    ):
        assert select.resolve_types(dtype, weights, cpu, sets) == expected, (dtype, weights, sets)


def test_a_variable_leaves_out_the_better_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    every = features.instruction_sets()
    features.instruction_sets.cache_clear()
    try:
        monkeypatch.setenv("LPA_CPU", "scalar")
        assert features.instruction_sets() == ("scalar",)
        assert select.choose(tiny_config(), dtype="float32").name == "cpu (scalar, float32)"
        features.instruction_sets.cache_clear()
        monkeypatch.setenv("LPA_CPU", "mmx")
        with pytest.raises(ValueError, match=rf"LPA_CPU: 'mmx' is none of this processor's.*{every[0]}"):
            select.choose(tiny_config())
    finally:
        features.instruction_sets.cache_clear()
