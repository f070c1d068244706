"""``update.narrow`` for the rows that a row-sparse gradient names."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from ..update import narrow, narrow_kernels, quantization, rounding
from ..update.accumulators import COMPUTE_DTYPE, EXPONENTS
from ..update.compiled import compiled
from ..update.narrow import Kept
from ..update.rule import Scalars
from ..update.tracing import evaluate
from .gradient import RowSparse, assign_rows


def update(
    functions: narrow.Functions,
    w: mx.array,
    gradient: RowSparse,
    kept: Kept,
    s: Scalars,
    key: mx.array,
    fused: bool = False,
) -> tuple[mx.array, Kept]:
    """The new weights and state; rows that the gradient does not name stay as they are, bit for bit.

    The rows are gathered and evaluated, unless something is tracing, so that the new ones can be put in their places.
    An element gets the random bits that a dense gradient would give it.

    Args:
        functions: The update of this kind of tensor.
        w: The table.
        gradient: Its gradient.
        kept: The arrays of its state.
        s: The numbers of the step.
        key: The key of the parameter in this step, four words.
        fused: Whether kernels run.
    """
    gradient = gradient.coalesced_by(fused, functions.kind.differentiable)
    if gradient.values.size == 0:
        return w, kept
    rows, targets = _row_functions(functions), gradient.targets()
    live = gradient.indices < gradient.num_rows
    if functions.kind.quantized and kept[EXPONENTS].ndim == 1:
        return _update_shared(rows, w, gradient.values, kept, targets, live, s, key)
    kept_rows = {name: x[targets] for name, x in kept.items()}
    w_rows = w[targets]
    evaluate([w_rows, kept_rows])
    if fused:
        new_w, new = narrow_kernels.Launch(functions, w_rows, gradient.values, kept_rows, s, key, (targets, live)).run()
    else:
        new_w, new = rows.update(w_rows, gradient.values, kept_rows, targets, live, s, key, w.shape)
    return put(w, new_w, targets, live), {name: put(kept[name], x, targets, live) for name, x in new.items()}


def _update_shared(
    rows: _RowFunctions,
    w: mx.array,
    g: mx.array,
    kept: Kept,
    targets: mx.array,
    live: mx.array,
    s: Scalars,
    key: mx.array,
) -> tuple[mx.array, Kept]:
    """:func:`update` where a block of ``v`` covers several rows: if its exponent grows, all their codes are shifted."""
    exponents = kept[EXPONENTS]
    together = quantization.Blocks.of(w.shape, exponents.shape).rows
    blocks = targets // together
    members = mx.minimum(blocks[:, None] * together + mx.arange(together, dtype=mx.int32), len(w) - 1).reshape(-1)
    kept_rows = {name: x[targets] for name, x in kept.items() if name != EXPONENTS}
    codes, w_rows = kept["v"][members], w[targets]
    evaluate([w_rows, kept_rows, codes])
    new_w, new, exponents, codes = rows.update_shared(
        (w_rows, g, kept_rows), (targets, live, blocks, members), exponents, codes, s, key, w.shape
    )
    kept = {**kept, EXPONENTS: exponents, "v": assign_rows(kept["v"], members, codes)}
    return put(w, new_w, targets, live), kept | {name: put(kept[name], x, targets, live) for name, x in new.items()}


def put(table: mx.array, rows: mx.array, targets: mx.array, live: mx.array) -> mx.array:
    """``table`` with the rows that are ``live`` in their places.

    One row must not be written in two ways: what is not live repeats the first row, which is live if any is, and holds
    its old values if none is.
    """
    places = mx.where(live, targets, targets[:1])
    rows = mx.where(live.reshape(-1, *(1,) * (rows.ndim - 1)), rows, rows[:1])
    return assign_rows(table if table.dtype == rows.dtype else table.astype(rows.dtype), places, rows)


class _RowFunctions:
    """The new rows of a table and of its state, compiled."""

    def __init__(self, functions: narrow.Functions):
        self.functions = functions
        self.update: Any = compiled(self._update)
        self.update_shared: Any = compiled(self._update_shared)

    def _update(
        self,
        w: mx.array,
        g: mx.array,
        kept: Kept,
        targets: mx.array,
        live: mx.array,
        s: Scalars,
        key: mx.array,
        shape: tuple[int, ...],
    ) -> tuple[mx.array, Kept]:
        functions, elements = self.functions, rounding.rows_of_numbers(targets, shape)
        new, total = functions.computed(w, g, kept, functions.read_v(kept, w), s)
        weights = functions.weights(new, lambda: rounding.halves(elements, key[:2]))
        if functions.kind.quantized:
            stored = functions.encoded(total, kept[EXPONENTS], rounding.words(elements, key[2:]))
        else:
            where = elements if kept["v"].shape == w.shape else targets.astype(mx.uint32)
            stored = {"v": functions.stored_v(total, lambda: rounding.halves(where, key[2:]))}
        return functions.gated(_acting(live, s), w, kept, *weights, stored)

    def _update_shared(
        self,
        rows: tuple[mx.array, mx.array, Kept],
        where: tuple[mx.array, mx.array, mx.array, mx.array],
        exponents: mx.array,
        codes: mx.array,
        s: Scalars,
        key: mx.array,
        shape: tuple[int, ...],
    ) -> tuple[mx.array, Kept, mx.array, mx.array]:
        (w, g, kept), (targets, live, blocks, members), functions = rows, where, self.functions
        elements = rounding.rows_of_numbers(targets, shape)
        v = quantization.decoded(kept["v"], _beside(exponents[blocks], w)).astype(COMPUTE_DTYPE[w.dtype])
        new, total = functions.computed(w, g, kept, v, s)
        weights = functions.weights(new, lambda: rounding.halves(elements, key[:2]))
        acts = _acting(live, s)
        total = mx.where(_beside(acts, total), total, v).astype(mx.float32)
        needed = quantization.exponent_of(total.reshape(len(total), -1)).reshape(-1)
        grown = exponents.at[blocks].maximum(mx.where(acts, needed, 0).astype(mx.uint8))
        member_blocks = mx.repeat(blocks, len(members) // len(blocks))
        bits = rounding.words(rounding.rows_of_numbers(members, shape), key[2:])
        old = quantization.decoded(codes, _beside(exponents[member_blocks], codes))
        shifted = quantization.coded(old, _beside(grown[member_blocks], codes), bits)
        own = quantization.coded(total, _beside(grown[blocks], w), rounding.words(elements, key[2:]))
        new_w, new_kept = functions.gated(acts, w, kept, *weights, {})
        # where nothing happens, total is the old v, and its code the shifted one
        return new_w, new_kept | {"v": own}, grown, shifted


def _acting(live: mx.array, s: Scalars) -> mx.array:
    return live if s.apply is None else mx.logical_and(live, s.apply)


def _beside(x: mx.array, rows: mx.array) -> mx.array:
    """One number for each row, so that it meets all elements of the row."""
    return x.reshape(-1, *(1,) * (rows.ndim - 1))


@cache
def _row_functions(functions: narrow.Functions) -> _RowFunctions:
    return _RowFunctions(functions)
