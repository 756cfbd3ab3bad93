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
from tests.conftest import random_model, tiny_config

# processor's best instruction set -> backend by dtype
EXPECTED = {
    "amx": {"float32": "cpu (amx, float32)", "bfloat16": "cpu by numba (amx, bfloat16)"},
    "avx512bf16": {"float32": "cpu (avx512bf16, float32)", "bfloat16": "cpu by numba (avx512bf16, bfloat16)"},
    "avx512": {"float32": "cpu (avx512, float32)", "bfloat16": "cpu (avx512, bfloat16)"},
    "avx2": {"float32": "cpu (avx2, float32)", "bfloat16": "cpu (avx2, bfloat16)"},
    "neon": {"float32": "cpu (neon, float32)", "bfloat16": "cpu (neon, bfloat16)"},
    "scalar": {"float32": "cpu (scalar, float32)", "bfloat16": "cpu (scalar, bfloat16)"},
}
X86 = ("amx", "avx512bf16", "avx512", "avx2", "scalar")
LAYOUTS = ("auto", *get_args(CacheLayout))


def sets_of(best: str) -> tuple[str, ...]:
    return X86[X86.index(best) :] if best in X86 else (best, "scalar")


@pytest.mark.parametrize("best", EXPECTED)
def test_every_case_has_the_expected_backend(best: str) -> None:
    for (name, config), dtype, layout, block_size in itertools.product(
        PRESETS.items(), EXPECTED[best], LAYOUTS, select.BLOCK_SIZES
    ):
        options: dict[str, Any] = {"dtype": dtype, "layout": layout, "block_size": block_size}
        choose = partial(select.choose, config, **options, instruction_sets=sets_of(best))
        if layout in ("latent", "mixed") and name.startswith("vanilla"):
            with pytest.raises(ValueError, match=f"kv_cache_layout: {layout} needs low-rank projections"):
                choose()
        elif layout == "latent" and config.rotary:
            with pytest.raises(ValueError, match=r"kv_cache_layout: latent would rebuild .*; take mixed"):
                choose()
        else:
            choice = choose()
            assert (choice.name, choice.batch_invariant) == (EXPECTED[best][dtype], True), (name, options)
            assert all(reason for _, reason in choice.refused)


def test_the_documents_have_the_table() -> None:
    page = (Path(__file__).parent.parent / "server" / "docs" / "architecture.md").read_text()
    columns = [*EXPECTED["scalar"]]
    lines = [f"| processor | {' | '.join(columns)} |", "| --- | --- | --- |"]
    lines += [f"| {best} | {' | '.join(expected[dtype] for dtype in columns)} |" for best, expected in EXPECTED.items()]
    assert "\n" + "\n".join(lines) + "\n\n" in page


def test_a_name_is_that_of_the_loaded_backend() -> None:
    for candidate in select.CANDIDATES:
        case = select.Case(tiny_config(), torch.float32, torch.device("cpu"), "mixed", 32, features.instruction_sets())
        if candidate.refuses(case) is None:
            choice = select.Choice(case, candidate, ())
            backend = choice.build(random_model(tiny_config()))
            assert (backend.name, backend.batch_invariant) == (choice.name, choice.batch_invariant)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layout": "wide"}, "kv_cache_layout: 'wide' is none of auto, latent, mixed, full"),
        ({"device": "tpu"}, "device: 'tpu' is none of cpu, cuda and cuda:N"),
    ],
)
def test_options_that_do_not_fit_are_named(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select.choose(tiny_config(), **keys)  # type: ignore[arg-type]


def test_what_is_refused_says_why_and_what_would_help() -> None:
    choice = select.choose(tiny_config(), dtype="float32", block_size=32, instruction_sets=sets_of("avx2"))
    assert choice.refused == (("cpu by numba", "computes bfloat16 only"),)
    odd = select.choose(tiny_config(), dtype="float32", block_size=5, instruction_sets=sets_of("avx2"))
    assert (odd.candidate, odd.refused[1]) == (select.TORCH, ("cpu", "block_size 5 is odd; take 32, 64 or 128"))
