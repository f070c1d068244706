"""Eight bits for a number >= 0: 4 bits of exponent and 4 of mantissa, and for each block one exponent that all share.

A code ``c`` in a block of exponent ``E`` is an unsigned float with gradual underflow, as IEEE 754 defines it::

    v = (c mod 16 + 16) 2^(c div 16 - 1) 2^(E - 145)    for c >= 16
    v = c 2^(E - 145)                                   for c < 16

so that 255 is the largest number below 2^(E - 126), and numbers down to 2^-14 of that keep 4 bits of mantissa. E is the
exponent, biased as in fp32, of the block's maximum, the latter rounded up. It never falls, so that codes of a block
that does not change stay as they are; where it rises, numbers above the 4-bit range's end keep every bit.

Where a number stands between two codes it becomes either, with the probability that makes the mean exact. Everything is
integer arithmetic on the bits of fp32, or a product with a power of two; ``metal/quantized.metal`` is its counterpart,
bit for bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx

from . import rounding
from .rounding import word

# With a smaller exponent the smallest code would be no normal fp32.
SMALLEST_EXPONENT, LARGEST_EXPONENT = 19, 255
# A row of so many elements has a block to itself: an exponent then costs less than 3 % (1/34).
SHORTEST_BLOCK = 34


class Blocks(NamedTuple):
    """How a tensor is divided: in lines (its rows, or all of it), and those in blocks of ``unit`` neighbours.

    Args:
        line: Elements of a line.
        unit: Elements of a block; the last block of a line may have fewer.
        rows: Rows of the tensor in a block, 1 where a block lies inside a row.
    """

    line: int
    unit: int
    rows: int

    @classmethod
    def of(cls, shape: tuple[int, ...], exponents: tuple[int, ...]) -> Blocks:
        """The division of a tensor of this shape that has exponents of that shape."""
        rows, columns = rows_and_columns(shape)
        if len(exponents) == 1:
            together = -(-rows // exponents[0])
            return cls(rows * columns, together * columns, together)
        return cls(columns, -(-columns // exponents[1]), 1)

    @property
    def to_a_line(self) -> int:
        """The blocks of a line."""
        return -(-self.line // self.unit)

    def grid(self, x: mx.array) -> mx.array:
        """``x`` as (lines, blocks, elements), with zeros where the last block has fewer."""
        x, missing = x.reshape(-1, self.line), self.to_a_line * self.unit - self.line
        if missing:
            x = mx.pad(x, [(0, 0), (0, missing)])
        return x.reshape(len(x), self.to_a_line, self.unit)

    def ungrid(self, x: mx.array, shape: tuple[int, ...]) -> mx.array:
        """What :meth:`grid` took apart."""
        x = x.reshape(len(x), -1)
        return (x if x.shape[1] == self.line else x[:, : self.line]).reshape(shape)


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """The rows of a tensor, along its first axis, and the elements of each."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def exponents_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The shape of the exponents of a tensor that is not empty: (rows, blocks), or (blocks,) where rows are so short
    that a block covers several.
    """
    rows, columns = rows_and_columns(shape)
    if columns < min(block, SHORTEST_BLOCK) and rows * columns < rounding.LONGEST_AXIS:
        return (-(-rows // (block // columns)),)
    return rows, -(-columns // block)


def fits(shape: tuple[int, ...], exponents: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape can have exponents of that shape, with some size of blocks."""
    rows, columns = rows_and_columns(shape)
    if rows * columns == 0 or len(exponents) not in (1, 2) or (len(exponents) == 2 and exponents[0] != rows):
        return False
    blocks, units = exponents[-1], rows if len(exponents) == 1 else columns
    return 0 < blocks <= units and -(-units // -(-units // blocks)) == blocks


def decode(codes: mx.array, exponents: mx.array) -> mx.array:
    """The numbers, fp32, of codes (uint8) and the exponents of their blocks (uint8), which tell by their shape which
    element belongs to which.
    """
    blocks = Blocks.of(codes.shape, exponents.shape)
    numbers = decoded(blocks.grid(codes), exponents.reshape(-1, blocks.to_a_line, 1))
    return blocks.ungrid(numbers, codes.shape)


def encode(v: mx.array, exponents: mx.array, bits: mx.array) -> tuple[mx.array, mx.array]:
    """The codes and exponents, uint8, of numbers >= 0.

    Args:
        v: fp32; infinity stays so.
        exponents: What the exponents are at least, uint8.
        bits: 32 random bits for each element.
    """
    blocks = Blocks.of(v.shape, exponents.shape)
    v_grid = blocks.grid(v)
    new = mx.maximum(exponents.reshape(-1, blocks.to_a_line, 1), exponent_of(v_grid))
    return blocks.ungrid(coded(v_grid, new, blocks.grid(bits)), v.shape), new.reshape(exponents.shape)


def exponent_of(v: mx.array) -> mx.array:
    """The exponent, uint8, of a block of these numbers along the last axis, kept with a length of 1."""
    largest = mx.max(v.view(mx.int32), axis=-1, keepdims=True)  # order as that of the numbers, and faster
    exponent = (mx.clip(largest, 0, 0x7F800000) + 0x7FFFF) >> 23  # rounded up to 4 bits of mantissa; NaN is infinity
    return mx.clip(exponent, SMALLEST_EXPONENT, LARGEST_EXPONENT).astype(mx.uint8)


def decoded(codes: mx.array, exponents: mx.array) -> mx.array:
    """:func:`decode`, element by element."""
    codes = codes.astype(mx.uint32)
    mantissa = (codes & 15) | mx.where(codes < 16, word(0), word(16))
    unit = (mx.maximum(exponents, SMALLEST_EXPONENT).astype(mx.uint32) - 18) << 23
    return (mantissa << (mx.maximum(codes >> 4, 1) - 1)).astype(mx.float32) * unit.view(mx.float32)


def coded(v: mx.array, exponents: mx.array, bits: mx.array) -> mx.array:
    """The code, uint8, of each number in blocks of these exponents."""
    exponents = mx.maximum(exponents, SMALLEST_EXPONENT).astype(mx.uint32)
    units = v * ((272 - exponents) << 23).view(mx.float32)  # of the smallest code; a power of two makes no error
    small = units < 16  # then codes are 1 apart, and the fraction has 26 bits
    fixed = (mx.where(small, units, 0.0) * 2.0**26).astype(mx.int32).astype(mx.uint32)
    normal = ((v.view(mx.uint32) + (bits >> 13)) >> 19) - ((exponents - 15) << 4)
    return mx.where(small, (fixed + (bits >> 6)) >> 26, normal).astype(mx.uint8)
