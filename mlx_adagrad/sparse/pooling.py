"""Sums of rows of a table, and their gradients, a block of rows at a time: no array holds a row for every index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ..update.tracing import evaluate
from .norms import limits

BLOCK = 2**17  # elements of the rows in a block: 0.5 MB in fp32


class BagSums:
    """Reads weighted sums of rows of a table, one for each bag of indices; a reading for :meth:`Table.read`.

    Args:
        bags: Number of bags.

    All functions take the same arrays after the table:

        x: Indices in int32, from 0 to the number of rows, which names none; of shape (bags, L), or (N,) for bags of
            different lengths.
        bag: In the latter case the bag of each index, ascending; ``bags`` for those in none. Else not read.
        weights: A factor on each row, of the shape of ``x``.
        limits: One more factor, which the gradient of the table does not see.
    """

    distinct = True

    def __init__(self, bags: int):
        self.shape = (bags,)

    def __call__(self, weight: mx.array, *arrays: mx.array) -> mx.array:
        """The sums, in fp32 (fp64 for a table in fp64)."""
        x, bag, weights, limits = arrays
        factors = (weights * limits).astype(_wide(weight))
        total = mx.zeros((*self.shape, weight.shape[1]), factors.dtype)
        for i, part in enumerate(_blocks(x, weight.shape[1])):
            rows = _rows(weight, _after(total, x[part], i)) * factors[part][..., None]
            total = total + rows.sum(axis=1) if x.ndim == 2 else self._added(total, bag[part], rows)
        return total

    def alone(self, weight: mx.array, *arrays: mx.array) -> mx.array:
        """The sums, with a dense gradient of the table that is made in blocks too."""
        function: Any = mx.custom_function(self.__call__)

        @function.vjp
        def backward(primals: Any, cotangent: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
            return (self._dense(cotangent, *primals), *self.gradients(cotangent, *primals))

        return function(weight, *arrays)

    def rows(self, cotangent: mx.array, num_rows: int, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        """The gradient of the table: indices that differ from each other, and rows of values.

        As many as rows were named, unless something is tracing: then as many as there may be.
        """
        x, bag, weights, _ = arrays
        columns = cotangent.shape[1]
        order, run, unique = _runs(x.reshape(-1), num_rows)
        most = len(unique)
        sums = mx.zeros((most, columns), cotangent.dtype)
        for i, part in enumerate(_blocks(order, columns) if most else ()):
            here, named = _after(sums, order[part], i), run[part] < most
            values = self._spread(cotangent, x, bag, here) * weights.reshape(-1)[here][:, None].astype(sums.dtype)
            sums = sums.at[mx.minimum(run[part], most - 1)].add(mx.where(named[:, None], values, 0))
        return unique, sums

    def gradients(self, cotangent: mx.array, weight: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        """The gradients of the arrays: of the weights, and zeros."""
        x, bag, weights, limits = arrays
        parts: list[mx.array] = []
        for part in _blocks(x, weight.shape[1]):
            spread = cotangent[:, None] if x.ndim == 2 else _rows(cotangent, bag[part])
            parts.append((_rows(weight, _after(parts[-1], x[part]) if parts else x[part]) * spread).sum(axis=-1))
        products = mx.concatenate(parts, axis=-1) if parts else mx.zeros(x.shape, cotangent.dtype)
        zero = mx.zeros((), cotangent.dtype)
        return zero, zero, (products * limits).astype(weights.dtype), zero

    def _dense(self, cotangent: mx.array, table: mx.array, *arrays: mx.array) -> mx.array:
        x, bag, weights, _ = arrays
        total = mx.zeros(table.shape, cotangent.dtype)
        for i, part in enumerate(_blocks(x, table.shape[1])):
            factors = weights[part][..., None].astype(total.dtype)
            spread = cotangent[:, None] if x.ndim == 2 else _rows(cotangent, bag[part])
            total = self._added(total, _after(total, x[part], i), spread * factors)
        return total.astype(table.dtype)

    @staticmethod
    def _added(total: mx.array, targets: mx.array, rows: mx.array) -> mx.array:
        """``total`` with the rows added at ``targets``, of which one may be no row."""
        if not len(total):
            return total
        exists = targets < len(total)
        return total.at[mx.minimum(targets, len(total) - 1)].add(mx.where(exists[..., None], rows, 0))

    @staticmethod
    def _spread(cotangent: mx.array, x: mx.array, bag: mx.array, places: mx.array) -> mx.array:
        """The cotangent of the bag at each of some places of ``x``."""
        return cotangent[places // x.shape[1]] if x.ndim == 2 else _rows(cotangent, bag[places])


def _after(computed: mx.array, x: mx.array, block: int = 0) -> mx.array:
    """The indices ``x``, not to be had before ``computed`` is: else MLX reads the rows of many blocks at once.

    A sum that is read is copied before more is added to it, so it is read only after as many elements as it has.
    ``mx.depends`` would copy nothing, but has no vmap.
    """
    if not computed.size or block % max(1, computed.size // BLOCK):
        return x
    first = mx.stop_gradient(computed.reshape(-1)[0])
    return x + mx.logical_and(first == 0, mx.array(False)).astype(x.dtype)


def limits_of(table: mx.array, x: mx.array, max_norm: float, norm_type: float) -> mx.array:
    """The factors that scale the rows of ``x`` down to ``max_norm``."""
    parts: list[mx.array] = []
    for part in _blocks(x, table.shape[1]):
        rows = _rows(table, _after(parts[-1], x[part]) if parts else x[part])
        parts.append(limits(rows, max_norm, norm_type))
    return mx.concatenate(parts, axis=-1) if parts else mx.zeros(x.shape)


def _wide(table: mx.array) -> mx.Dtype:
    return mx.float64 if table.dtype == mx.float64 else mx.float32


def _blocks(x: mx.array, columns: int) -> Iterator[tuple[slice, ...]]:
    """Slices of ``x``, along its last axis, whose rows fill a block."""
    rest, length = x.size // max(x.shape[-1], 1), x.shape[-1]
    step = max(1, BLOCK // max(1, rest * columns))
    for start in range(0, length if x.size else 0, step):
        yield (*(slice(None),) * (x.ndim - 1), slice(start, start + step))


def _rows(table: mx.array, x: mx.array) -> mx.array:
    """Rows in the dtype that sums are computed in; 0 for what names none."""
    if not len(table):
        return mx.zeros((*x.shape, table.shape[1]), _wide(table))
    rows = table[mx.minimum(x, len(table) - 1)].astype(_wide(table))
    return mx.where((x < len(table))[..., None], rows, 0)


def _runs(x: mx.array, num_rows: int) -> tuple[mx.array, mx.array, mx.array]:
    """The order that sorts the indices, the number of the run of equal ones at each place of it, and each run's index.

    Runs that name no row come last and have no index; there are as many indices as runs, unless something is tracing.
    """
    most = min(len(x), num_rows)
    if most == 0:
        return mx.zeros((0,), mx.int32), mx.zeros((0,), mx.int32), mx.zeros((0,), mx.int32)
    order = mx.argsort(x)
    x = x[order]
    heads = mx.concatenate([mx.ones((1,), mx.int32), (x[1:] != x[:-1]).astype(mx.int32)])
    run = mx.where(x < num_rows, mx.cumsum(heads) - 1, most)
    count = mx.sum(mx.where(x < num_rows, heads, 0))
    unique = mx.put_along_axis(mx.full((most + 1,), num_rows, mx.int32), run, x, 0)
    if evaluate([order, run, unique, count]):
        most = int(count.item())  # type: ignore[arg-type]
    return order, run, unique[:most]
