"""What Triton kernels share: the tiles of products, and those of experts' rows.

Experts' rows lie expert by expert, and a tile is ROWS rows of one expert. Tiles are numbered likewise, so that a sum
over an expert's rows is that of consecutive tiles' sums: one pass over the rows, no atomics, a fixed order. Rows behind
the last expert's (pads) are in no tile.
Shapes: N rows, E experts, F width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

COLS = 64
TILES_AT_ONCE = 16


def product_tile(width: int) -> tuple[int, int, int, int, int]:
    """Return rows, columns, depth, warps and stages of a tile of a product of bf16 rows of this width."""
    return 128, 256 if width > 512 else 128, 64, 8, 3


def num_tiles(num_rows: int, ends_E: Tensor, rows: int) -> int:
    """Return as many tiles of `rows` rows as there can be when each expert ends in a part of one."""
    return triton.cdiv(num_rows, rows) + len(ends_E)


def groups(ends_E: Tensor) -> tuple[int, int]:
    """Return the constants E and GROUPS of the kernels."""
    return len(ends_E), triton.next_power_of_2(len(ends_E) + 1)


def add_tiles(sums: Tensor, ends_E: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Add up float32 sums of tiles (tiles, F) by expert; returns (E, F) in `dtype`."""
    if len(ends_E) == 1:  # too few sums for a program each
        return sums.sum(0, keepdim=True).to(dtype)
    total_EF = sums.new_empty(len(ends_E), sums.shape[1], dtype=dtype)
    wrap_triton(_add_tiles)[triton.cdiv(sums.shape[1], COLS), len(ends_E)](
        sums, ends_E, total_EF, sums.shape[1], *groups(ends_E), rows, COLS, TILES_AT_ONCE)
    return total_EF


@triton.jit
def _tiles(ends, E: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Return for each group its first row, end, first tile and the tile behind its last; groups from E on are empty."""
    group = tl.arange(0, GROUPS)
    start = tl.load(ends + group - 1, mask=(group > 0) & (group < E), other=0)
    end = tl.load(ends + group, mask=group < E, other=0)
    tiles = (end - start + ROWS - 1) // ROWS
    behind = tl.cumsum(tiles, 0)
    return start, end, behind - tiles, behind


@triton.jit
def place(tile, ends, E: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Return a tile's group (from E on: none, without rows), its rows, int64 (ROWS,), and the end of the group's."""
    start, end, first_tile, behind = _tiles(ends, E, GROUPS, ROWS)
    mine = tl.sum((behind <= tile).to(tl.int32), 0)  # GROUPS behind the last tile: no rows
    is_mine = tl.arange(0, GROUPS) == mine
    first = tl.sum(tl.where(is_mine, start + (tile - first_tile) * ROWS, 0), 0)
    return mine, (first + tl.arange(0, ROWS)).to(tl.int64), tl.sum(tl.where(is_mine, end, 0), 0)


@triton.jit
def _add_tiles(sums, ends, total, F, E: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
               COLS: tl.constexpr, AT_ONCE: tl.constexpr):
    _, _, first_tile, behind = _tiles(ends, E, GROUPS, ROWS)
    expert = tl.program_id(1)
    is_mine = tl.arange(0, GROUPS) == expert
    last = tl.sum(tl.where(is_mine, behind, 0), 0)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    value = tl.zeros((COLS,), tl.float32)
    for tile in range(tl.sum(tl.where(is_mine, first_tile, 0), 0), last, AT_ONCE):
        tiles = (tile + tl.arange(0, AT_ONCE)).to(tl.int64)[:, None]
        value += tl.sum(tl.load(sums + tiles * F + cols, mask=(tiles < last) & (cols < F), other=0), 0)
    tl.store(total + expert * F + cols, value, mask=cols < F)
