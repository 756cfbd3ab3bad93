"""The kernels for ARM under qemu: op lists that ran here run again on every instruction set, and are compared by bits.

No ARM processor is needed, and no speed is measured: qemu's time says nothing of a processor's.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpa_model.backends.cpu.args import OpKind
from lpa_model.backends.cpu.build import INSTRUCTION_SETS, LIBRARY, SOURCES, build, objects_of, run_compiler
from lpa_model.backends.cpu.plan import WIDTH_UNIT, StepPlan
from lpa_model.batch import Batch, Span
from lpa_model.cache import LatentCache
from lpa_model.config import Architecture, CacheLayout
from lpa_model.quantization import WeightType, hold_weights
from tests.cpu_kernels import kernels_here
from tests.extra.saved_step import SavedStep, recording
from tests.test_wheel import build_wheel
from tests.tiny import random_model, tiny_config

SETS = [flavour.name for flavour in INSTRUCTION_SETS["aarch64"]]
# qemu's processor -> the instruction sets that it has
PROCESSORS = {
    "cortex-a53": ["scalar", "neon"],
    "cortex-a76": ["scalar", "neon", "dotprod"],
    "neoverse-n1": ["scalar", "neon", "dotprod"],
    "max": SETS,
}
# activations, weights, cache
CASES: list[tuple[torch.dtype, WeightType, torch.dtype]] = [
    (torch.float32, "float32", torch.float32),
    (torch.float32, "bfloat16", torch.int8),
    (torch.bfloat16, "bfloat16", torch.bfloat16),
    (torch.float32, "int8", torch.float32),
    (torch.bfloat16, "int8", torch.int8),
    (torch.float32, "int4", torch.int8),
    (torch.bfloat16, "int4", torch.bfloat16),
]
BLOCK, STREAMS, LONG = 32, 9, 160  # tokens of the longest text: two splits of decode attention
FFN_RANK = {"gate": [40, None], "up": [40, None], "down": None}
# layout, and keys of the config: together they have every operation and epilogue
MODELS: dict[Architecture, tuple[CacheLayout, dict[str, Any]]] = {
    "setting1": ("latent", {}),
    "setting2": ("mixed", {"qk_norm": True, "num_key_value_heads": 2, "ffn_rank": FFN_RANK}),
}
Qemu = Callable[..., "subprocess.CompletedProcess[str]"]
# (mask, value) of the instructions' 32 bits: sdot of vectors and by element, smmla, bfmlalb and bfmlalt
INSTRUCTIONS = {
    "sdot": ((0xFFE0FC00, 0x4E809400), (0xFFC0F400, 0x4F80E000)),
    "smmla": ((0xFFE0FC00, 0x4E80A400),),
    "bfmlal": ((0xFFE0FC00, 0x2EC0FC00), (0xFFE0FC00, 0x6EC0FC00)),
}
USED = {"dotprod": {"sdot"}, "i8mm": {"sdot", "smmla"}, "neonbf16": set(INSTRUCTIONS)}


@pytest.fixture(scope="module")
def library() -> Path:
    """Compiled for ARM, as it goes into a wheel."""
    return build(objects_of(LIBRARY) / "aarch64.so", "aarch64")


@pytest.fixture(scope="module")
def qemu(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Qemu:
    """Runs replay.c, linked with the library's own objects, on a processor of qemu's."""
    assert shutil.which("qemu-aarch64") is not None, "make test-extra installs Debian's package qemu-user"
    program = tmp_path_factory.mktemp("replay") / "replay"
    objects = sorted(objects_of(library).glob("*.o"))
    flags = ["-target", "aarch64-linux-musl", "-static", "-O1", "-Wall", "-Werror", f"-I{SOURCES}", "-DISA=none"]
    source = Path(__file__).with_name("replay.c")
    run_compiler([*flags, str(source), *map(str, objects), "-o", str(program)])

    def run(processor: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = ["qemu-aarch64", "-cpu", processor, str(program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=1800)

    return run


def steps_of(
    architecture: Architecture, dtype: torch.dtype, weights: WeightType, cache_dtype: torch.dtype, instruction_set: str
) -> list[SavedStep]:
    """Prompts, 1 to 9 streams, and both in one step, each with its head, by the kernels of this processor.

    Widths are not multiples of 32, so that all is padded, and several groups of 32 follow each other.
    """
    layout, changes = MODELS[architecture]
    sizes = {"hidden_size": 104, "intermediate_size": 136, "attention_rank": 40, "max_position_embeddings": 2 * LONG}
    config = tiny_config(architecture, **sizes, **changes)
    model = random_model(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    held = hold_weights(model, weights)
    steps: list[SavedStep] = []
    kernels = recording(kernels_here()[instruction_set], steps)
    tables = [list(range(LONG // BLOCK)), *([LONG // BLOCK + i] for i in range(STREAMS))]
    cache = LatentCache(config, layout, LONG // BLOCK + STREAMS, BLOCK, cache_dtype, width_unit=WIDTH_UNIT)
    plan = StepPlan(model, cache, kernels, held, dtype)
    generator = np.random.default_rng(0)

    def step(spans: list[Span]) -> None:
        ids = generator.integers(0, config.vocab_size, sum(span.length for span in spans))
        hidden, _ = plan(Batch.build(ids, spans, BLOCK))
        plan.head(hidden)

    lengths = [LONG - 16, 1, 2, 3, 5, 8, 13, 4, 6]
    step([Span(0, length, table, decode=False) for length, table in zip(lengths, tables, strict=False)])
    for rows in range(1, STREAMS + 1):
        step([Span(lengths[i], 1, tables[i], decode=True) for i in range(rows)])
        lengths[:rows] = [length + 1 for length in lengths[:rows]]
    branched = Span(0, 11, tables[STREAMS], decode=False, branches=(4, 7))
    step([Span(lengths[0], 1, tables[0], decode=True), Span(lengths[1], 20, tables[1], decode=False), branched])
    return steps


def test_a_processor_has_what_the_library_says(qemu: Qemu) -> None:
    for processor, names in PROCESSORS.items():
        assert qemu(processor).stdout.split() == names


def test_what_a_processor_has_not_ends_the_program(qemu: Qemu, tmp_path: Path) -> None:
    """So that the bits compared below are those of the instructions."""
    (tmp_path / "before").write_bytes(steps_of("setting2", torch.float32, "int8", torch.float32, "avx2")[0].encoded())
    for processor, name, ends in (
        ("cortex-a53", "neon", 0),
        ("cortex-a53", "dotprod", -signal.SIGILL),
        ("cortex-a76", "dotprod", 0),
        ("cortex-a76", "i8mm", -signal.SIGILL),
    ):
        done = qemu(processor, name, tmp_path / "before", tmp_path / "after")
        assert done.returncode == ends, (processor, name, done.stderr)


def test_instruction_sets_use_their_instructions(library: Path) -> None:
    for name in SETS:
        [path] = objects_of(library).glob(f"gemm-{name}-*.o")
        code = path.read_bytes()
        words = np.frombuffer(code[: len(code) // 4 * 4], dtype="<u4")
        found = {
            instruction
            for instruction, forms in INSTRUCTIONS.items()
            if sum(int(((words & mask) == value).sum()) for mask, value in forms) >= 32
        }
        assert found == USED.get(name, set()), name


def test_the_wheel_for_arm_holds_every_instruction_set(library: Path, tmp_path: Path) -> None:
    path = build_wheel(tmp_path, "-C--build-option=--plat-name=manylinux_2_28_aarch64")
    assert path.name.endswith("-py3-none-manylinux_2_28_aarch64.whl")
    assert not (tmp_path / "source/lpa_model/backends/cpu/kernels.so").exists()  # where the editable one would be
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".so")]
        assert name == "lpa_model/backends/cpu/kernels.so" and not any(n.endswith(".o") for n in archive.namelist())
        found = archive.read(name)
        [wheel] = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/WHEEL")]
    assert "Tag: py3-none-manylinux_2_28_aarch64" in wheel and "Root-Is-Purelib: false" in wheel
    assert found[:5] == b"\x7fELF\x02" and int.from_bytes(found[18:20], "little") == 183  # 64 bits, AArch64
    assert all(f"\0lpa_kernels_{name}\0".encode() in found for name in SETS)
    versions = [int(text) for text in re.findall(rb"GLIBC_2\.(\d+)", found)]
    assert versions and max(versions) <= 28


def test_a_wheel_for_another_platform_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"--plat-name manylinux_2_28_riscv64: there are kernels for manylinux"):
        build_wheel(tmp_path, "-C--build-option=--plat-name=manylinux_2_28_riscv64")


def test_the_steps_have_every_operation() -> None:
    found = [steps_of(architecture, torch.bfloat16, "bfloat16", torch.bfloat16, "avx2") for architecture in MODELS]
    assert set(OpKind) == {kind for steps in found for step in steps for kind in step.kinds}


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(x).removeprefix("torch.") for x in case))
def test_every_instruction_set_computes_the_same_bits(
    architecture: Architecture, case: tuple[torch.dtype, WeightType, torch.dtype], qemu: Qemu, tmp_path: Path
) -> None:
    """As the portable kernels on the same processor, and as AVX2 here, since sums have one order. Products of bfloat16
    pairs are of another function (queries and weights of values are rounded): as AVX512-BF16 emulated here."""
    steps = steps_of(architecture, *case, "avx2")
    paired = steps_of(architecture, *case, "avx512bf16, emulated") if case[0] is torch.bfloat16 else steps
    for name in SETS:
        expected = paired if name == "neonbf16" else steps
        before, after = tmp_path / "before", tmp_path / "after"
        before.write_bytes(b"".join(step.encoded() for step in expected))
        done = qemu("max", name, before, after)
        assert done.returncode == 0, (name, done.returncode, done.stderr)
        memory, at = after.read_bytes(), 0
        for i, step in enumerate(expected):
            assert step.before != step.after
            found, wanted = step.results(memory[at : at + step.size]), step.results(b"".join(step.after))
            at += step.size
            for address, region in wanted.items():
                assert np.array_equal(found[address], region), (name, i, address - min(wanted))
        assert at == len(memory)
