"""The library of C kernels: what it says of itself, what is refused, and the threads that it runs in."""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lpa_model.backends.cpu import args, library
from lpa_model.backends.cpu.build import EMULATED, INSTRUCTION_SETS, LIBRARY, SOURCES, build
from lpa_model.backends.cpu.library import Library, LibraryError, check_records, load
from lpa_model.backends.cpu.oplist import OpList
from lpa_model.backends.cpu.packing import pack
from tests.cpu_kernels import kernels_here


def test_every_instruction_set_of_the_platform_is_in_the_library() -> None:
    names = {flavour.name for flavour in INSTRUCTION_SETS[platform.machine()]}
    tables = {name: load().kernels(name).keys() for name in names}
    assert len({frozenset(table) for table in tables.values()}) == 1
    assert "scalar" in load().supported() and set(load().supported()) <= names
    with pytest.raises(LibraryError, match="no kernels for avx1024"):
        load().kernels("avx1024")
    assert not load().supports("avx1024")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks Linux for x86's features")
def test_instruction_sets_are_those_that_linux_reports() -> None:
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())  # type: ignore[index]
    v4 = {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"}
    needed = {
        "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2"},
        "avxvnni": {"avx2", "fma", "avx_vnni"},
        "avx512": {"avx2", "fma"} | v4,
        "avx512bf16": {"avx512_bf16"} | v4,
    }
    for name, names in needed.items():
        assert load().supports(name) == (names <= flags), name
    if "amx_bf16" not in flags:
        assert not load().supports("amx")


def test_records_are_checked_when_the_library_is_loaded() -> None:
    layout = load()._layout()
    check_records(layout)
    for record in args.RECORDS:
        for change, message in (
            ({**layout[record], "new": (8, 8)}, f"record {record}, field new"),
            ({**layout[record], "": (0, 8)}, f"record {record}, its size"),
            (dict(list(layout[record].items())[:-1]), f"record {record}, field {list(layout[record])[-1]}"),
        ):
            with pytest.raises(LibraryError, match=message):
                check_records({**layout, record: change})
    with pytest.raises(LibraryError, match="has the records"):
        check_records({name: fields for name, fields in layout.items() if name != "op"})


def test_enumerations_are_those_of_the_header() -> None:
    header = re.sub(r"/\*.*?\*/", "", (SOURCES / "records.h").read_text(), flags=re.S)
    for name, ours in (("dtype", args.Dtype), ("op_kind", args.OpKind), ("epilogue", args.Epilogue)):
        body = re.search(rf"enum {name} \{{(.*?)\}}", header, re.S)
        assert body is not None
        assert [value.strip() for value in body[1].split(",") if value.strip()] == [value.name for value in ours]


def test_a_missing_library_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="make kernels"):
        Library(tmp_path / "kernels.so")


def test_only_what_has_changed_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()

    def write(name: str, value: int) -> None:
        head = f'__attribute__((visibility("default"))) int {name}(void)'
        (sources / f"{name}.c").write_text(f"{head};\nint {name}(void) {{ return {value}; }}\n")

    write("one", 1)
    write("two", 1)
    monkeypatch.setattr("lpa_model.backends.cpu.build.SOURCES", sources)
    flavour = [next(f for f in INSTRUCTION_SETS[platform.machine()] if f.name == "scalar")]
    target = tmp_path / "kernels.so"
    build(target, instruction_sets=flavour)
    objects = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.o")}
    linked = target.stat().st_mtime_ns
    build(target, instruction_sets=flavour)
    assert objects == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.o")}
    assert target.stat().st_mtime_ns == linked
    write("two", 2)
    build(target, instruction_sets=flavour)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.o")}
    assert len(after) == len(objects) == 2 and len(after.items() & objects.items()) == 1
    assert target.stat().st_mtime_ns != linked and ctypes.CDLL(str(target)).two() == 2
    next(iter(after)).unlink()
    target.unlink()
    build(target, instruction_sets=flavour)
    assert target.exists() and {path for path in tmp_path.rglob("*.o")} == after.keys()


