"""What :func:`mlx_adagrad.value_and_grad` sees of the look-ups in a table while it differentiates."""

from __future__ import annotations

import io
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..update import kernels
from .gradient import RowSparse, canonical, distinct_rows, named

_thread = threading.local()
_owners: dict[int, Call] = {}  # the calls that differentiate tables now, by the id of the module


def rows_of(weight: mx.array, x: mx.array) -> mx.array:
    """Rows of a table; 0 for an index that names none."""
    exists = named(x, len(weight))
    return mx.where(mx.expand_dims(exists, -1), weight[mx.where(exists, x, 0)], 0)


class Reading(Protocol):
    """A function that is linear in a table, of which it reads some rows."""

    shape: tuple[int, ...]  # of what it makes, without the columns
    distinct: bool  # whether the gradient of the table is coalesced, in fp32 or fp64

    def __call__(self, weight: mx.array, *arrays: mx.array) -> mx.array:
        """What is read, in operations that MLX can differentiate and export."""
        ...

    def rows(self, cotangent: mx.array, num_rows: int, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        """Indices and values whose sum is the gradient of the table."""
        ...

    def gradients(self, cotangent: mx.array, weight: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        """The gradients of the arrays."""
        ...


class Rows:
    """Reads the rows of the indices ``x``, one for each; see :class:`Reading`."""

    distinct = False

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __call__(self, weight: mx.array, *arrays: mx.array) -> mx.array:
        return rows_of(weight, arrays[0])

    def rows(self, cotangent: mx.array, num_rows: int, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        return arrays[0], cotangent

    def gradients(self, cotangent: mx.array, weight: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        return (mx.zeros((), weight.dtype),)


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
        self.replaced = False  # by fn, with other weights, for which nothing is recorded
        self.shapes: list[tuple[int, ...]] = []  # of the indices of each look-up
        self.reads: list[tuple[tuple[Reading, Sequence[mx.array]], mx.array]] = []  # with what came back for each
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
        """The rows of the indices ``x``, so that their gradient is recorded."""
        return self.read(Rows(x.shape), weight, x)

    def read(self, reading: Reading, weight: mx.array, *arrays: mx.array) -> mx.array:
        """``reading(weight, *arrays)``, so that the gradient of the table is recorded.

        Where ``weight`` is a function of the table, which a module has put in its place, MLX's own gradient is right.
        """
        self.replaced = self.replaced or not self._is_table(weight)
        if self.replaced:
            return reading(weight, *arrays)
        if self.blocks is not None:
            block = next(self.blocks)
            self.reads.append(((reading, arrays), block))
            return reading(weight, *arrays) + block
        self.shapes.append(reading.shape)
        recorded: Any = mx.custom_function(reading.__call__)

        @recorded.vjp
        def record(primals: Any, cotangent: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
            others = reading.gradients(cotangent, *primals)
            if self.closed:  # somebody differentiates what value_and_grad returned
                pair = reading.rows(cotangent, len(weight), *primals[1:])
                return _sparse([pair], len(weight), weight.shape[1]).to_dense().astype(weight.dtype), *others
            self.reads.append(((reading, primals[1:]), cotangent))
            return mx.zeros((), weight.dtype), *others

        return recorded(weight, *arrays)

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
            none = mx.zeros((0,), mx.int32), mx.zeros((0, columns), self.weight.dtype)
            pairs = [reading.rows(g, rows, *arrays) for (reading, arrays), g in self.reads] or [none]
            distinct = len(self.reads) == 1 and self.reads[0][0][0].distinct
            self.sparse = distinct_rows(*pairs[0], rows) if distinct else _sparse(pairs, rows, columns)
            self.reads.clear()
        return self.sparse

    def gradient(self, total: mx.array, differentiable: bool) -> RowSparse | mx.array:
        """The gradient of the table, given MLX's sum of what did not come from recorded look-ups."""
        sparse, self.sparse = self.recorded(), None
        if not self.is_dense(total):
            return sparse.coalesced_by(kernels.available(), differentiable)
        return total + sparse.to_dense().astype(total.dtype) if sparse.indices.size else total

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
        self.reads.clear()


def _operations(array: mx.array) -> Counter[str]:
    """The operations that an array is yet to be computed by."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return Counter(re.findall(r'label ="(\w+)', graph.getvalue()))


def _sparse(pairs: Sequence[tuple[mx.array, mx.array]], rows: int, columns: int) -> RowSparse:
    """The gradients of look-ups of any shape, one after another."""
    flat = [x.reshape(-1) for x, _ in pairs]
    if len({x.dtype for x in flat}) > 1:
        flat = [canonical(x, rows) for x in flat]
    return RowSparse(mx.concatenate(flat), mx.concatenate([g.reshape(-1, columns) for _, g in pairs]), rows)


def table_of(module: nn.Module) -> Table | None:
    """The innermost call of this thread that differentiates for the table of ``module``."""
    for tables in reversed(_calls()):
        if id(module) in tables:
            return tables[id(module)]
    return None


def differentiates_plainly() -> bool:
    """Whether this thread must not use ``mx.custom_function`` now."""
    return getattr(_thread, "plain", False)


def by_module(tables: dict[Any, Table]) -> dict[int, Table]:
    """The tables by their modules; of paths that share one, the last, as in MLX."""
    return {id(table.module): table for table in tables.values()}


def _calls() -> list[dict[int, Table]]:
    """The tables of the calls of this thread that are under way, the outermost first."""
    if not hasattr(_thread, "calls"):
        _thread.calls = []
    return _thread.calls


class Call:
    """What one call of ``value_and_grad`` holds while it is under way, on the thread that makes it.

    An exception, a KeyboardInterrupt too, may come at any line, those of :meth:`end` included: whoever makes the call
    ends it twice. So everything is noted down before it is done, and may be undone again; and there is no lock, which
    stays locked where an exception comes just before the end of its ``with``.
    """

    def __init__(self) -> None:
        self.undo: Callable[[], Any] | None = None  # puts the parameters back where the call fails
        self.thread = threading.get_ident()
        self._wanted: list[int] = []
        self._tables: list[Table] = []
        self._depth = len(_calls())
        self._plain = differentiates_plainly()

    def own(self, modules: Iterable[nn.Module]) -> None:
        """Keep other threads from differentiating these tables meanwhile: MLX lets no thread use the arrays of
        another's trace, and they stand in the modules for a while.

        Raises:
            RuntimeError: If another thread does so already.
        """
        for module in modules:
            self._wanted.append(id(module))
            owner = _owners.setdefault(id(module), self)  # one step that nothing comes between
            if owner.thread != self.thread:
                raise RuntimeError("[value_and_grad] another thread is differentiating the same SparseEmbedding.")

    def watch(self, tables: dict[Any, Table]) -> bool:
        """Let the look-ups of this thread know of the tables; tells whether this is the outermost call."""
        self._tables = [*tables.values()]
        _calls().append(by_module(tables))
        return self._depth == 0

    def differentiate_plainly(self) -> None:
        """Let the functions of this thread use no ``mx.custom_function`` meanwhile, which cannot be exported."""
        _thread.plain = True

    def end(self) -> None:
        """Undo all of it; without effect the second time."""
        del _calls()[self._depth :]
        _thread.plain = self._plain
        for table in self._tables:
            table.close()
        if self.undo is not None:
            self.undo()
        for module in self._wanted:  # last: until then the modules hold arrays of a trace
            if _owners.get(module) is self:  # and not an outer call of this thread
                del _owners[module]
