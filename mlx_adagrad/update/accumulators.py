"""How ``v`` is stored: each accumulator says how it starts, how it is read for the update and how it is written
back.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

# What each parameter dtype computes in; a dtype that is not here is no parameter that can be optimised.
COMPUTE_DTYPE = {
    mx.float16: mx.float32,
    mx.bfloat16: mx.float32,
    mx.float32: mx.float32,
    mx.float64: mx.float64,
    mx.complex64: mx.float32,  # as two independent reals
}

HALF = (mx.float16, mx.bfloat16)


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

    Raises:
        ValueError: If ``dtype`` is neither.
    """

    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "parameter"):
            raise ValueError(f"[Dense] 'dtype' must be 'float32' or 'parameter' but got {self.dtype!r}.")

    def storage_dtype(self, parameter: mx.array) -> mx.Dtype:
        """The dtype of ``v`` beside ``parameter``."""
        if self.dtype == "parameter" or parameter.dtype == mx.complex64:
            return parameter.dtype
        return COMPUTE_DTYPE[parameter.dtype]

    def shape(self, parameter: mx.array) -> tuple[int, ...]:
        """The shape of ``v`` beside ``parameter``."""
        return parameter.shape

    def init(self, parameter: mx.array, value: float) -> mx.array:
        """The ``v`` to start from: ``value`` everywhere (for complex parameters in both parts, as torch has it)."""
        dtype = self.storage_dtype(parameter)
        return mx.full(self.shape(parameter), complex(value, value) if dtype == mx.complex64 else value, dtype)

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
        return mx.mean(square, axis=tuple(range(1, square.ndim)), keepdims=True)
