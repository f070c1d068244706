"""The update of the rows of a table that a gradient names, in MLX operations or with the kernels of ``row_kernels``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from ..update import devices, ops, rule, streams
from ..update.accumulators import COMPUTE_DTYPE, HALF, Dense, RowWise
from ..update.compiled import compiled
from ..update.rule import Form, Scalars
from ..update.step import Plan
from ..update.tracing import evaluate
from . import kernels as row_kernels
from .gradient import RowSparse, add_rows, assign_rows, named, put_rows


class Begun(NamedTuple):
    """The update of a table, begun.

    Args:
        rows: What it reads of the tables, to be evaluated, of all tables at once, before it goes on.
        finish: Makes the new ``(w, v)``, given whether they were.
    """

    rows: list[mx.array]
    finish: Callable[[bool], tuple[mx.array, mx.array]]


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

    See :func:`begin`.
    """
    (new,) = finish_all([begin(plan, accumulator, w, gradient, v, fused, differentiable)])
    return new


def finish_all(begun: list[Begun]) -> list[tuple[mx.array, mx.array]]:
    """The new ``(w, v)`` of tables: the host waits once for what they all read."""
    rows = [x for table in begun for x in table.rows]
    evaluated = evaluate(rows) if rows else True
    return [table.finish(evaluated) for table in begun]


