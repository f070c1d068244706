"""The Metal kernels of the row-sparse update: their launches, beside those of ``kernels`` for dense gradients."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from ..update import kernels
from ..update.accumulators import HALF, Dense, RowWise
from ..update.rule import KERNEL_SCALARS, Form, Scalars

# A threadgroup of rows_accumulate: up to 16 columns, 64 bytes of fp32, by up to 32 places.
COLUMNS, PLACES = 16, 32
# What rows_accumulate makes of v.
LEAVE, ADD, REPLACE = 0, 1, 2
# The branches of a sum that nothing is made of.
_SUM = Form(*[False] * len(Form._fields))


def supports(accumulator: Dense, w: mx.array, dtype: mx.Dtype) -> bool:
    """Whether there are kernels for a table ``w`` and a row-sparse gradient with values of this dtype."""
    return type(accumulator) in (Dense, RowWise) and w.dtype in kernels.PARAMETER_DTYPES and sums(dtype)


def sums(dtype: mx.Dtype) -> bool:
    """Whether there is a kernel that adds up rows of this dtype."""
    return dtype in kernels.GRADIENT_DTYPES


class Runs(NamedTuple):
    """A gradient in the order that sorts its indices: K places, of which the first of each run of equal indices, its
    head, holds the sum of the run.

    Args:
        order: The place of each index before.
        sums: The sums, (K, D) in fp32; 0 at other places.
        targets: The row that each place may write to, int32: its own, or that of place 0 where it names none.
        heads: The place of the head of each place's run, int32; 0 where it names no row.
        is_head: Whether a place is a head.
        v: What is to be added to ``v``, or its new rows at heads; None where ``v`` stays.
        total_v: These rows before they were rounded.
    """

    order: mx.array
    sums: mx.array
    targets: mx.array
    heads: mx.array
    is_head: mx.array
    v: mx.array | None = None
    total_v: mx.array | None = None


def sum_runs(indices: mx.array, values: mx.array, num_rows: int) -> Runs:
    """The sums of the runs, and nothing else."""
    none = nothing(mx.float32)
    arrays = indices, values, none, none
    return _accumulate(_SUM, arrays, num_rows, Scalars(none, none, none), False, LEAVE, mx.float32)


class Functions:
    """The two kernels of one (form, accumulator, dtype of ``w``, dtype of ``v``).

    Neither reads ``w``, and ``v`` is read only after it was written: MLX then writes both in place.
    """

    def __init__(self, form: Form, accumulator: Dense, w_dtype: mx.Dtype, v_dtype: mx.Dtype):
        self.form, self.w_dtype, self.v_dtype = form, w_dtype, v_dtype
        self.row_wise = isinstance(accumulator, RowWise)
        self.v_mode = (REPLACE if v_dtype in HALF else ADD) if form.update_accumulator else LEAVE

    def accumulate(
        self, indices: mx.array, values: mx.array, rows: tuple[mx.array, mx.array], num_rows: int, s: Scalars
    ) -> Runs:
        """The sums, and what is written to ``v``.

        Args:
            indices: K row numbers.
            values: K rows of the gradient.
            rows: The rows of ``w`` and of ``v`` for each index, one element of each where nobody needs them.
            num_rows: Rows of the table.
            s: The numbers of the step.
        """
        arrays = indices, values, *rows
        return _accumulate(self.form, arrays, num_rows, s, self.row_wise, self.v_mode, self.v_dtype)

    def descend(self, runs: Runs, v: mx.array, w_rows: mx.array, s: Scalars) -> mx.array:
        """What is added to ``w``, or put into it in half precision, given the new ``v``."""
        at_head = runs.total_v is not None
        columns = runs.sums.shape[1]
        names = ("v", "g", "order", "targets", "heads", "is_head", "w_rows", *KERNEL_SCALARS)
        arrays = runs.total_v if at_head else v, runs.sums, runs.order, runs.targets, runs.heads, runs.is_head
        (new_w,) = kernels.kernel("rows_descend", names, ("new_w",))(
            inputs=[*arrays, flat(w_rows), *s.inputs()],
            template=[
                ("W", self.w_dtype),
                ("ROW_WISE", self.row_wise),
                ("ADD_W", self.w_dtype not in HALF),
                ("V_AT_HEAD", at_head),
                *kernels.branches(self.form),
            ],
            output_shapes=[runs.sums.shape],
            output_dtypes=[self.w_dtype],
            **_thread_per_element(len(runs.order), columns),
        )
        return new_w


@cache
def functions(form: Form, accumulator: Dense, w_dtype: mx.Dtype, v_dtype: mx.Dtype) -> Functions:
    """The kernels of one combination."""
    return Functions(form, accumulator, w_dtype, v_dtype)


def _accumulate(
    form: Form,
    arrays: tuple[mx.array, mx.array, mx.array, mx.array],
    num_rows: int,
    s: Scalars,
    row_wise: bool,
    v_mode: int,
    v_dtype: mx.Dtype,
) -> Runs:
    indices, values, w_rows, v_rows = arrays[0], arrays[1], flat(arrays[2]), flat(arrays[3])
    places = len(indices)
    values = values.reshape(places, -1)
    columns = values.shape[1]
    order = mx.argsort(indices.view(_UNSIGNED[indices.dtype.size]))  # what names no row comes last, negative too
    across = min(columns, COLUMNS)
    v_shape = (places,) if row_wise else values.shape
    names = ("values", "order", "indices", "w_rows", "v_rows", "rows", *KERNEL_SCALARS)
    outputs = "sums", "targets", "heads", "is_head", "new_v", "total_v"
    shapes = values.shape, (places,), (places,), (places,), v_shape, v_shape
    dtypes = mx.float32, mx.int32, mx.int32, mx.bool_, v_dtype, mx.float32
    count = 4 + v_mode
    sums, targets, heads, is_head, *v = kernels.kernel(
        "rows_accumulate", names, outputs[:count], strided=True, v_mode=v_mode
    )(
        inputs=[values, order, indices, w_rows, v_rows, _number(num_rows), *s.inputs()],
        template=[("V", v_dtype), ("ROW_WISE", row_wise), *kernels.branches(form)],
        output_shapes=shapes[:count],
        output_dtypes=dtypes[:count],
        grid=(across if row_wise else columns, places, 1),
        threadgroup=(across, min(PLACES, kernels.THREADS // across), 1),
    )
    return Runs(order, sums, targets, heads, is_head, *v)


_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@cache
def nothing(dtype: mx.Dtype) -> mx.array:
    """Stands for rows that nobody reads, 0-d."""
    return mx.array(0.0, dtype)


def flat(rows: mx.array) -> mx.array:
    """Rows on one axis; 0-d arrays have one element too, but arrive in a kernel as references."""
    return rows.reshape(-1)


@cache
def _number(n: int) -> mx.array:
    return mx.array(n, mx.int32)


def _thread_per_element(rows: int, columns: int) -> kernels.Where:
    """A grid of a column along x and a row along y, in groups of whole rows where they are short."""
    across = min(columns, kernels.THREADS)
    return {"grid": (columns, rows, 1), "threadgroup": (across, kernels.THREADS // across, 1)}
