"""A kernel as machine code for the processor at hand: numba compiles it, and nothing of numba is needed to run it."""

from __future__ import annotations

import ctypes
import importlib
import logging

import llvmlite.binding as llvm
import numba

from lpa_model.backends.cpu.numba.launch import ENTRY, target_machine

# numba's function returns whether it raised an error, and none of the kernels does; its arrays never own their memory
MORE = """
declare i32 @"{kernel}"(ptr, ptr, ptr)
define void @{entry}(ptr %call) {{
  %result = alloca ptr
  %error = alloca ptr
  %status = call i32 @"{kernel}"(ptr %result, ptr %error, ptr %call)
  ret void
}}
define void @NRT_MemInfo_call_dtor(ptr %memory) {{ ret void }}
"""


def object_code(name: str) -> bytes:
    """An object file with `module.function` as ENTRY, which takes an address.

    Raises:
        RuntimeError: the kernel needs a function that the process does not have.
    """
    logging.getLogger("numba").setLevel(logging.WARNING)  # at DEBUG it writes down every step of a compilation
    module_name, function = name.rsplit(".", 1)
    module = importlib.import_module(module_name)
    compiled = numba.cfunc(module.SIGNATURE)(getattr(module, function))
    code = llvm.parse_assembly(compiled.inspect_llvm())
    kernel = compiled.native_name.removeprefix("cfunc.")
    code.link_in(llvm.parse_assembly(MORE.format(kernel=kernel, entry=ENTRY)))
    for symbol in (*code.functions, *code.global_variables):
        if not symbol.is_declaration and symbol.name != ENTRY:
            symbol.linkage = "internal"
    machine = target_machine()
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()  # what only reports errors
    passes.run(code, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    process = ctypes.CDLL(None)
    for symbol in code.functions:
        outside = symbol.is_declaration and not symbol.name.startswith("llvm.")
        if outside and not hasattr(process, symbol.name):
            raise RuntimeError(f"{symbol.name} is not there without numba")
    emitted: bytes = machine.emit_object(code)
    return emitted
