"""Compiles the C kernels into one shared library with every instruction set of a platform: `python -m
lpa_model.backends.cpu.build`, `make kernels`, and every build of the package (see `packaging`).

The compiler is zig's clang (PyPI: ziglang): no system compiler is needed, and the glibc that the library needs is
fixed. Only the standard library is imported: neither the package nor what it depends on is there when it is built.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "csrc"
GLIBC = "2.28"
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # fma_f32 says what is fused
    "-fno-math-errno",
    "-fno-sanitize=all",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Werror",
    "-Wno-psabi",  # vectors are passed between inlined functions only
]


@dataclass(frozen=True)
class InstructionSet:
    """One flavour of the kernels."""

    name: str  # the suffix of its symbols
    cpu: str  # of the compiler's -mcpu
    defines: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()  # files, keys of CALLED, that are not compiled: the first flavour's code is the same


WIDE = ("-DVECTORS=32",)  # of 64 bytes
VNNI = ("-DHAS_DOT_I8=1",)
DOT, TILES = ("-DHAS_DOT_BF16=1", *VNNI, *WIDE), ("-DHAS_TILES=1",)  # what has bfloat16's has VNNI's, too
NEON, MATRIX = ("-DHAS_NEON=1",), ("-DHAS_MATRIX_I8=1",)
SDOT = (*NEON, "-DHAS_DOT_S8=1")
INSTRUCTION_SETS = {
    "x86_64": [
        InstructionSet("scalar", "x86_64"),
        InstructionSet("avx2", "x86_64_v3"),
        InstructionSet("avxvnni", "x86_64_v3+avxvnni", VNNI),
        InstructionSet("avx512", "x86_64_v4"),
        InstructionSet("avx512bf16", "x86_64_v4+avx512vnni+avx512bf16", DOT),
        InstructionSet("amx", "x86_64_v4+avx512vnni+avx512bf16+amx_tile+amx_bf16", DOT + TILES),
    ],
    "aarch64": [
        InstructionSet("scalar", "generic"),
        InstructionSet("neon", "generic", NEON),
        InstructionSet("dotprod", "generic+dotprod", SDOT),
        InstructionSet("i8mm", "generic+dotprod+i8mm", SDOT + MATRIX),
        InstructionSet("neonbf16", "generic+dotprod+i8mm+bf16", ("-DHAS_DOT_BF16=1", *SDOT, *MATRIX)),
    ],
}
CALLED = {
    "attention_decode.c": ("attention_decode", "attention_decode_scratch"),
    "attention_prompt.c": (
        "attention_prompt_item",
        "attention_prompt_items",
        "attention_prompt_scratch",
        "cache_write_row",
        "pack_values_block",
    ),
    "norms.c": ("norm_row",),
    "sampling.c": ("draw_tokens", "mask_logits"),
    "score.c": ("score_rows",),
}
"""Source files, and what other files call of them."""
# the control flow of newer processors' kernels, on any processor with AVX2: their instructions are computed in C
ROWS = ("norms.c", "sampling.c", "score.c")  # without any that is emulated
ALL_BUT_GEMM = (*ROWS, "attention_decode.c", "attention_prompt.c")  # without products of int8
EMULATED = [
    InstructionSet("avx512bf16", "x86_64_v3", DOT),
    InstructionSet("amx", "x86_64_v3", DOT + TILES, ROWS),
    InstructionSet("avxvnni", "x86_64_v3", VNNI, ALL_BUT_GEMM),
    InstructionSet("i8mm", "x86_64_v3", MATRIX, ALL_BUT_GEMM),
]
# to be run with the runtime libraries of the sanitizers loaded beforehand
SANITIZED = [flag for flag in FLAGS if flag not in ("-O3", "-g0", "-fno-sanitize=all")] + [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-Xclang",
    "-fsanitize=address",  # zig's own driver has no runtime library for it, and drops it
    "-fsanitize=undefined",
    "-fno-sanitize-recover=all",
]
ONCE = ("library.c",)  # of the sources, for all instruction sets together


LIBRARY = HERE / "kernels.so"
"""The library of this platform."""


def compiles_here() -> bool:
    """Whether there are kernels for this platform."""
    return sys.platform == "linux" and platform.machine() in INSTRUCTION_SETS


def objects_of(target: Path) -> Path:
    """The folder where a library's object files are kept."""
    return target.parent / "__pycache__" / target.stem


def build(
    target: Path = LIBRARY,
    machine: str = platform.machine(),
    instruction_sets: Sequence[InstructionSet] | None = None,
    flags: Sequence[str] = FLAGS,
) -> Path:
    """Compile what has changed since the last time, and link it into the library at `target`.

    Raises:
        RuntimeError: no kernels for this platform, or the compiler's errors.
    """
    if instruction_sets is None:
        if machine not in INSTRUCTION_SETS:
            raise RuntimeError(f"no kernels for {machine}, only for {', '.join(INSTRUCTION_SETS)}")
        instruction_sets = INSTRUCTION_SETS[machine]
    objects = objects_of(target)
    objects.mkdir(parents=True, exist_ok=True)
    headers = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.h")))
    jobs, first = [], instruction_sets[0]
    for source in sorted(SOURCES.glob("*.c")):
        flavours = [InstructionSet("all", first.cpu)] if source.name in ONCE else instruction_sets
        for flavour in flavours:
            if source.name in flavour.shared:
                continue
            command = [*_target(machine), *flags, f"-mcpu={flavour.cpu}", f"-DISA={flavour.name}", *flavour.defines]
            called = [name for file in flavour.shared for name in CALLED[file]]
            command += [f"-D{name}_{flavour.name}={name}_{first.name}" for name in called]
            if source.name in ONCE:
                command.append(f'-DSOURCE="{source_hash()}"')
            text = f"{version('ziglang')} {command}".encode() + headers + source.read_bytes()
            output = objects / f"{source.stem}-{flavour.name}-{hashlib.sha256(text).hexdigest()[:16]}.o"
            jobs.append((output, [*command, "-c", str(source)]))
    with (objects / "lock").open("w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process finds the work done
        list(pool.map(lambda job: _compile(*job), jobs))
        wanted = [output for output, _ in jobs]
        stamp = objects / "linked"
        names = "\n".join(path.name for path in wanted)
        if not (target.exists() and stamp.exists() and stamp.read_text() == names):
            part = target.with_suffix(f".{os.getpid()}.part")
            run_compiler([*_target(machine), "-shared", "-o", str(part), *map(str, wanted)])
            part.replace(target)
            stamp.write_text(names)
            for old in set(objects.glob("*.o")) - set(wanted):
                old.unlink()
    return target


def source_hash() -> str:
    """Of all sources: a library says which ones it was made of."""
    text = b"".join(path.name.encode() + path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]")))
    return hashlib.sha256(text).hexdigest()[:16]


def _target(machine: str) -> list[str]:
    return ["-target", f"{machine}-linux-gnu.{GLIBC}"]


def _compile(output: Path, arguments: list[str]) -> None:
    if not output.exists():
        part = output.with_suffix(f".{os.getpid()}.part")
        run_compiler([*arguments, "-o", str(part)])
        part.replace(output)


def run_compiler(arguments: list[str]) -> None:
    """zig's clang, with its arguments.

    Raises:
        RuntimeError: the compiler's errors.
    """
    command = [sys.executable, "-m", "ziglang", "cc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--machine", default=platform.machine(), choices=sorted(INSTRUCTION_SETS))
    parser.add_argument("--output", type=Path, default=LIBRARY)
    arguments = parser.parse_args()
    print(build(arguments.output, arguments.machine))