def begin(
    plan: Plan,
    accumulator: Dense,
    w: mx.array,
    gradient: RowSparse,
    v: mx.array,
    fused: bool = False,
    differentiable: bool = False,
) -> Begun:
    """Begin the update of a table.

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
    if gradient.size == 0 or gradient.places == 0:
        return Begun([], lambda _: (w, v))
    if fused:
        return _begin_fused(plan, accumulator, w, gradient.unsummed, v)
    gradient = gradient.coalesced_by(False, differentiable)
    g = gradient.values.astype(COMPUTE_DTYPE[w.dtype])
    if differentiable or not _worth_reading(w, g):
        return _begin_add(plan, accumulator, w, v, gradient, g, differentiable)
    read = _read(w, v, gradient)

    def finish(evaluated: bool) -> tuple[mx.array, mx.array]:
        if evaluated:
            return _replace(plan, accumulator, w, v, gradient.indices, g, *read)
        return _begin_add(plan, accumulator, w, v, gradient, g, False).finish(False)

    return Begun([*read], finish)


def _begin_fused(plan: Plan, accumulator: Dense, w: mx.array, gradient: RowSparse, v: mx.array) -> Begun:
    """:func:`begin` with the kernels: they sort, add up and write without knowing how many rows are named."""
    functions, s = row_kernels.functions(plan.form, accumulator, w.dtype, plan.v_dtype), plan.scalars
    indices, values, num_rows = gradient.indices, gradient.values, gradient.num_rows
    w_rows, v_rows = _rows(plan, w, v, lambda: mx.where(named(indices, num_rows), indices, 0).astype(mx.int32))

    def finish(_: bool) -> tuple[mx.array, mx.array]:
        runs, new_v = functions.accumulate(indices, values, (w_rows, v_rows), num_rows, s), v
        if runs.v is not None:
            rows = runs.v if v.dtype not in HALF else runs.v[runs.heads]
            new_v = _write(v, runs.targets, rows.reshape(len(indices), *v.shape[1:]), False)
        rows = functions.descend(runs, new_v, w_rows, s).reshape(values.shape)
        return _write(w, runs.targets, rows, False), new_v

    return Begun([rows for rows in (w_rows, v_rows) if rows.ndim], finish)


def _rows(plan: Plan, w: mx.array, v: mx.array, targets: Callable[[], mx.array]) -> tuple[mx.array, mx.array]:
    """The rows of ``w`` and of ``v`` that the formula reads; a 0-d zero where it reads none."""
    form, none = plan.form, row_kernels.nothing(COMPUTE_DTYPE[w.dtype])
    reads_w = form.coupled or form.decoupled or w.dtype in HALF
    reads_v = form.update_accumulator and v.dtype in HALF
    at = targets() if reads_w or reads_v else none
    return w[at] if reads_w else none, v[at] if reads_v else none


def _worth_reading(w: mx.array, g: mx.array) -> bool:
    """Whether to gather and evaluate the rows, so that the new ones can be put in their places.

    Measured for 4,096 x 64 of a million rows on two cores: 2.2 ms, and 4.9 by adding to the tables. A few rows are
    changed as fast by adding, and nothing is evaluated then.
    """
    return devices.on_cpu() and (g.size >= streams.PARALLEL_ELEMENTS or w.dtype in HALF)


def _read(w: mx.array, v: mx.array, gradient: RowSparse) -> tuple[mx.array, mx.array, mx.array]:
    """The rows that the gradient names of ``w`` and ``v``, and how many they are."""
    with streams.second_stream(gradient.values.size):
        targets = gradient.targets()
        v_rows = v[targets]
    return w[targets], v_rows, mx.sum(gradient.indices < gradient.num_rows)


def _replace(
    plan: Plan,
    accumulator: Dense,
    w: mx.array,
    v: mx.array,
    indices: mx.array,
    g: mx.array,
    w_rows: mx.array,
    v_rows: mx.array,
    how_many: Any,
) -> tuple[mx.array, mx.array]:
    """The new ``(w, v)``: their first ``how_many`` rows are computed like any dense tensor and put in their places."""
    count = how_many.item()
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
            v = put_rows(v, indices[:count], v_rows[:count])
    return put_rows(w, indices[:count], w_rows[:count]), v


def _begin_add(
    plan: Plan,
    accumulator: Dense,
    w: mx.array,
    v: mx.array,
    gradient: RowSparse,
    g: mx.array,
    differentiable: bool,
) -> Begun:
    """:func:`begin` by adding to the tables: first to ``v``, whose rows then say what is added to ``w``."""
    form, s = plan.form, plan.scalars
    functions = _functions(form, accumulator, w.dtype, plan.v_dtype)
    targets = gradient.targets()
    valid = (gradient.indices < gradient.num_rows).reshape(-1, *(1,) * (w.ndim - 1))
    w_rows, v_rows = _rows(plan, w, v, lambda: targets)
    if form.guarded and form.update_accumulator and not v_rows.ndim:
        v_rows = v[targets]  # for whether the sums are finite

    def finish(_: bool) -> tuple[mx.array, mx.array]:
        new_v, places = v, targets
        read_v = new_v
        if form.update_accumulator:
            total = functions.accumulate(v_rows, w_rows, g, valid, s)
            read_v = new_v = _write_valid(v, targets, valid, total.astype(v.dtype), differentiable)
            if v.dtype in HALF:  # the update divides by the root of v before it is rounded
                read_v, places = total, mx.arange(len(g), dtype=mx.int32)
        rows = functions.descend(read_v, places, w_rows, g, valid, s)
        return _write_valid(w, targets, valid, rows, differentiable), new_v

    return Begun([rows for rows in (w_rows, v_rows) if rows.ndim], finish)


def _write_valid(
    table: mx.array, targets: mx.array, valid: mx.array, rows: mx.array, differentiable: bool
) -> mx.array:
    if table.dtype in HALF:
        # One row must not be written in two ways: what is not valid repeats the first row, which is valid if any is,
        # and holds its old values if none is.
        valid = valid.reshape(-1, *(1,) * (rows.ndim - 1))
        targets = mx.where(valid.reshape(-1), targets, targets[:1])
        rows = mx.where(valid, rows, rows[:1])
    return _write(table, targets, rows, differentiable)


def _write(table: mx.array, targets: mx.array, rows: mx.array, differentiable: bool) -> mx.array:
    """``table`` with ``rows`` added to it, or in half precision put into it."""
    if table.dtype in HALF:
        return assign_rows(table, targets, rows)
    return add_rows(table, targets, rows, differentiable)


class _Functions:
    """What is written to rows of ``v`` and of ``w``, in MLX operations compiled for any number of rows.

    For a table in half precision these are its new rows, of ``v`` not rounded yet. For others they are what is added;
    what is not ``valid`` gets -0.0 then, since x + -0.0 is x for every x. ``w_rows`` and ``v_rows`` are 0-d zeros where
    nobody needs them: without decay the formula is linear in ``w``.
    """

    def __init__(self, form: Form, accumulator: Dense, w_dtype: mx.Dtype, v_dtype: mx.Dtype):
        self.accumulator = accumulator

        def accumulate(
            v_rows: mx.array, w_rows: mx.array, g: mx.array, valid: mx.array, s: Scalars, idle: mx.array
        ) -> mx.array:
            w_rows, v_rows = w_rows.astype(g.dtype), accumulator.read(v_rows, g)
            if form.guarded and v_dtype not in HALF:
                rows = rule.accumulate(form, w_rows, g, mx.zeros_like(v_rows), s, accumulator.pool)
                return mx.where(mx.logical_and(_acting(valid, s), mx.isfinite(v_rows + rows)), rows, idle)
            rows = rule.accumulate(form, w_rows, g, v_rows, s, accumulator.pool, v_dtype if v_dtype in HALF else None)
            return mx.where(_acting(valid, s), rows, v_rows if v_dtype in HALF else idle)

        def descend(
            v_rows: mx.array, w_rows: mx.array, g: mx.array, valid: mx.array, s: Scalars, idle: mx.array
        ) -> mx.array:
            w_rows = w_rows.astype(g.dtype)
            rows = rule.descend(form, w_rows, g, v_rows, s, w_dtype if w_dtype in HALF else None)
            if w_dtype in HALF:
                return mx.where(_acting(valid, s), rows, w_rows).astype(w_dtype)
            return mx.where(_acting(valid, s), rows - w_rows, idle).astype(w_dtype)

        # MLX 0.32.4 crashes on a shapeless reduction over an axis of length 1
        self._accumulate: Any = accumulate if isinstance(accumulator, RowWise) else compiled(accumulate, shapeless=True)
        self._descend: Any = compiled(descend, shapeless=True)

    def accumulate(self, v_rows: mx.array, w_rows: mx.array, g: mx.array, valid: mx.array, s: Scalars) -> mx.array:
        """What is written to ``v``."""
        rows = self._accumulate(v_rows, w_rows, g, valid, s, _idle(g))
        return self.accumulator.write(rows, rows.dtype)

    def descend(
        self, v: mx.array, targets: mx.array, w_rows: mx.array, g: mx.array, valid: mx.array, s: Scalars
    ) -> mx.array:
        """What is written to ``w``, given the new ``v``, in whose rows ``targets`` it stands."""
        return self._descend(self.accumulator.read(v[targets], g), w_rows, g, valid, s, _idle(g))


def _acting(valid: mx.array, s: Scalars) -> mx.array:
    return valid if s.apply is None else mx.logical_and(valid, s.apply)


def _idle(g: mx.array) -> mx.array:
    return mx.array(-0.0, g.dtype)  # an argument: compiled code loses the sign of a constant


@cache
def _functions(form: Form, accumulator: Dense, w_dtype: mx.Dtype, v_dtype: mx.Dtype) -> _Functions:
    return _Functions(form, accumulator, w_dtype, v_dtype)
