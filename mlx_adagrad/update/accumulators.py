"""How ``v`` is stored: each accumulator says how it starts, how it is read for the update and how it is written
back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .. import checks
from ..checks import shown
from . import quantization, rounding

# What each parameter dtype computes in; a dtype that is not here is no parameter that can be optimised.
COMPUTE_DTYPE = {
    mx.float16: mx.float32,
    mx.bfloat16: mx.float32,
    mx.float32: mx.float32,
    mx.float64: mx.float64,
    mx.complex64: mx.float32,  # as two independent reals
}

HALF = (mx.float16, mx.bfloat16)

DTYPES = ("float32", "parameter", "bfloat16")
BLOCK_RANGE = (16, 65_536)
EXPONENTS = "exponents"  # beside the "v" of Quantized in the state of a parameter


def wide_dtype(w: mx.array) -> mx.Dtype:
    """What sums and averages beside the parameter ``w`` are kept in: fp32, unless ``w`` is wider."""
    return w.dtype if w.dtype in (mx.float64, mx.complex64) else mx.float32


@dataclass(frozen=True)
class Dense:
    r"""One number per element: :math:`v \leftarrow v + g^2`.

    Args:
        dtype: What ``v`` is stored in. ``"float32"`` (default): fp32 for fp16, bf16 and fp32 parameters, so that small
            squares are not lost (fp64 and complex64 parameters keep their own precision). ``"parameter"``: the
            parameter's dtype, as torch, Keras and stock MLX store it; half precision then stops growing early.
            ``"bfloat16"``: 2 bytes whatever the parameter's dtype (complex64 excepted), rounded up or down at random
            such that the mean is exact: it goes on growing.

    Raises:
        ValueError: If ``dtype`` is none of these.
    """

    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            allowed = ", ".join(map(repr, DTYPES))
            raise ValueError(f"[{type(self).__name__}] 'dtype' must be one of {allowed} but got {shown(self.dtype)}.")

    def at(self, parameter: mx.array) -> Dense:
        """The accumulator that holds for this parameter."""
        return self

    def is_random(self, parameter: mx.array) -> bool:
        """Whether ``v`` beside ``parameter`` is rounded with random bits."""
        return self.dtype == "bfloat16" and parameter.dtype != mx.complex64

    @property
    def plain(self) -> Dense:
        """The accumulator of those parameters whose ``v`` is rounded to nearest."""
        return self

    @property
    def draws(self) -> bool:
        """Whether ``v`` is rounded with random bits beside some parameters."""
        return self.dtype == "bfloat16"

    def storage_dtype(self, parameter: mx.array) -> mx.Dtype:
        """The dtype of ``v`` beside ``parameter``."""
        if self.dtype == "parameter" or parameter.dtype == mx.complex64:
            return parameter.dtype
        return mx.bfloat16 if self.dtype == "bfloat16" else COMPUTE_DTYPE[parameter.dtype]

    def shape(self, parameter: mx.array) -> tuple[int, ...]:
        """The shape of ``v`` beside ``parameter``."""
        return parameter.shape

    def init(self, parameter: mx.array, value: float) -> mx.array:
        """The ``v`` to start from: ``value`` everywhere (for complex parameters in both parts, as torch has it)."""
        dtype = self.storage_dtype(parameter)
        return mx.full(self.shape(parameter), complex(value, value) if dtype == mx.complex64 else value, dtype)

    def state(self, parameter: mx.array, value: float) -> dict[str, mx.array]:
        """What is kept beside ``parameter`` at the start, by the keys in its state."""
        if self.is_random(parameter):
            return self.stored(parameter, mx.full(self.shape(parameter), value, mx.float32))
        return {"v": self.init(parameter, value)}

    def stored(self, parameter: mx.array, v: mx.array) -> dict[str, mx.array]:
        """:meth:`state` for a ``v`` that is given as it is, in any dtype."""
        dtype = self.storage_dtype(parameter)
        if self.is_random(parameter):
            return {"v": rounding.stochastic(v, rounding.all_halves(v.shape, _fixed_key()), dtype)}
        return {"v": v.astype(dtype)}

    def problem(self, parameter: mx.array, state: dict[str, Any]) -> str | None:
        """What keeps the update from going on with ``state``, which has a ``v``, in words."""
        v, wanted = state["v"], self.shape(parameter)
        if v.shape != wanted:
            return f"has shape {v.shape} but must have {wanted}"
        if EXPONENTS in state:
            return quantized_problem(state)
        if not mx.issubdtype(v.dtype, mx.inexact):
            return f"is {v.dtype}, which no accumulator without '{EXPONENTS}' is"
        return None

    def adopted(self, parameter: mx.array, state: dict[str, Any]) -> dict[str, mx.array] | None:
        """What is kept beside ``parameter`` for a state that another accumulator has left; None if it is this one's."""
        return self.stored(parameter, dense_v(state)) if EXPONENTS in state else None

    def read(self, v: mx.array, like: mx.array) -> mx.array:
        """``v`` as the update computes with it: in the dtype of ``like``, broadcastable to its shape."""
        return v.astype(like.dtype)

    def write(self, v: mx.array, dtype: mx.Dtype) -> mx.array:
        """``v`` as it is stored."""
        return v.astype(dtype)

    def pool(self, square: mx.array) -> mx.array:
        """What of g² enters ``v``: all of it."""
        return square


