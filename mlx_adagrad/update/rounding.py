"""Rounding to half precision that loses nothing on average, and the random bits that it takes.

The bits are a function of (seed, step, parameter, element): nothing is stored but the seed, and a run that goes on from
a checkpoint draws what it would have drawn. Philox4x32-10 [1] makes four words of (seed, step, parameter), once a step
for all parameters: two are the key of the weights, two that of ``v``. A keyed form of the integer hash lowbias32 [2]
makes 32 bits of such a key and the number of an element, in few operations, since it is done for every element.
Everything is integer arithmetic on 32-bit words; ``metal/rounding.metal`` is its counterpart, bit for bit.

[1]: Salmon, J. et al., 2011. Parallel random numbers: as easy as 1, 2, 3. SC '11.
[2]: Wellons, C., 2018. Prospecting for hash functions, https://nullprogram.com/blog/2018/07/31/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from hashlib import blake2b
from typing import Any

import mlx.core as mx

from .compiled import compiled

MODES = ("nearest", "stochastic", "compensated")

# Philox4x32: the multipliers of a round, and what each round adds to the key [1, section 4.3].
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
# lowbias32 [2]
LOWBIAS = (0x7FEB352D, 0x846CA68B)

LARGEST_SEED = 2**64 - 1
LONGEST_AXIS = 2**31  # MLX counts the elements of an axis in int32


def word(value: int) -> mx.array:
    """A constant of 32 bits."""
    return mx.array(value, mx.uint32)


def philox(counter: Iterable[mx.array], key: Iterable[mx.array]) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Philox4x32-10: four random words for a counter of four words and a key of two; all uint32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1 = (mx.array(m, mx.uint64) for m in PHILOX_MULTIPLIERS)
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0.astype(mx.uint64) * m0, c2.astype(mx.uint64) * m1
        c0, c2 = _high(product1) ^ c1 ^ k0, _high(product0) ^ c3 ^ k1
        c1, c3 = _low(product1), _low(product0)
        k0, k1 = k0 + word(PHILOX_WEYL[0]), k1 + word(PHILOX_WEYL[1])
    return c0, c1, c2, c3


def _high(x: mx.array) -> mx.array:
    return (x >> 32).astype(mx.uint32)


def _low(x: mx.array) -> mx.array:
    return (x & mx.array(0xFFFFFFFF, mx.uint64)).astype(mx.uint32)


class Keys:
    """The keys of the parameters in one step.

    Args:
        seed: 0-d uint64.
        step: Steps made before this one, 0-d uint64.
    """

    def __init__(self, seed: mx.array, step: mx.array):
        self._seed, self._step = seed, step
        self._keys: dict[tuple[Any, ...], mx.array] = {}

    def prepare(self, paths: Iterable[tuple[Any, ...]]) -> None:
        """Make the keys of these parameters, all at once."""
        paths = list(paths)
        if paths:
            table = _table(self._seed, self._step, mx.array([digest(path) for path in paths], mx.uint32))
            self._keys.update((path, table[i]) for i, path in enumerate(paths))

    def of(self, path: tuple[Any, ...]) -> mx.array:
        """Four words for the parameter at ``path``: two for its weights, two for its ``v``."""
        if path not in self._keys:
            self.prepare([path])
        return self._keys[path]


@compiled
def _table(seed: mx.array, step: mx.array, parameters: mx.array) -> mx.array:
    step_words = (mx.broadcast_to(half(step), parameters.shape[:1]) for half in (_low, _high))
    counter = (parameters[:, 0], parameters[:, 1], *step_words)
    return mx.stack([*philox(counter, (_low(seed), _high(seed)))], axis=-1)


@cache
def digest(path: tuple[Any, ...]) -> tuple[int, int]:
    """Two words that stand for a parameter, whatever others there are beside it."""
    name = b"\0".join(str(key).encode() for key in path)
    number = int.from_bytes(blake2b(name, digest_size=8).digest(), "little")
    return number & 0xFFFFFFFF, number >> 32


def words(index: mx.array, key: mx.array) -> mx.array:
    """32 random bits for each element number (uint32; elements 2^32 apart share them) under a key of two words."""
    x = index ^ key[0]
    x = (x ^ (x >> 16)) * word(LOWBIAS[0]) ^ key[1]  # a second word: keys are not mere shifts of one sequence
    x = (x ^ (x >> 15)) * word(LOWBIAS[1])
    return x ^ (x >> 16)


def halves(index: mx.array, key: mx.array) -> mx.array:
    """16 random bits, in uint32, for each element number: half a word, shared with the neighbour."""
    return (words(index >> 1, key) >> ((index & 1) << 4)) & 0xFFFF


def all_halves(shape: tuple[int, ...], key: mx.array) -> mx.array:
    """:func:`halves` of all elements of a tensor, each word made once."""
    size = math.prod(shape)
    if size >= LONGEST_AXIS:
        return halves(numbers(shape), key)
    bits = words(mx.arange((size + 1) // 2, dtype=mx.uint32), key).view(mx.uint16)
    return (bits if size % 2 == 0 else bits[:size]).reshape(shape).astype(mx.uint32)


def all_words(shape: tuple[int, ...], key: mx.array) -> mx.array:
    """:func:`words` of all elements of a tensor."""
    return words(numbers(shape), key)


def numbers(shape: tuple[int, ...]) -> mx.array:
    """The number of each element of a tensor, row after row, modulo 2^32."""
    if math.prod(shape) < LONGEST_AXIS:
        return mx.arange(math.prod(shape), dtype=mx.uint32).reshape(shape)
    return rows_of_numbers(mx.arange(shape[0], dtype=mx.uint32), shape)


def rows_of_numbers(rows: mx.array, shape: tuple[int, ...]) -> mx.array:
    """:func:`numbers` of some rows, along the first axis, of a tensor of this shape."""
    inside = numbers(shape[1:]) if len(shape) > 1 else mx.zeros((), mx.uint32)
    return rows.astype(mx.uint32).reshape(-1, *(1,) * (len(shape) - 1)) * word(math.prod(shape[1:]) % 2**32) + inside


def stochastic(x: mx.array, bits: mx.array, dtype: mx.Dtype) -> mx.array:
    """``x`` in fp16 or bf16: one of its two neighbours, each with the probability that makes the mean exact.

    What the dtype holds stays as it is; NaN and infinity too. Beyond the largest finite number the nearest is taken, so
    that infinity comes where it would without this function.

    Args:
        x: fp32 (fp64 is rounded to it first).
        bits: 16 random bits for each element, in uint32.
        dtype: ``mx.float16`` or ``mx.bfloat16``.
    """
    x = x.astype(mx.float32).view(mx.uint32)
    return (_to_bfloat16(x, bits) if dtype == mx.bfloat16 else _to_float16(x, bits)).view(dtype)


def _to_bfloat16(x: mx.array, bits: mx.array) -> mx.array:
    magnitude = x & 0x7FFFFFFF
    nan = magnitude > 0x7F800000
    bits = mx.where(magnitude > 0x7F7F0000, word(0x8000), bits)
    return (mx.where(nan, x | 0x400000, x + bits) >> 16).astype(mx.uint16)


def _to_float16(x: mx.array, bits: mx.array) -> mx.array:
    magnitude = mx.minimum(x & 0x7FFFFFFF, 0x7F800001)
    # normal numbers drop 13 bits; 65504 is the largest finite one, 2^16 stands for infinity, 0x1C000 moves the exponent
    capped = mx.minimum(magnitude, 0x47800000)
    normal = ((capped + mx.where(magnitude > 0x477FE000, word(0x1000), bits >> 3)) >> 13) - 0x1C000
    # below 2^-14 the unit is 2^-24
    exponent = mx.minimum(magnitude >> 23, 112)
    small = shifted(magnitude, 126 - exponent, (bits << 16) | 0x8000)
    half = mx.where(magnitude < 0x38800000, small, normal)
    half = mx.where(magnitude > 0x7F800000, word(0x7E00), half)
    return (half | ((x >> 16) & 0x8000)).astype(mx.uint16)


def shifted(magnitude: mx.array, shift: mx.array, bits: mx.array) -> mx.array:
    """The mantissa of an fp32 without its last ``shift`` >= 1 bits, rounded up with the probability that they say.

    Args:
        magnitude: The bits of a number >= 0; one that is not normal counts as 0.
        shift: How many bits go.
        bits: 32 random bits.
    """
    mantissa = mx.where(magnitude < 0x800000, word(0), (magnitude & 0x7FFFFF) | 0x800000)
    within = mx.minimum(shift, 31)  # of a word; what lies further down has gone before
    return ((mantissa >> mx.minimum(shift - within, 31)) + (bits >> (32 - within))) >> within


def compensated(x: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """The number of ``dtype`` nearest to ``x``, and what it lacks, in ``dtype`` too (Kahan's compensation)."""
    rounded = x.astype(dtype)
    rest = x - rounded.astype(x.dtype)
    return rounded, mx.where(mx.isfinite(rest), rest, 0).astype(dtype)


def straight_through(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """``function(x, bits)`` with the derivative of ``x``: rounding has none. Such a step cannot be exported."""
    rounding: Any = mx.custom_function(function)

    @rounding.vjp
    def backward(primals: Any, cotangent: mx.array, _output: mx.array) -> tuple[mx.array, mx.array]:
        return cotangent.astype(primals[0].dtype), mx.zeros_like(primals[1])

    return rounding
