"""The parts that say whether a GPU computes the right numbers."""

from __future__ import annotations

import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from lpa_model.backends import select
from lpa_model.backends.cuda import check
from lpa_model.config import PRESETS, CacheLayout, LPAConfig
from server.bench.device.backend_runs import make_backend, random_model, through
from server.bench.device.engine_runs import generated, make_engine, model_folder
from server.bench.device.setup import CHECKED, MEASURED, Setup, checked_cases, shape
from server.engine.request import SamplingParams

COMPILERS = 8  # processes
BFLOAT16_BOUND = 1e-2  # relative to the largest number: a rounding or two to 8 bits


def operations(setup: Setup) -> dict[str, Any]:
    """Every kernel beside its twin, by model, layout and dtype: the largest difference, relative. On a GPU by several
    processes, which also compile what the parts after this one need, into Triton's cache on disk."""
    names, cases = list[str](), list[tuple[Setup, LPAConfig, CacheLayout, torch.dtype]]()
    for name, layout, dtype in checked_cases(setup):
        cases.append((setup, replace(CHECKED[name], num_hidden_layers=1), layout, dtype))
        names.append(name)
    if not setup.tiny:
        for name, layout in MEASURED:
            cases.append((setup, replace(shape(name), num_hidden_layers=1), layout, setup.dtype))
            names.append(name)
    if setup.tiny:
        found = list(map(_differences, cases))
    else:
        with ProcessPoolExecutor(min(COMPILERS, len(os.sched_getaffinity(0))), get_context("spawn")) as pool:
            found = list(pool.map(_differences, cases))
    rows = [
        {
            "model": name,
            "layout": layout,
            "dtype": str(dtype),
            "worst": worst,
            "ok": max(worst.values()) < (1e-4 if dtype is torch.float32 else BFLOAT16_BOUND),
        }
        for name, (_, _, layout, dtype), worst in zip(names, cases, found, strict=True)
    ]
    compared = "kernels with twins" if setup.kernels else "twins with themselves: this device runs no kernels"
    if setup.interpreted:
        compared += ", in float32: Triton's interpreter multiplies bfloat16 wrongly"
    return {"ok": all(row["ok"] for row in rows), "compared": compared, "rows": rows}


def _differences(case: tuple[Setup, LPAConfig, CacheLayout, torch.dtype]) -> dict[str, float]:
    setup, config, layout, dtype = case
    return check.differences(
        random_model(config, setup.place, dtype), layout, min(select.BLOCK_SIZES), check.operations(setup.kernels)
    )


def contract(setup: Setup) -> dict[str, Any]:
    """Texts in chunks and mixtures through the backend, against the plain forward on the CPU in float32.

    float32: log-probabilities within 1e-4. bfloat16: mean error below 1.3 of that of the plain forward in bfloat16.
    """
    rows: list[dict[str, Any]] = []
    for name, layout, dtype in checked_cases(setup):
        config = CHECKED[name]
        exact = random_model(config, torch.device("cpu"), torch.float32)
        if dtype is torch.bfloat16:  # weights that have 8 bits
            exact = exact.to(dtype).to(torch.float32)
        texts = [
            [(7 * i * i + 3 * n) % config.vocab_size for i in range(length)] for n, length in enumerate((90, 33, 9))
        ]
        expected = torch.cat([exact.logits(exact(torch.tensor([ids]))[0]).log_softmax(-1) for ids in texts])
        found = through(make_backend(setup, config, layout, dtype), layout, texts, [70, 20, 3])
        row: dict[str, Any] = {
            "model": name,
            "layout": layout,
            "dtype": str(dtype),
            "largest": float((found - expected).abs().max()),
        }
        if dtype is torch.float32:
            row["ok"] = row["largest"] < 1e-4
        else:
            plain = random_model(config, torch.device("cpu"), dtype)
            rounded = torch.cat([plain.logits(plain(torch.tensor([ids]))[0]).log_softmax(-1) for ids in texts])
            row["ratio"] = float((found - expected).abs().mean() / (rounded - expected).abs().mean())
            row["ok"] = row["ratio"] < 1.3
        rows.append(row)
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def invariance(setup: Setup) -> dict[str, Any]:
    """Whether a text's bits are the same alone, beside others and in other chunks, where the backend says so."""
    rows = []
    kinds: dict[str, CacheLayout] = {"setting 1": "latent", "setting 2": "mixed", "odd ranks and heads": "latent"}
    for name, layout in kinds.items():
        config = CHECKED[name]
        texts = [[(5 * i * i + n) % config.vocab_size for i in range(80)] for n in range(5)]
        for dtype in {torch.float32, setup.dtype}:
            backends = [make_backend(setup, config, layout, dtype, invariant=True) for _ in range(3)]
            alone = through(backends[0], layout, texts[:1], [60])
            beside = through(backends[1], layout, texts, [60, 10, 70, 33, 1])[: len(alone)]
            chunks = through(backends[2], layout, texts[:1], [60], chunk=7)
            rows.append(
                {
                    "model": name,
                    "dtype": str(dtype),
                    "claimed": backends[0].batch_invariant,
                    "beside": torch.equal(alone, beside),
                    "chunks": torch.equal(alone, chunks),
                }
            )
    return {"ok": all(row["beside"] and row["chunks"] for row in rows if row["claimed"]), "rows": rows}


def seeded(setup: Setup) -> dict[str, Any]:
    """Seeded requests together and one by one: the same tokens."""
    number, length = (6, 6) if setup.tiny else (256, 32)
    with model_folder(setup, setup.of(PRESETS["lpa-130m"])) as folder:
        engine = make_engine(setup, folder, number, batch_invariant=setup.place.type == "cuda" or None)
        vocab = engine.model_config.vocab_size
        rng = random.Random(1)
        prompts = [[rng.randrange(vocab) for _ in range(rng.randint(4, 48))] for _ in range(number)]
        params = [
            SamplingParams(max_tokens=length, seed=i, temperature=0.9, top_p=(1.0, 0.9)[i % 2], ignore_eos=True)
            for i in range(number)
        ]
        together = generated(engine, prompts, params)
        alone = [generated(engine, [ids], [one])[0] for ids, one in zip(prompts, params, strict=True)]
        invariant = engine.backend.batch_invariant
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    return {"ok": same == number or not invariant, "requests": number, "same": same, "batch_invariant": invariant}