@dataclass(frozen=True)
class RowWise(Dense):
    r"""One number per row of a table: :math:`v_r \leftarrow v_r + \operatorname{mean}_c g_{rc}^2`.

    FBGEMM's exact row-wise Adagrad: 1/D of the state of :class:`Dense` for a table of D columns. A row is an index of
    the first axis; ``v`` has shape ``(rows,)``. Parameters with fewer than two axes keep one number per element.

    Args:
        dtype: As in :class:`Dense`.

    Reference: FBGEMM's ``EXACT_ROWWISE_ADAGRAD`` (the mean, not the sum, of the squares of a row).
    """

    def shape(self, parameter: mx.array) -> tuple[int, ...]:
        return parameter.shape[:1] if parameter.ndim > 1 else parameter.shape

    def read(self, v: mx.array, like: mx.array) -> mx.array:
        return v.astype(like.dtype).reshape(v.shape + (1,) * (like.ndim - v.ndim))

    def write(self, v: mx.array, dtype: mx.Dtype) -> mx.array:
        return v.astype(dtype).reshape(v.shape[:1])

    def pool(self, square: mx.array) -> mx.array:
        if square.ndim < 2:
            return square
        if square.size == 0:  # rows without elements have no mean
            return mx.zeros(square.shape[:1] + (1,) * (square.ndim - 1), square.dtype)
        # by a power of two first, which is exact: the sum may overflow where the mean does not
        size = square.size // square.shape[0]
        power = 2.0 ** (size - 1).bit_length()
        return mx.sum(square * (1 / power), axis=tuple(range(1, square.ndim)), keepdims=True) * (power / size)