def test_the_library_needs_no_newer_glibc_than_it_says() -> None:
    versions = re.findall(rb"GLIBC_2\.(\d+)", LIBRARY.read_bytes())
    assert versions and max(map(int, versions)) <= 28


def test_a_chain_of_operations_is_the_same_with_any_number_of_threads() -> None:
    """Each operation reads what the one before it wrote, on any thread."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(256, 256, generator=generator) / 16 for _ in range(6)]
    x = torch.randn(300, 256, generator=generator)
    threads = torch.get_num_threads()
    for name, kernels in kernels_here().items():
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            try:
                ops, rows = OpList(kernels, torch.float32), x.clone()
                for weight in weights:
                    normed, out = ops.workspace(300, 256), ops.workspace(300, 256)
                    ops.rms_norm(rows, torch.ones(256), normed, 1e-6)
                    ops.gemm(normed, pack(weight), out)
                    rows = out
                for _ in range(3):  # an op list runs again and again
                    ops.run(300)
                    found.append(rows.clone())
            finally:
                torch.set_num_threads(threads)
        assert all(torch.equal(other, found[0]) for other in found), name
        plain = x.double()
        for weight in weights:
            plain = torch.nn.functional.rms_norm(plain, (256,), eps=1e-6) @ weight.double().t()
        assert (found[0] - plain).abs().max() < 1e-4


def test_workspaces_are_used_again_once_freed() -> None:
    ops = OpList(kernels_here()["scalar"], torch.float32)
    first, second = ops.workspace(4, 32), ops.workspace(4, 32)
    assert first.data_ptr() != second.data_ptr()
    ops.free_workspaces()
    assert ops.workspace(4, 32).data_ptr() in (first.data_ptr(), second.data_ptr())
    assert ops.workspace(4, 64).data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_no_memory_for_scratch_is_an_error() -> None:
    """More than the address space has."""
    ops = OpList(kernels_here()["scalar"], torch.bfloat16)
    x, out = torch.zeros(1, 32, dtype=torch.bfloat16), torch.zeros(1, 32, dtype=torch.bfloat16)
    ops.gemm(x, pack(torch.zeros(32, 32, dtype=torch.bfloat16)), out)
    ops._ops[0]["width"] = 1 << 55
    with pytest.raises(MemoryError):
        ops.run(1)


def test_emulated_flavours_are_the_real_ones_names() -> None:
    """With the same control flow; that of ARM's is without its vectors."""
    names = {flavour.name: flavour.defines for machine in INSTRUCTION_SETS.values() for flavour in machine}
    for flavour in EMULATED:
        assert set(names[flavour.name]) - set(flavour.defines) <= {"-DHAS_NEON=1", "-DHAS_DOT_S8=1"}, flavour
        assert set(flavour.defines) <= set(names[flavour.name]), flavour


def test_what_emulated_flavours_share_has_nothing_that_they_change() -> None:
    words = {
        "-DHAS_DOT_BF16=1": r"HAS_DOT_BF16|dot_bf16",
        "-DHAS_DOT_I8=1": r"HAS_DOT_I8|dot_i8|weights_i8|EXCESS_I8|_u4\b",
        "-DHAS_MATRIX_I8=1": r"HAS_MATRIX_I8|dot_matrix",
        "-DHAS_TILES=1": r"HAS_TILES|TILE|tiles",
        "-DVECTORS=32": r"VECTORS|WIDE",
    }
    for flavour in EMULATED:
        for name in flavour.shared:
            source = (SOURCES / name).read_text()
            text = source + "".join(
                (SOURCES / header).read_text() for header in re.findall(r'#include "(\w+\.h)"', source)
            )
            for define in flavour.defines:
                assert not re.search(words[define], text), (flavour.name, name, define)
    assert not EMULATED[0].shared


def test_kernels_run_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_openmp", lambda: None)
    kernels = Library(LIBRARY).kernels("scalar")
    ops = OpList(kernels, torch.float32)
    out = torch.empty(3, 32)
    ops.gemm(torch.ones(3, 32), pack(torch.ones(32, 32)), out)
    ops.run(3)
    assert np.array_equal(out.numpy(), np.full((3, 32), 32.0))
