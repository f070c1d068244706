"""The ``value_and_grad`` that yields row-sparse gradients of tables from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import value_and_grad as stock_value_and_grad  # as it is before anybody puts ours in its place

from ..trees import Keys, children, find, mapped, present
from ..update import kernels, streams
from ..update.compiled import clear_at_the_end
from ..update.tracing import evaluate
from .gradient import RowSparse, SummedLater
from .layers import SparseEmbedding as SparseEmbedding  # where pickles of version 0.1 look for it
from .look_ups import Call, Table, by_module


def value_and_grad(model: nn.Module, fn: Callable, *, exportable: bool = False) -> Callable:
    """``mlx.nn.value_and_grad`` with a :class:`RowSparse` for the table of each :class:`SparseEmbedding` in ``model``.

    The forward pass runs once. All else is as there: auxiliary outputs, keyword arguments, frozen parameters, dense
    gradients. The gradient of a table that ``fn`` uses in another way than by look-up (``as_linear``, a penalty on its
    weights) is the dense total; that of a table that the loss does not depend on has no rows.

    With a table among the gradients, loss and gradients come evaluated, so that the optimizer can change the table in
    place, unless something is tracing (``mx.compile``, ``mx.export_function``); sums over rows that were looked up more
    than once may still be under way. What was evaluated has no derivative: inside ``mx.grad`` take ``exportable=True``,
    which never evaluates.

    Args:
        model: The model whose trainable parameters to differentiate for. Do not differentiate for them, or call
            ``update`` on it, inside ``fn``.
        fn: The scalar function, or one that returns a tuple whose first entry is the scalar.
        exportable: Use no ``mx.custom_function``, which ``mx.export_function`` cannot write, and evaluate nothing.
            Calls ``fn`` twice and throws the first away; knows no ``mx.checkpoint``. Default: ``False``.

    Returns:
        A callable with the arguments of ``fn`` that returns its value and the gradients. It raises a RuntimeError while
        another thread differentiates the same table.

    Raises:
        TypeError: If ``model`` is no module or ``fn`` no function.
    """
    if not isinstance(model, nn.Module):
        order = ": the model comes first, value_and_grad(model, fn)" if isinstance(fn, nn.Module) else ""
        raise TypeError(f"[value_and_grad] 'model' must be an mlx.nn.Module but got {type(model).__name__}{order}.")
    if not callable(fn):
        raise TypeError(f"[value_and_grad] 'fn' must be a function but got {type(fn).__name__}.")

    @wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        call = Call()
        try:
            try:
                modules = dict(_embeddings(model))
                call.own(modules.values())
                value, gradients = _value_and_grad(call, model, fn, modules, exportable, args, kwargs)
                _renorm(modules, gradients)
                return value, gradients
            finally:
                call.end()
        finally:
            call.end()  # where the first was interrupted

    return wrapped


def _value_and_grad(
    call: Call,
    model: nn.Module,
    fn: Callable,
    modules: dict[Keys, SparseEmbedding],
    exportable: bool,
    args: Any,
    kwargs: Any,
) -> tuple[Any, Any]:
    parameters = model.trainable_parameters()
    before = [*present(parameters)]
    tables = {keys: Table(modules[keys]) for keys, _ in before if keys in modules}  # in the order of the tree
    if not tables:
        return stock_value_and_grad(model, fn)(*args, **kwargs)
    call.undo = lambda: _put(model, before)  # there will be tracers in it, and in the tree of parameters
    outermost = call.watch(tables)
    if exportable:
        call.differentiate_plainly()
        value, gradients = _run_exportable(model, fn, parameters, tables, args, kwargs)
    else:
        value, totals = _differentiate(model, fn, parameters, tables, args, kwargs)
        gradients = _evaluated(value, totals, tables) if outermost else _gradients(totals, tables)
    call.undo = None
    return value, gradients


def _renorm(modules: dict[Keys, SparseEmbedding], gradients: Any) -> None:
    """Store the rows that were looked up as they were looked up, where ``max_norm`` scaled them down."""
    for keys, module in modules.items():
        g = find(gradients, keys) if module.max_norm is not None else None
        if isinstance(g, RowSparse) and evaluate([g.indices, module["weight"]]):  # else something is tracing
            module.renorm(g.indices)
            g.limited_in = module  # in other processes too, says average_gradients


def _embeddings(tree: Any, keys: Keys = ()) -> Iterator[tuple[Keys, SparseEmbedding]]:
    """The sparse embeddings of a model, by the keys to their tables."""
    if isinstance(tree, SparseEmbedding):
        yield (*keys, "weight"), tree
    if isinstance(tree, dict | list):
        for key, below in children(tree):
            yield from _embeddings(below, (*keys, key))


def _differentiate(
    model: nn.Module, fn: Callable, parameters: dict, tables: dict[Keys, Table], args: Any, kwargs: Any
) -> Any:
    """``nn.value_and_grad`` while the tables are watched; the model gets its parameters back."""
    placed: dict[Keys, mx.array] = {}

    def watched_fn(parameters: dict, *args: Any, **kwargs: Any) -> Any:
        model.update(parameters)
        placed.update(present(parameters))
        for table in by_module(tables).values():
            table.watch()
        return fn(*args, **kwargs)

    value, totals = mx.value_and_grad(watched_fn)(parameters, *args, **kwargs)
    _put_back(model, placed, parameters)
    return value, totals


def _put_back(model: nn.Module, placed: dict[Keys, mx.array], parameters: dict) -> None:
    """Put the parameters in the place of what stood for them; what fn has changed stays."""
    _put(model, ((keys, w) for keys, w in present(parameters) if find(model, keys) is placed[keys]))


def _put(model: nn.Module, parameters: Iterable[tuple[Keys, mx.array]]) -> None:
    """Put parameters into the model, where it still has an array."""
    for keys, w in parameters:
        if isinstance(find(model, keys), mx.array):
            find(model, keys[:-1])[keys[-1]] = w


def _run_exportable(
    model: nn.Module, fn: Callable, parameters: dict, tables: dict[Keys, Table], args: Any, kwargs: Any
) -> Any:
    """Differentiate for a block of zeros that is added to each look-up; a first run tells their shapes."""
    sparse = _rehearse(model, fn, parameters, tables, args, kwargs)
    blocks = [
        [mx.zeros((*shape, table.weight.shape[1]), table.weight.dtype) for shape in table.shapes]
        for table in sparse.values()
    ]

    placed: dict[Keys, mx.array] = {}

    def blocked_fn(variables: dict, *args: Any, **kwargs: Any) -> Any:
        model.update(variables["parameters"])
        placed.update(present(variables["parameters"]))
        for table, table_blocks in zip(sparse.values(), variables["blocks"], strict=True):
            table.blocks = iter(table_blocks)
        return fn(*args, **kwargs)

    variables = {"parameters": parameters, "blocks": blocks}
    value, totals = mx.value_and_grad(blocked_fn)(variables, *args, **kwargs)
    for table, cotangents in zip(sparse.values(), totals["blocks"], strict=True):
        table.reads = [(read, g) for (read, _), g in zip(table.reads, cotangents, strict=True)]
        table.reached = False  # by anything but the look-ups
    _put_back(model, placed, parameters)
    return value, _gradients(totals["parameters"], tables)


def _rehearse(
    model: nn.Module, fn: Callable, parameters: dict, tables: dict[Keys, Table], args: Any, kwargs: Any
) -> dict[Keys, Table]:
    """Run once, evaluate nothing, undo what changed, and return the tables with a sparse gradient."""
    clear_at_the_end()  # reading the random state makes one for this thread
    random_state: Any = mx.random.state
    before, key = model.parameters(), random_state[0]
    _, totals = _differentiate(model, fn, parameters, tables, args, kwargs)
    dense = {keys for keys, g in present(totals) if keys in tables and tables[keys].is_dense(g)}
    for keys, table in tables.items():
        table.close()
        table.closed, table.replaced = False, table.replaced or keys in dense
    model.update(before)
    try:
        high, low = key.tolist()
        mx.random.seed(high << 32 | low)
    except ValueError:
        pass  # the random state is being traced: the trace goes on from where the rehearsal ended
    return {keys: table for keys, table in tables.items() if keys not in dense}


def _evaluated(value: Any, totals: dict, tables: dict[Keys, Table]) -> dict:
    """:func:`_gradients`, evaluated in two stages: those of the look-ups are free again once they are summed up.

    The second only starts, unless something is tracing: it reads no table, so that an update need not wait for it. On a
    CPU the indices are sorted beside the forward pass, and the sums made beside what comes next.
    """
    others = [g for keys, g in present(totals) if keys not in tables or tables[keys].is_dense(g)]
    recorded = [table.recorded() for table in tables.values()]
    with streams.second_stream(sum(gradient.values.size for gradient in recorded)):
        sorts = not kernels.available()  # they sort in the update
        runs = [gradient.runs() for gradient in recorded if gradient.values.size and sorts]
    evaluate([value, others, runs, [gradient.values for gradient in recorded]])
    del recorded
    gradients = _gradients(totals, tables, differentiable=False)
    found = (g for keys, g in present(gradients) if keys in tables and not isinstance(g, SummedLater))
    evaluate([[g.indices, g.values] if isinstance(g, RowSparse) else g for g in found], wait=False)
    return gradients


def _gradients(totals: dict, tables: dict[Keys, Table], differentiable: bool = True) -> dict:
    """``totals`` with the gradients of the tables in their places."""

    def gradient(keys: Keys, total: mx.array) -> Any:
        return tables[keys].gradient(total, differentiable) if keys in tables else total

    return mapped(gradient, totals)
