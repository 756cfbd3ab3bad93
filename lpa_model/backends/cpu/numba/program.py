"""Several operations on the rows of a step in one go: threads share out each one's pieces, and wait for its last.

A thread that comes late, or never, finds that the others have done its part: nobody waits for threads, only for work.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import carray, from_dtype, types

from lpa_model.backends.cpu.numba import columns, norm, paired_decode, product, prompt, tiles
from lpa_model.backends.cpu.numba.machine import (
    ZERO,
    address_of,
    compiled,
    fetch,
    fetch_add,
    give_back,
    part,
    pause,
    pointer_to,
    take,
)
from lpa_model.backends.cpu.numba.records import (
    ADD_LAYER_NORM,
    ATTENTION,
    CALL,
    OP,
    PRODUCT,
    PROGRAM,
    RMS_NORM,
    TILE_VALUES,
    WRITE,
)

Room = namedtuple("Room", ["rows", "stride", "sums"])
"""One thread's scratch for products: addresses, and the bytes of a row."""


_call_at = pointer_to(CALL)
_op_at = pointer_to(OP)
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
SPINS = 1000  # about 50 microseconds


@compiled
def _wait_until(counter, count):
    """Other threads finish what they have taken in microseconds, unless the system has stopped them: then they get this
    thread's processor."""
    spins = 0
    while fetch(counter) < count:
        spins += 1
        if spins < SPINS:
            pause()
        else:
            _usleep(np.uint32(20))


@compiled
def _pieces(op, rows, tiled):
    if op.kind == PRODUCT:
        return product.items(op, rows, tiled)
    if op.kind < ATTENTION:
        return rows
    call = carray(_call_at(op.x), (1,))[0]
    if op.kind == WRITE:
        return call.prompt_rows
    return call.prompt_blocks if op.kind == TILE_VALUES else prompt.items(call)


@part
def _work(op, rows, item, room, prompt_room, like, tiled):
    if op.kind == PRODUCT:
        product.work(op, rows, item, room, like, tiled)
    elif op.kind == RMS_NORM:
        x, out = op.x + item * op.x_stride, op.out + item * op.out_stride
        norm.rms_norm_row(x, op.weight, out, op.width, op.eps, like)
    elif op.kind == ADD_LAYER_NORM:
        x, residual, out = (
            op.x + item * op.x_stride,
            op.residual + 2 * item * op.x_stride,
            op.out + item * op.out_stride,
        )
        norm.add_layer_norm_row(x, op.weight, op.bias, residual, out, op.width, op.eps, like)
    else:
        call = carray(_call_at(op.x), (1,))[0]
        if op.kind == WRITE:
            prompt.write_row(call, item, like)
        elif op.kind == TILE_VALUES:
            prompt.tile_values(call, item, like)
        else:
            prompt.attend(call, item, prompt_room, tiled)


@part
def _run(program, like, tiled):
    rows = take((product.ROWS, program.widest), like)
    sums = take((2 * product.ROWS, product.PAIR), ZERO)
    room = Room(address_of(rows), 2 * program.widest, address_of(sums))
    scratch = take((prompt.room_rows(program.widest), columns.COLUMNS), ZERO)
    prompt_room = prompt.room(program.widest, address_of(scratch))
    ops = carray(_op_at(program.ops), (program.operations,))
    if tiled is not None:
        tiles.configure()
    for i in range(program.operations):
        op = ops[i]
        if op.kind == ATTENTION:
            call = carray(_call_at(op.x), (1,))[0]
            if call.rows:
                paired_decode.work(call, like, tiled)
                _wait_until(call.counters + 8 * (1 + call.rows), call.rows)
            continue
        taken = program.counters + 16 * i
        done = taken + 8
        items = _pieces(op, program.rows, tiled)
        item = fetch_add(taken) if items else 0
        if tiled is not None and op.kind == PRODUCT and item < items:
            product.prepare(op, program.rows, room, like)
        while item < items:
            _work(op, program.rows, item, room, prompt_room, like, tiled)
            fetch_add(done)
            item = fetch_add(taken)
        if i + 1 < program.operations:
            _wait_until(done, items)
    if tiled is not None:
        tiles.release()
    give_back(rows)
    give_back(sums)
    give_back(scratch)


SIGNATURE = types.void(types.CPointer(from_dtype(PROGRAM)))


def run_in_vectors(program):
    _run(carray(program, (1,))[0], np.uint16(0), None)


def run_in_tiles(program):
    _run(carray(program, (1,))[0], np.uint16(0), True)
