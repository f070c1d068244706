"""The update of the rows of a table that a gradient names, in MLX operations or with the kernels of ``row_kernels``."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from ..update import devices, ops, rule, streams
from ..update.accumulators import COMPUTE_DTYPE, HALF, Dense, RowWise
from ..update.compiled import compiled
from ..update.rule import Form, Scalars
from ..update.step import Plan
from ..update.tracing import evaluate
from . import kernels as row_kernels
from .gradient import RowSparse, add_rows, assign_rows, put_rows


def update(
    plan: Plan,
    accumulator: Dense,
    w: mx.array,
    gradient: RowSparse,
    v: mx.array,
    fused: bool = False,
    differentiable: bool = False,
) -> tuple[mx.array, mx.array]:
    """The new ``(w, v)`` of a table; rows that the gradient does not name stay as they are, bit for bit.

    MLX writes to rows in place in an array that nothing else reads. So rows that are read first are gathered *and
    evaluated*, unless something is tracing; then the table is copied. Where many rows are named, the CPU reads them all
    and puts the new ones in their places. Elsewhere only weight decay and the one rounding of half precision need rows;
    other changes are added to the tables.

    Args:
        plan: Form, numbers and dtypes of this step.
        accumulator: How ``v`` is stored.
        w: The table.
        gradient: Its gradient.
        v: Its accumulator.
        fused: Use the Metal kernels.
        differentiable: Use only what MLX can differentiate.
    """
    v = v.astype(plan.v_dtype)
    gradient = gradient.coalesced_by(fused, differentiable)
    if gradient.values.size == 0:
        return w, v
    g = gradient.values.astype(COMPUTE_DTYPE[w.dtype])
    if not fused and not differentiable and _worth_reading(w, g):
        read = _read(w, v, gradient)
        if read is not None:
            return _replace(plan, accumulator, w, v, gradient.indices, g, *read)
    return _add(plan, accumulator, w, v, gradient, g, fused, differentiable)


def _worth_reading(w: mx.array, g: mx.array) -> bool:
    """Whether to gather and evaluate the rows, so that the new ones can be put in their places.

    Measured for 4,096 x 64 of a million rows on two cores: 2.2 ms, and 4.9 by adding to the tables. A few rows are
    changed as fast by adding, and nothing is evaluated then.
    """
    return devices.on_cpu() and (g.size >= streams.PARALLEL_ELEMENTS or w.dtype in HALF)


def _read(w: mx.array, v: mx.array, gradient: RowSparse) -> tuple[mx.array, mx.array, int] | None:
    """The rows that the gradient names of ``w`` and ``v``, and how many they are; None where something is tracing."""
    with streams.second_stream(gradient.values.size):
        targets = gradient.targets()
        v_rows = v[targets]
    w_rows, named = w[targets], mx.sum(gradient.indices < gradient.num_rows)
    if not evaluate([w_rows, v_rows, named]):
        return None
    count: Any = named.item()
    return w_rows, v_rows, count


def _replace(
    plan: Plan,
    accumulator: Dense,
    w: mx.array,
    v: mx.array,
    indices: mx.array,
    g: mx.array,
    w_rows: mx.array,
    v_rows: mx.array,
    named: int,
) -> tuple[mx.array, mx.array]:
    """The new ``(w, v)``: their first ``named`` rows are computed like any dense tensor and put in their places."""
    functions = ops.functions(plan.form, accumulator, plan.v_dtype, shapeless=True)
    if functions.rounds:
        w_rows, v_rows = functions.both(w_rows, g, v_rows, plan.scalars)
    else:
        v_rows = functions.accumulate(w_rows, g, v_rows, plan.scalars)
        if plan.form.coupled:
            evaluate([v_rows])  # else it is still reading w_rows when they could be overwritten
        w_rows = functions.descend(w_rows, g, v_rows, plan.scalars)
    if plan.form.update_accumulator:
        with streams.second_stream(g.size):
            v = put_rows(v, indices[:named], v_rows[:named])
    return put_rows(w, indices[:named], w_rows[:named]), v


def _add(
    plan: Plan,
    accumulator: Dense,
    w: mx.array,
    v: mx.array,
    gradient: RowSparse,
    g: mx.array,
    fused: bool,
    differentiable: bool,
) -> tuple[mx.array, mx.array]:
    """The new ``(w, v)``: first ``v`` grows, then its rows say how ``w`` moves."""
    form, s = plan.form, plan.scalars
    make: Any = row_kernels.Functions if fused else _functions
    functions = make(form, accumulator, w.dtype, plan.v_dtype)
    targets = gradient.targets()
    live = (gradient.indices < gradient.num_rows).reshape(-1, *(1,) * (w.ndim - 1))
    w_rows = v_rows = none = mx.zeros((), g.dtype)
    if form.coupled or form.decoupled or w.dtype in HALF:
        w_rows = w[targets]
    if form.update_accumulator and v.dtype in HALF:
        v_rows = v[targets]
    read = [rows for rows in (w_rows, v_rows) if rows is not none]
    if read:
        evaluate(read)
    if not form.update_accumulator:
        return _write(w, targets, live, functions.moved(v, targets, w_rows, g, live, s), differentiable), v
    grown = functions.grown(v_rows, w_rows, g, live, s)
    v = _write(v, targets, live, grown.astype(v.dtype), differentiable)
    if v.dtype in HALF:  # the update divides by the root of v before it is rounded
        moved = functions.moved(grown, mx.arange(len(g), dtype=mx.int32), w_rows, g, live, s)
    else:
        moved = functions.moved(v, targets, w_rows, g, live, s)
    return _write(w, targets, live, moved, differentiable), v


def _write(table: mx.array, targets: mx.array, live: mx.array, rows: mx.array, differentiable: bool) -> mx.array:
    """``table`` with ``rows`` added to it, or in half precision put into it."""
    if table.dtype not in HALF:
        return add_rows(table, targets, rows, differentiable)
    # One row must not be written in two ways: what is not live repeats the first row, which is live if any is, and
    # holds its old values if none is.
    live = live.reshape(-1, *(1,) * (rows.ndim - 1))
    first = mx.where(live.reshape(-1), targets, targets[:1])
    return assign_rows(table, first, mx.where(live, rows, rows[:1]))


class _Functions:
    """What is written to rows of ``v`` and of ``w``, in MLX operations compiled for any number of rows.

    For a table in half precision these are its new rows, of ``v`` not rounded yet. For others they are what is added;
    what is not ``live`` gets -0.0 then, since x + -0.0 is x for every x. ``w_rows`` and ``v_rows`` are 0-d zeros where
    nobody needs them: without decay the formula is linear in ``w``.
    """

    def __init__(self, form: Form, accumulator: Dense, w_dtype: mx.Dtype, v_dtype: mx.Dtype):
        self.accumulator = accumulator

        def grown(
            v_rows: mx.array, w_rows: mx.array, g: mx.array, live: mx.array, s: Scalars, idle: mx.array
        ) -> mx.array:
            w_rows, v_rows = w_rows.astype(g.dtype), accumulator.read(v_rows, g)
            rows = rule.accumulate(form, w_rows, g, v_rows, s, accumulator.pool)
            return mx.where(_acting(live, s), rows, v_rows if v_dtype in HALF else idle)

        def moved(
            v_rows: mx.array, w_rows: mx.array, g: mx.array, live: mx.array, s: Scalars, idle: mx.array
        ) -> mx.array:
            w_rows = w_rows.astype(g.dtype)
            rows = rule.descend(form, w_rows, g, v_rows, s)
            if w_dtype in HALF:
                return mx.where(_acting(live, s), rows, w_rows).astype(w_dtype)
            return mx.where(_acting(live, s), rows - w_rows, idle).astype(w_dtype)

        # MLX 0.32.4 crashes on a shapeless reduction over an axis of length 1
        self._grown: Any = grown if isinstance(accumulator, RowWise) else compiled(grown, shapeless=True)
        self._moved: Any = compiled(moved, shapeless=True)

    def grown(self, v_rows: mx.array, w_rows: mx.array, g: mx.array, live: mx.array, s: Scalars) -> mx.array:
        """What is written to ``v``."""
        rows = self._grown(v_rows, w_rows, g, live, s, _idle(g))
        return self.accumulator.write(rows, rows.dtype)

    def moved(
        self, v: mx.array, targets: mx.array, w_rows: mx.array, g: mx.array, live: mx.array, s: Scalars
    ) -> mx.array:
        """What is written to ``w``, given a ``v`` that has grown already, in whose rows ``targets`` it stands."""
        return self._moved(self.accumulator.read(v[targets], g), w_rows, g, live, s, _idle(g))


def _acting(live: mx.array, s: Scalars) -> mx.array:
    return live if s.apply is None else mx.logical_and(live, s.apply)


def _idle(g: mx.array) -> mx.array:
    return mx.array(-0.0, g.dtype)  # an argument: compiled code loses the sign of a constant


@cache
def _functions(form: Form, accumulator: Dense, w_dtype: mx.Dtype, v_dtype: mx.Dtype) -> _Functions:
    return _Functions(form, accumulator, w_dtype, v_dtype)
