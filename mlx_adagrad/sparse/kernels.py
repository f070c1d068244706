"""The Metal kernels of the row-sparse update: their launches, beside those of ``kernels`` for dense gradients."""

from __future__ import annotations

import mlx.core as mx

from ..update import kernels
from ..update.accumulators import Dense, RowWise
from ..update.rule import KERNEL_SCALARS, Form, Scalars


def supports(accumulator: Dense, w: mx.array, values: mx.array) -> bool:
    """Whether there are kernels for a table ``w`` and a row-sparse gradient with these values."""
    return type(accumulator) in (Dense, RowWise) and w.dtype in kernels.PARAMETER_DTYPES and combines(values)


def combines(values: mx.array) -> bool:
    """Whether there is a kernel that adds up rows of these values."""
    return values.dtype in kernels.GRADIENT_DTYPES


def combine(values: mx.array, order: mx.array, run: mx.array, rows: int) -> mx.array:
    """The sum of each run of rows in fp32, 0 for those without members.

    Args:
        values: K rows.
        order: The order in which the members of a run follow each other.
        run: The number of the run at each place of that order, ascending; from ``rows`` on they are left out.
        rows: Runs to sum up.
    """
    places = len(order)
    start = mx.full((rows + 1,), places, mx.int32).at[run].minimum(mx.arange(places, dtype=mx.int32))
    flat = values.reshape(places, -1)
    (sums,) = kernels.kernel("rows_combine", ("values", "order", "run", "start"), ("sums",))(
        inputs=[flat, order, run, start],
        output_shapes=[(rows, flat.shape[1])],
        output_dtypes=[mx.float32],
        **_thread_per_element(rows, flat.shape[1]),
    )
    return sums.reshape(rows, *values.shape[1:])


class Functions:
    """What is written to rows of ``v`` and of ``w``, one launch each: ``row_ops._Functions`` in Metal.

    No kernel reads ``w``, and ``v`` is read only after it was written: MLX then writes both in place.

    Args:
        form: The branches of the formula, compiled into the kernels.
        accumulator: How ``v`` is stored.
        w_dtype: What the table is stored in.
        v_dtype: What ``v`` is stored in.
    """

    def __init__(self, form: Form, accumulator: Dense, w_dtype: mx.Dtype, v_dtype: mx.Dtype):
        self.row_wise = isinstance(accumulator, RowWise)
        self.w_dtype = w_dtype
        # a table in fp32 is added to, one in half precision gets new rows
        flags = ("ROW_WISE", self.row_wise), ("ADD_W", w_dtype == mx.float32), ("ADD_V", v_dtype == mx.float32)
        branches = [(name.upper(), value) for name, value in form._asdict().items()]
        self.template = [("W", w_dtype), *flags, *branches]

    def grown(self, v_rows: mx.array, w_rows: mx.array, g: mx.array, live: mx.array, s: Scalars) -> mx.array:
        """What is written to ``v``, in fp32: g² or its mean over each row, or the new rows in half precision."""
        rows, columns = len(g), g[0].size
        names = ("v_rows", "w_rows", "g", "live", *KERNEL_SCALARS)
        (grown,) = kernels.kernel("rows_grown", names, ("grown",))(
            inputs=[v_rows.reshape(-1), w_rows.reshape(-1), g.reshape(rows, columns), live.reshape(-1), *s.inputs()],
            template=self.template,
            output_shapes=[(rows,) if self.row_wise else (rows, columns)],
            output_dtypes=[mx.float32],
            **kernels.simdgroup_per_row(rows),
        )
        return grown if self.row_wise else grown.reshape(g.shape)

    def moved(
        self, v: mx.array, targets: mx.array, w_rows: mx.array, g: mx.array, live: mx.array, s: Scalars
    ) -> mx.array:
        """What is written to ``w``, given a ``v`` that has grown already, in whose rows ``targets`` it stands."""
        rows, columns = len(g), g[0].size
        names = ("v", "targets", "w_rows", "g", "live", *KERNEL_SCALARS)
        (moved,) = kernels.kernel("rows_moved", names, ("moved",))(
            inputs=[v, targets, w_rows.reshape(-1), g.reshape(-1), live.reshape(-1), *s.inputs()],
            template=self.template,
            output_shapes=[(rows, columns)],
            output_dtypes=[self.w_dtype],
            **_thread_per_element(rows, columns),
        )
        return moved.reshape(g.shape)


def _thread_per_element(rows: int, columns: int) -> dict[str, tuple[int, int, int]]:
    """A grid of a column along x and a row along y, in groups of whole rows where they are short."""
    across = min(columns, kernels.THREADS)
    return {"grid": (columns, rows, 1), "threadgroup": (across, kernels.THREADS // across, 1)}
