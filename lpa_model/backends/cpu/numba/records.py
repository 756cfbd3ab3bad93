"""What a kernel is called with: records that both sides of the call know. Every field but the last is an int64."""

from __future__ import annotations

import numpy as np

SPAN_FIELDS = 6
# a call of the decode attention
CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            # addresses of arrays that hold the cache's numbers
            "q",  # [rows, heads, key_width]
            "new_keys",  # [rows, key_heads, key_width], rows key_stride apart: the step's own tokens
            "new_values",  # [rows, value_heads, value_width], rows value_stride apart
            "keys",  # [blocks, key_heads, block_size, key_width]
            "values",  # [blocks, value_heads, block_size, value_width]; of a program: [.., block_size / 2, .., 2]
            "up",  # [up_heads, up_width, value_width], multiplied into the output; 0: none, as in a program
            "up_bias",  # [up_heads, up_width]; 0: none
            "out",  # [rows, heads, up_width, or value_width without an `up`]
            # of arrays of float32
            "turns",  # [positions, key_width / 2] pairs (cos, sin); 0: keys and queries are not turned
            "partial",  # [items, heads, value_width]: scratch
            "stats",  # [items, 2, heads], maximum and sum: scratch
            # of arrays of int64
            "positions",  # [rows]
            "lengths",  # [rows]: tokens to attend to, the new one included
            "tables",  # block tables, one after another
            "table_starts",  # [rows]
            "item_rows",  # [items]: an item is a tile of one row's tokens, and the unit of work
            "first_items",  # [rows + 1]
            "counters",  # [1 + rows + 1], zeros: the next item; finished items of each row; finished rows
            # sizes
            "rows",
            "items",
            "heads",
            "key_heads",
            "value_heads",
            "up_heads",
            "key_width",
            "value_width",
            "up_width",
            "key_stride",
            "value_stride",
            "block_size",
            "tile_blocks",
            # of a program: whether all heads share the keys, or values, in shapes that `tiles` takes
            "key_tiles",
            "value_tiles",
            # prompt rows behind the others, see `prompt`: addresses of int64
            "prompt_positions",  # [prompt_rows]
            "prompt_slots",  # [prompt_rows]: block * block_size + offset of each row's token
            "shared_ends",  # [prompt_rows]: a row sees none of its text's tokens from here ...; 0: all see all before
            "own_starts",  # [prompt_rows]: ... to here
            "prompt_tables",  # block tables, one after another
            "spans",  # [num_spans, SPAN_FIELDS]: first row, context, length, table start, column, first block
            "block_spans",  # [prompt_blocks]: whose each block is
            "lots",  # [prompt_lots, 2]: span, and which tile of its queries is the first
            "prompt_rows",
            "num_spans",
            "prompt_blocks",
            "prompt_lots",
            "tiled_values",  # address of [value_heads * value_width / 16, value_tiles_in_row, 16, 32]: scratch
            "value_tiles_in_row",
        )
    ]
    + [("scale", np.float64)]
)

# kinds of operations
PRODUCT, RMS_NORM, ADD_LAYER_NORM, ATTENTION, WRITE, TILE_VALUES, ATTEND = range(7)
# what becomes of a product's sums: written as bfloat16, as they are or without the negative ones, or a gate's and what
# it lets through; added to float32
BFLOAT16, RELU, GATED, ADDED = range(4)

PROGRAM = np.dtype(
    [
        ("ops", np.int64),  # address of [operations] OP
        ("operations", np.int64),
        ("rows", np.int64),
        ("counters", np.int64),  # address of [operations, 2] int64, zeros: pieces taken, and done
        ("widest", np.int64),  # of the products' inputs
    ]
)
OP = np.dtype(
    [
        (name, np.int64)
        for name in (
            "kind",  # one of the below
            # addresses
            "x",  # [rows, width]: float32 for RMS_NORM, else bfloat16; a CALL from ATTENTION on
            "weight",  # strips of a product; bfloat16 [width] of a norm
            "bias",  # bfloat16; 0: none
            "residual",  # float32 [rows, width] that ADD_LAYER_NORM adds to
            "out",
            # strides in bytes from row to row
            "x_stride",
            "out_stride",
            "width",  # of x: of the part that each group of outputs meets, a multiple of 32
            "strips",  # of 16 outputs each
            "group_strips",  # consecutive ones that meet the same part of x; even
            "then",  # what a product does with its sums: one of the above
        )
    ]
    + [("eps", np.float64)]
)
