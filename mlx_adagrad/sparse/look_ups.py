"""What :func:`mlx_adagrad.value_and_grad` sees of the look-ups in a table while it differentiates."""

from __future__ import annotations

import io
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..update import kernels
from .gradient import RowSparse, canonical, named

_thread = threading.local()
_owners: dict[int, int] = {}  # the threads that differentiate tables now, by the id of the module
_owners_lock = threading.Lock()


def rows_of(weight: mx.array, x: mx.array) -> mx.array:
    """Rows of a table; 0 for an index that names none."""
    exists = named(x, len(weight))
    return mx.where(mx.expand_dims(exists, -1), weight[mx.where(exists, x, 0)], 0)


class Table:
    """One table during one call: what was looked up in it, and what came back for it.

    The gradient of a look-up is recorded, and a 0-d zero stands for it in MLX's own sum of the gradients of the table:
    as long as nothing but look-ups reaches the table, that sum stays 0-d.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.weight = module["weight"]
        self.watched: mx.array | None = None
        self.reached = False  # by the gradient of the loss
        self.closed = False
        self.replaced = False  # by fn, with other weights, which are none of ours
        self.shapes: list[tuple[int, ...]] = []  # of the indices of each look-up
        self.found: list[tuple[mx.array, mx.array]] = []
        self.sparse: RowSparse | None = None
        self.blocks: Iterator[mx.array] | None = None

    def watch(self) -> None:
        """Put the table in its module such that it is seen whether a gradient reaches it."""
        watched: Any = mx.custom_function(lambda weight: weight)

        @watched.vjp
        def reach(_primal: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
            self.reached = True
            return cotangent

        self.module["weight"] = self.watched = watched(self.module["weight"])

    def look_up(self, weight: mx.array, x: mx.array) -> mx.array:
        """The rows of the indices ``x``, so that their gradient is recorded.

        Where ``weight`` is a function of the table, which a module has put in its place, MLX's own gradient is right.
        """
        self.replaced = self.replaced or not self._is_table(weight)
        if self.replaced:
            return rows_of(weight, x)
        if self.blocks is not None:
            block = next(self.blocks)
            self.found.append((x, block))
            return rows_of(weight, x) + block
        self.shapes.append(x.shape)
        recorded: Any = mx.custom_function(rows_of)

        @recorded.vjp
        def record(primals: Any, cotangent: mx.array, _output: mx.array) -> tuple[mx.array, mx.array]:
            zero = mx.zeros((), weight.dtype)
            if self.closed:  # somebody differentiates what value_and_grad returned
                return _sparse([primals[1]], [cotangent], len(weight), weight.shape[1]).to_dense(), zero
            self.found.append((primals[1], cotangent))
            return zero, zero

        return recorded(weight, x)

    def _is_table(self, weight: mx.array) -> bool:
        """Whether ``weight`` is the table itself, perhaps handed on by ``nn.utils.checkpoint``."""
        if weight is self.watched or self.watched is None:
            return True
        if weight.shape != self.weight.shape or weight.dtype != self.weight.dtype:
            return False
        more = set(_operations(weight) - _operations(self.watched))
        # when a checkpoint computes anew, its inputs depend on all that it computed before
        return more <= {"Copy"} or ("Depends" in more and bool(self.shapes))

    def recorded(self) -> RowSparse:
        """The gradients of all look-ups, one after another."""
        if self.sparse is None:
            rows, columns = self.weight.shape
            none = mx.zeros((0,), mx.int32), mx.zeros((0,), self.weight.dtype)
            indices, values = zip(*(self.found or [none]), strict=True)
            self.sparse = _sparse(indices, values, rows, columns)
            self.found.clear()
        return self.sparse

    def gradient(self, total: mx.array, differentiable: bool) -> RowSparse | mx.array:
        """The gradient of the table, given MLX's sum of what did not come from recorded look-ups."""
        sparse, self.sparse = self.recorded(), None
        if not self.is_dense(total):
            return sparse.coalesced_by(kernels.available(), differentiable)
        return total + sparse.to_dense() if sparse.indices.size else total

    def is_dense(self, total: mx.array) -> bool:
        """Whether something else than look-ups reached the table, given MLX's sum of its gradients."""
        return self.reached and total.ndim > 0

    def close(self) -> None:
        """Give the module its table back, and let go of the graph, whose functions hold this object."""
        if self.module["weight"] is self.watched:
            self.module["weight"] = self.weight
        self.watched = self.blocks = None
        self.closed = True
        self.sparse = None
        self.found.clear()


def _operations(array: mx.array) -> Counter[str]:
    """The operations that an array is yet to be computed by."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return Counter(re.findall(r'label ="(\w+)', graph.getvalue()))


def _sparse(indices: Sequence[mx.array], values: Sequence[mx.array], rows: int, columns: int) -> RowSparse:
    """The gradients of look-ups of any shape, one after another."""
    flat = mx.concatenate([canonical(x.reshape(-1), rows) for x in indices])
    return RowSparse(flat, mx.concatenate([g.reshape(-1, columns) for g in values]), rows)


def table_of(module: nn.Module) -> Table | None:
    """The innermost call of this thread that differentiates for the table of ``module``."""
    for tables in reversed(getattr(_thread, "calls", ())):
        if id(module) in tables:
            return tables[id(module)]
    return None


def by_module(tables: dict[Any, Table]) -> dict[int, Table]:
    """The tables by their modules; of paths that share one, the last, as in MLX."""
    return {id(table.module): table for table in tables.values()}


@contextmanager
def owned(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep other threads from differentiating these tables meanwhile: MLX lets no thread use the arrays of another's
    trace, and they stand in the modules for a while.

    Raises:
        RuntimeError: If another thread does so already.
    """
    me, mine = threading.get_ident(), []
    try:
        with _owners_lock:
            for module in modules:
                if _owners.get(id(module), me) != me:
                    raise RuntimeError("[value_and_grad] another thread is differentiating the same SparseEmbedding.")
                if id(module) not in _owners:  # else an outer call of this thread owns it
                    _owners[id(module)] = me
                    mine.append(id(module))
        yield
    finally:
        with _owners_lock:
            for module in mine:
                del _owners[module]


@contextmanager
def watching(tables: dict[Any, Table]) -> Iterator[bool]:
    """Let the look-ups of this thread know of the tables; tells whether this is the outermost call."""
    if not hasattr(_thread, "calls"):
        _thread.calls = []
    _thread.calls.append(by_module(tables))
    try:
        yield len(_thread.calls) == 1
    finally:
        _thread.calls.pop()
        for table in tables.values():
            table.close()
