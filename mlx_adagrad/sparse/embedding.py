"""Embeddings whose gradient is row-sparse, and the ``value_and_grad`` that yields it from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from numbers import Integral
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import value_and_grad as stock_value_and_grad  # as it is before anybody puts ours in its place

from ..trees import Keys, children, find, mapped, present
from ..update import streams
from ..update.compiled import clear_at_the_end
from ..update.tracing import evaluate
from .gradient import RowSparse, canonical
from .look_ups import Table, by_module, owned, plainly, rows_of, table_of, watching
from .norms import check_norm, limited, renormed


class SparseEmbedding(nn.Embedding):
    """An ``mlx.nn.Embedding`` whose gradient, taken with :func:`value_and_grad`, is a :class:`RowSparse`.

    Parameters, files and results are those of ``nn.Embedding``, and with ``nn.value_and_grad`` so is the gradient. An
    index outside ``[0, num_embeddings)``, a negative one too, names no row: its embedding is 0 and has no gradient.

    Args:
        num_embeddings (int): Rows of the table.
        dims (int): Columns of the table.
        padding_idx (int, optional): A row that starts as 0 and whose look-ups have no gradient; a negative one counts
            from the end, as in torch. Default: ``None``.
        max_norm (float, optional): Rows are looked up as if they were scaled down to a norm of at most this one, and
            the gradient is taken as if they had been so before, as in torch. :func:`value_and_grad` then stores them so
            (torch: every forward pass); in a trace it does not, see :meth:`renorm`. Default: ``None``.
        norm_type (float): p of that p-norm, positive; ``math.inf`` is the maximum norm. Default: ``2.0``.

    Raises:
        ValueError: For a ``padding_idx`` outside the table, a ``max_norm`` or ``norm_type`` that is not positive.
        TypeError: For numbers that are none.
    """

    # kept on the class too, for layers that became sparse where they stood, and for pickles of version 0.1
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0

    def __init__(
        self,
        num_embeddings: int,
        dims: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ):
        padding_idx = padding(self._name, padding_idx, num_embeddings)
        check_norm(self._name, max_norm, norm_type)
        super().__init__(num_embeddings, dims)
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, max_norm, norm_type
        if padding_idx is not None:
            self["weight"][padding_idx] = 0

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, padding_idx: int | None = None) -> SparseEmbedding:
        """Turn an ``nn.Embedding`` into a ``SparseEmbedding`` where it stands in its model, and return it.

        Args:
            embedding: The layer.
            padding_idx: As in the constructor; the row stays as it is, as in torch's ``from_pretrained``. Default:
                ``None``.

        Raises:
            TypeError: For any other class, quantised embeddings and subclasses included.
            ValueError: For a ``padding_idx`` outside the table.
        """
        if type(embedding) not in (nn.Embedding, SparseEmbedding):
            raise TypeError(f"[SparseEmbedding] only an nn.Embedding can be converted, not {type(embedding).__name__}.")
        row = padding("SparseEmbedding", padding_idx, len(embedding.weight))
        embedding.__class__ = SparseEmbedding
        if row is not None:
            embedding.padding_idx = row
        return embedding  # type: ignore[return-value]

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _extra_repr(self) -> str:
        options = {"padding_idx": self.padding_idx, "max_norm": self.max_norm}
        return super()._extra_repr() + "".join(f", {k}={v}" for k, v in options.items() if v is not None)

    def __call__(self, x: mx.array) -> mx.array:
        """The rows of the indices ``x``, an integer array of any shape.

        Raises:
            TypeError: If ``x`` holds no integers.
        """
        x = mx.stop_gradient(indices(self._name, x))  # mx.checkpoint asks for a gradient of indices too
        if self.padding_idx is None:
            return self._look_up(x)
        pad = mx.stop_gradient(self["weight"][self.padding_idx])
        pad = pad if self.max_norm is None else limited(pad, self.max_norm, self.norm_type)
        return mx.where((x == self.padding_idx)[..., None], pad, self._look_up(self._counted(x)))

    def _look_up(self, x: mx.array) -> mx.array:
        table = table_of(self)
        rows = rows_of(self["weight"], x) if table is None else table.look_up(self["weight"], x)
        return rows if self.max_norm is None else limited(rows, self.max_norm, self.norm_type)

    def _counted(self, x: mx.array) -> mx.array:
        """The indices in int32, with the number of rows for each that names no row and for padding."""
        x = canonical(x, len(self["weight"]))
        return x if self.padding_idx is None else mx.where(x == self.padding_idx, len(self["weight"]), x)

    def renorm(self, x: mx.array) -> None:
        """Scale the rows that ``x`` names down to ``max_norm``, in the table: what torch does in each forward pass.

        :func:`value_and_grad` does so by itself, unless something is tracing or the gradient is dense. Call it in a
        compiled step, with the state of the model among its outputs, before the gradient is taken or after the update
        (FBGEMM's way): the rows are the same where they are looked up next.

        Raises:
            TypeError: If ``x`` holds no integers.
            ValueError: If there is no ``max_norm``.
        """
        if self.max_norm is None:
            raise ValueError(f"[{self._name}] there is no 'max_norm' to scale rows down to.")
        self["weight"] = renormed(self["weight"], indices(self._name, x), self.max_norm, self.norm_type)

    def __setattr__(self, key: str, val: Any) -> None:
        table = table_of(self) if key == "weight" else None
        if table is not None:
            table.replaced = True
        super().__setattr__(key, val)


def indices(owner: str, x: Any, name: str = "x") -> mx.array:
    """``x`` as an array, which must hold integers."""
    x = x if isinstance(x, mx.array) else mx.array(x)
    if not mx.issubdtype(x.dtype, mx.integer):
        fix = "cast it by astype(mx.int32)" if x.size else "an empty array needs a dtype, mx.array([], mx.int32)"
        raise TypeError(f"[{owner}] '{name}' must hold integers, the numbers of rows, but is {x.dtype}: {fix}.")
    return x


def padding(owner: str, padding_idx: Any, num_rows: int) -> int | None:
    """``padding_idx`` as a row of a table of ``num_rows``, or raise ValueError or TypeError."""
    if padding_idx is None:
        return None
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, Integral):
        raise TypeError(f"[{owner}] 'padding_idx' must be an integer or None but got {padding_idx!r}.")
    row = int(padding_idx)
    if not -num_rows <= row < num_rows:
        raise ValueError(f"[{owner}] 'padding_idx' must be a row of a table of {num_rows} but got {row}.")
    return row % num_rows


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
        found = dict(_embeddings(model))
        with owned(found.values()):
            value, gradients = _value_and_grad(model, fn, found, exportable, args, kwargs)
            _renorm(found, gradients)
            return value, gradients

    return wrapped


def _value_and_grad(
    model: nn.Module, fn: Callable, modules: dict[Keys, SparseEmbedding], exportable: bool, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    parameters = model.trainable_parameters()
    before = [*present(parameters)]
    tables = {keys: Table(modules[keys]) for keys, _ in before if keys in modules}  # in the order of the tree
    if not tables:
        return stock_value_and_grad(model, fn)(*args, **kwargs)
    with watching(tables) as outermost:
        try:
            if exportable:
                with plainly():
                    return _run_exportable(model, fn, parameters, tables, args, kwargs)
            value, totals = _differentiate(model, fn, parameters, tables, args, kwargs)
            return value, _evaluated(value, totals, tables) if outermost else _gradients(totals, tables)
        except BaseException:
            _put(model, before)  # there are tracers in it, and in the tree of parameters
            raise


def _renorm(modules: dict[Keys, SparseEmbedding], gradients: Any) -> None:
    """Store the rows that were looked up as they were looked up, where ``max_norm`` scaled them down."""
    for keys, module in modules.items():
        g = find(gradients, keys) if module.max_norm is not None else None
        if isinstance(g, RowSparse) and evaluate([g.indices, module["weight"]]):  # else something is tracing
            module.renorm(g.indices)


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
        for table, own in zip(sparse.values(), variables["blocks"], strict=True):
            table.blocks = iter(own)
        return fn(*args, **kwargs)

    variables = {"parameters": parameters, "blocks": blocks}
    value, totals = mx.value_and_grad(blocked_fn)(variables, *args, **kwargs)
    for table, own in zip(sparse.values(), totals["blocks"], strict=True):
        table.found = [(x, g) for (x, _), g in zip(table.found, own, strict=True)]
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
        runs = [gradient.runs() for gradient in recorded if gradient.values.size]
    evaluate([value, others, runs, [gradient.values for gradient in recorded]])
    del recorded
    gradients = _gradients(totals, tables, differentiable=False)
    found = (g for keys, g in present(gradients) if keys in tables)
    evaluate([[g.indices, g.values] if isinstance(g, RowSparse) else g for g in found], wait=False)
    return gradients


def _gradients(totals: dict, tables: dict[Keys, Table], differentiable: bool = True) -> dict:
    """``totals`` with the gradients of the tables in their places."""

    def gradient(keys: Keys, total: mx.array) -> Any:
        return tables[keys].gradient(total, differentiable) if keys in tables else total

    return mapped(gradient, totals)