@dataclass(frozen=True)
class Quantized(Dense):
    r"""One byte per element: :math:`v` in 8 bits, 4 of them mantissa, with a power of two that a block shares.

    Rounded up or down at random such that the mean is exact, so that it goes on growing; the update itself divides by
    the root of :math:`v` before it is rounded. The noise is about 7 % of the step size, and does not grow. Within a
    block, :math:`v` keeps 4 bits over a ratio of :math:`2^{14}`, and is 0 or the smallest code (on average exact) below
    :math:`2^{-18}` of the largest; a :math:`g` that is not finite spoils its block, not only its element.

    A block lies inside a row (of the first axis), and ends where the row ends; rows of fewer than 34 elements share
    blocks, of whole rows. So an exponent costs at most 3 % more (1 byte a block).

    Args:
        block (int): Elements that share an exponent, 16 to 65536; a block may be smaller, never larger. Default:
            ``256``.
        min_size (int): Parameters with fewer elements (biases, scales) keep an fp32 :math:`v`, >= 0. Default: ``4096``.

    Raises:
        ValueError: For numbers outside these ranges.
        TypeError: For what is no integer.

    complex64 parameters keep a complex64 :math:`v`. Differs from bitsandbytes' 8-bit Adagrad (blocks of 256 elements,
    fp32 scales, a table of 256 values, rounding to nearest): after 5,000 steps of gradients over two decades the root
    of its :math:`v` is 7 % too small on average, with a noise of 16 %.
    """

    dtype: str = field(default="float32", init=False, repr=False)
    block: int = 256
    min_size: int = 4096

    def __post_init__(self) -> None:
        for name, low, high in (("block", *BLOCK_RANGE), ("min_size", 0, None)):
            number = checks.integer_between("Quantized", name, getattr(self, name), low, high)
            object.__setattr__(self, name, number)

    def quantizes(self, parameter: mx.array) -> bool:
        """Whether ``v`` beside ``parameter`` is kept in 8 bits."""
        return parameter.size >= max(self.min_size, 1) and parameter.dtype != mx.complex64

    def at(self, parameter: mx.array) -> Dense:
        return self if self.quantizes(parameter) else Dense()

    def is_random(self, parameter: mx.array) -> bool:
        return self.quantizes(parameter)

    @property
    def plain(self) -> Dense:
        return Dense()

    @property
    def draws(self) -> bool:
        return True

    def storage_dtype(self, parameter: mx.array) -> mx.Dtype:
        return mx.uint8 if self.quantizes(parameter) else super().storage_dtype(parameter)

    def stored(self, parameter: mx.array, v: mx.array) -> dict[str, mx.array]:
        if not self.quantizes(parameter):
            return super().stored(parameter, v)
        shape = quantization.exponents_shape(parameter.shape, self.block)
        return stored_like({EXPONENTS: mx.zeros(shape, mx.uint8)}, v)

    def adopted(self, parameter: mx.array, state: dict[str, Any]) -> dict[str, mx.array] | None:
        given = state.get(EXPONENTS)
        if self.quantizes(parameter) == (given is not None) and (
            given is None or given.shape == quantization.exponents_shape(parameter.shape, self.block)
        ):
            return None
        return self.stored(parameter, dense_v(state))


def dense_v(state: dict[str, Any]) -> mx.array:
    """The ``v`` in the state of one parameter, one number for each element, however it is kept."""
    return quantization.decode(state["v"], state[EXPONENTS]) if EXPONENTS in state else state["v"]


def stored_like(state: dict[str, Any], v: mx.array) -> dict[str, mx.array]:
    """``v``, one number for each element, in the way that ``state`` keeps its own."""
    if EXPONENTS not in state:
        return {"v": v.astype(state["v"].dtype)}
    bits = rounding.all_words(v.shape, _fixed_key())
    codes, exponents = quantization.encode(v.astype(mx.float32), mx.zeros_like(state[EXPONENTS]), bits)
    return {"v": codes, EXPONENTS: exponents}


def quantized_problem(state: dict[str, Any]) -> str | None:
    """What keeps a ``v`` with exponents from being read, in words."""
    v, exponents = state["v"], state[EXPONENTS]
    if not isinstance(exponents, mx.array) or exponents.dtype != mx.uint8 or v.dtype != mx.uint8:
        return f"and '{EXPONENTS}' must both be uint8"
    if not quantization.fits(v.shape, exponents.shape):
        return f"has shape {v.shape}, which '{EXPONENTS}' of shape {exponents.shape} do not fit"
    return None


def _fixed_key() -> mx.array:
    # a v that is given once is rounded with bits that are always the same
    return mx.array([0x243F6A88, 0x85A308D3], mx.uint32)  # digits of pi
