"""How attention on TPU and its gradient cut heads and queries into blocks."""

import math

from jaxmerge._kernels import _tpu as tpu

ROWS = 16
"""What blocks of queries are multiples of: a register of bfloat16."""


def width_of(h: int, f: int) -> int:
    """Lanes of a block of h heads of f features: the fewest heads that fill whole registers, or all."""
    width = math.lcm(f, tpu.LANES)
    return width if h * f % width == 0 else h * f


def even(n: int, most: int) -> int:
    """Queries of a block, of n, at most so many: as even as can be."""
    return tpu.padded(-(-n // max(1, -(-n // most))), ROWS)
