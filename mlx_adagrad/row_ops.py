"""The update of the rows of a table that a gradient names, in MLX operations or with the kernels of ``row_kernels``."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import mlx.core as mx

from . import ops, row_kernels, rule
from .accumulators import COMPUTE_DTYPE, Dense, RowWise
from .rows import RowSparse, add_rows, evaluate
from .rule import Form, Scalars
from .step import Plan

HALF = (mx.float16, mx.bfloat16)


def update(
    plan: Plan,
    accumulator: Dense,
    w: mx.array,
    gradient: RowSparse,
    v: mx.array,
    row: mx.array | None = None,
    differentiable: bool = False,
) -> tuple[mx.array, mx.array]:
    """The new ``(w, v)`` of a table; rows that the gradient does not name stay as they are, bit for bit.

    MLX writes to rows in place in an array that nothing else reads. So rows that are read first, for weight decay and
    for the one rounding of half precision, are gathered *and evaluated*, unless something is tracing; then the table is
    copied. On the CPU so are those of ``v``, which then grows beside the update of ``w``. Elsewhere an fp32 ``v`` grows
    first and is gathered then.

    Args:
        plan: Form, numbers and dtypes of this step.
        accumulator: How ``v`` is stored.
        w: The table.
        gradient: Its gradient.
        v: Its accumulator.
        row: The numbers of the step as the Metal kernels take them; None: without kernels.
        differentiable: Use only what MLX can differentiate.
    """
    v = v.astype(plan.v_dtype)
    gradient = gradient.coalesced_by(row is not None, differentiable)
    if gradient.values.size == 0:
        return w, v
    form, s = plan.form, plan.scalars
    if row is None:
        functions: Any = _functions(form, accumulator, w.dtype, plan.v_dtype)
    else:
        functions = row_kernels.Functions(form, accumulator, w.dtype, plan.v_dtype, row)
    targets = gradient.targets()
    live = (gradient.indices < gradient.num_rows).reshape(-1, *(1,) * (w.ndim - 1))
    g = gradient.values.astype(COMPUTE_DTYPE[w.dtype])
    beside = row is None and not differentiable and form.update_accumulator and _worth_a_stream(v, g)
    w_rows, v_rows, beside = _read_first(form, w, v, targets, g, beside)
    if not form.update_accumulator:
        return _write(w, targets, live, functions.moved(v, targets, w_rows, g, live, s), differentiable), v
    grown = functions.grown(v_rows if v.dtype in HALF else mx.zeros((), g.dtype), w_rows, g, live, s)
    with ops.second_stream() if beside else nullcontext():
        v = _write(v, targets, live, grown, differentiable)
    if beside:  # what v will hold, to the bit
        moved = functions.moved(grown if v.dtype in HALF else v_rows + grown, None, w_rows, g, live, s)
    else:
        moved = functions.moved(v, targets, w_rows, g, live, s)
    return _write(w, targets, live, moved, differentiable), v


def _read_first(
    form: Form, w: mx.array, v: mx.array, targets: mx.array, g: mx.array, beside: bool
) -> tuple[mx.array, mx.array, bool]:
    """Those rows of ``w`` and ``v`` that are read before they are written (else 0-d zeros), evaluated if that is
    possible; and whether ``v`` can grow beside ``w``: it is wanted, and nothing is tracing.
    """
    w_rows = v_rows = none = mx.zeros((), g.dtype)
    if form.coupled or form.decoupled or w.dtype in HALF:
        w_rows = w[targets]
    if beside or form.update_accumulator and v.dtype in HALF:
        v_rows = v[targets]
    read = [rows for rows in (w_rows, v_rows) if rows is not none]
    return w_rows, v_rows, bool(read) and evaluate(read) and beside


def _worth_a_stream(v: mx.array, g: mx.array) -> bool:
    """Whether the rows of ``v`` are so many elements that the CPU should write them beside those of ``w``.

    Measured for 4,096 x 64 on two cores: the update of a table of a million rows takes 3.4 ms instead of 5.1.
    """
    return mx.default_device() == mx.cpu and v.ndim == g.ndim and g.size >= ops.PARALLEL_ELEMENTS


def _write(table: mx.array, targets: mx.array, live: mx.array, rows: mx.array, differentiable: bool) -> mx.array:
    """``table`` with ``rows`` added to it, or in half precision put into it."""
    if table.dtype not in HALF:
        return add_rows(table, targets, rows, differentiable)
    # One row must not be written in two ways: what is not live repeats the first row, which is live if any is, and
    # holds its old values if none is.
    live = live.reshape(-1, *(1,) * (rows.ndim - 1))
    new = mx.array(table)  # an assignment changes the Python object, and the old one is not ours
    first = mx.where(live.reshape(-1), targets, targets[:1])
    new[first] = mx.where(live, rows, rows[:1])
    return new


class _Functions:
    """What is written to rows of ``v`` and of ``w``, in MLX operations compiled for any number of rows.

    For a table in half precision these are its new rows. For others they are what is added; what is not ``live`` gets
    -0.0 then, since x + -0.0 is x for every x. ``w_rows`` and ``v_rows`` are 0-d zeros where nobody needs them: without
    decay the formula is linear in ``w``.
    """

    def __init__(self, form: Form, accumulator: Dense, w_dtype: mx.Dtype, v_dtype: mx.Dtype):
        self.accumulator = accumulator

        def grown(
            v_rows: mx.array, w_rows: mx.array, g: mx.array, live: mx.array, s: Scalars, idle: mx.array
        ) -> mx.array:
            w_rows, v_rows = w_rows.astype(g.dtype), accumulator.read(v_rows, g)
            rows = rule.accumulate(form, w_rows, g, v_rows, s, accumulator.pool)
            return mx.where(_acting(live, s), rows, v_rows if v_dtype in HALF else idle).astype(v_dtype)

        def moved(
            v_rows: mx.array, w_rows: mx.array, g: mx.array, live: mx.array, s: Scalars, idle: mx.array
        ) -> mx.array:
            w_rows = w_rows.astype(g.dtype)
            rows = rule.descend(form, w_rows, g, v_rows, s)
            if w_dtype in HALF:
                return mx.where(_acting(live, s), rows, w_rows).astype(w_dtype)
            return mx.where(_acting(live, s), rows - w_rows, idle).astype(w_dtype)

        # MLX 0.32.4 crashes on a shapeless reduction over an axis of length 1
        self._grown: Any = grown if isinstance(accumulator, RowWise) else mx.compile(grown, shapeless=True)
        self._moved: Any = mx.compile(moved, shapeless=True)

    def grown(self, v_rows: mx.array, w_rows: mx.array, g: mx.array, live: mx.array, s: Scalars) -> mx.array:
        """What is written to ``v``."""
        rows = self._grown(v_rows, w_rows, g, live, s, _idle(g))
        return self.accumulator.write(rows, rows.dtype)

    def moved(
        self, v: mx.array, targets: mx.array | None, w_rows: mx.array, g: mx.array, live: mx.array, s: Scalars
    ) -> mx.array:
        """What is written to ``w``, given the table ``v`` that has grown already, or its rows (``targets`` None)."""
        v_rows = v if targets is None else v[targets]
        return self._moved(self.accumulator.read(v_rows, g), w_rows, g, live, s, _idle(g))


def _acting(live: mx.array, s: Scalars) -> mx.array:
    return live if s.apply is None else mx.logical_and(live, s.apply)


def _idle(g: mx.array) -> mx.array:
    return mx.array(-0.0, g.dtype)  # an argument: compiled code loses the sign of a constant


@cache
def _functions(form: Form, accumulator: Dense, w_dtype: mx.Dtype, v_dtype: mx.Dtype) -> _Functions:
    return _Functions(form, accumulator, w_dtype, v_dtype)
