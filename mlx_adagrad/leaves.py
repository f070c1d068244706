"""The walk over the trees of gradients, parameters and state: everything is checked before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, NoReturn, TypeAlias

import mlx.core as mx

from .sparse.gradient import RowSparse
from .trees import CONTAINERS, child, children, dotted, is_absent, sequence
from .update.accumulators import COMPUTE_DTYPE, EXPONENTS, Dense
from .update.storage import Storage

# Root keys of an optimizer's state; a parameter of that name at the root of a model would overwrite them.
OWN = "_mlx_adagrad"  # holds what this package adds to the state at its root, of optimizers and of wrappers
RESERVED = ("step", "learning_rate", OWN)

_USUAL = frozenset(COMPUTE_DTYPE) - {mx.complex64}

_shape, _dtype = attrgetter("shape"), attrgetter("dtype")


# (gradient, parameter, the parameter's own state or None before its first step, the keys to it)
Leaf: TypeAlias = tuple[Any, mx.array, Any, tuple[Any, ...]]


class Leaves:
    """The leaves of one call that have a gradient, in tree order.

    They are columns, not rows: a step with many small tensors spends its time here, and a question to a whole list
    costs a fraction of one to each leaf.
    """

    def __init__(self, gradients: Any, parameters: Any, state: Any):
        self.complete = False
        # of complete leaves: their shapes, their accumulators, and the dtypes of all gradients and of all parameters
        self.shapes: list[tuple[int, ...]] = []
        self.accumulators: list[mx.array] = []
        self.dtypes: tuple[set[mx.Dtype], set[mx.Dtype]] = set(), set()
        self._found: list[tuple[Any, ...]] = []
        self._tuples: list[tuple[Any, Any, type]] = []  # where the new tree has a list that must become a tuple
        self._root = [self._walk(gradients, parameters, state, ())]
        self._mark_tuple(self._root, 0, gradients)
        columns: Any = zip(*self._found, strict=True) if self._found else ((),) * 6
        self.gradients: Sequence[Any]
        self.parameters: Sequence[Any]
        self.states: Sequence[Any]  # None before a parameter's first step
        self.gradients, self.parameters, self.states, self._containers, self._in, self._keys = columns

    @cached_property
    def keys(self) -> list[tuple[Any, ...]]:
        """The keys to each leaf."""
        return [(*within, key) for within, key in zip(self._in, self._keys, strict=True)]

    def __getitem__(self, i: int) -> Leaf:
        return self.gradients[i], self.parameters[i], self.states[i], (*self._in[i], self._keys[i])

    def __iter__(self) -> Iterator[Leaf]:
        return map(self.__getitem__, range(len(self)))

    def __len__(self) -> int:
        return len(self._found)

    def rebuilt(self, updated: Iterable[mx.array]) -> Any:
        """A tree in the shape of the gradients with these arrays; for a None the parameter comes back as it is."""
        for container, key, w in zip(self._containers, self._keys, updated, strict=True):
            container[key] = w
        for container, key, kind in self._tuples:
            container[key] = sequence(kind, container[key])
        return self._root[0]

    def _walk(self, g_tree: Any, w_tree: Any, state: Any, keys: tuple[Any, ...]) -> Any:
        # the new tree, with the parameters as they are
        w_at = w_tree.get if isinstance(w_tree, dict) else _getter(w_tree, g_tree)
        state_at = state.get if type(state) is dict else _getter(state, g_tree)
        new: Any = {} if isinstance(g_tree, dict) else [None] * len(g_tree)
        array = mx.array
        for key, g in g_tree.items() if type(g_tree) is dict else children(g_tree):
            kind, w = type(g), w_at(key)
            if kind is not array and (not g if kind is dict else is_absent(g)):
                hole = w if g is None else g  # as in MLX's own optimizers: MultiOptimizer merges trees by their holes
                if hole is not None:
                    new[key] = hole
                continue
            if w is None or (not keys and key in RESERVED):
                _refuse((*keys, key), w)
            if kind is not array and isinstance(g, CONTAINERS):
                new[key] = self._walk(g, w, state_at(key), (*keys, key))
                if kind is not dict:
                    self._mark_tuple(new, key, g)
                continue
            new[key] = w
            self._found.append((g, w, state_at(key), new, keys, key))
        return new

    def _mark_tuple(self, container: Any, key: Any, tree: Any) -> None:
        if isinstance(tree, tuple):
            self._tuples.append((container, key, type(tree)))

    def inspect(self) -> None:
        """Find out whether the leaves are ``complete``: arrays of one shape in real dtypes, with a state that has v, as
        nearly all are.
        """
        gs, ws, states = self.gradients, self.parameters, self.states
        if {*map(type, gs), *map(type, ws)} != {mx.array} or {*map(type, states)} != {dict}:
            return
        vs = [state.get("v") for state in states]
        dtypes = {*map(_dtype, gs)}, {*map(_dtype, ws)}
        if not dtypes[0] | dtypes[1] <= _USUAL or {*map(type, vs)} != {mx.array}:
            return
        if not {*map(_dtype, vs)} <= _USUAL:
            return
        shapes = [*map(_shape, ws)]
        self.complete = shapes == [*map(_shape, gs)] == [*map(_shape, vs)]
        if self.complete:
            self.shapes, self.accumulators, self.dtypes = shapes, vs, dtypes

    def by_shape_and_dtype(self) -> Iterable[list[int]]:
        """The indices of the leaves, those of one dtype and shape in one list; a row-sparse gradient stands alone."""
        kinds: Iterable[Any] = self.shapes
        if len(self.dtypes[1]) != 1:
            kinds = zip(map(_dtype, self.parameters), map(_shape, self.parameters), strict=True)
        found: dict[Any, list[int]] = {}
        for i, kind in enumerate(kinds):
            if not self.complete and isinstance(self.gradients[i], RowSparse):
                kind = i
            found.setdefault(kind, []).append(i)
        return found.values()


def collect(
    gradients: Any, parameters: Any, state: Any, storage: Storage, check: Callable[[Leaf], None] | None = None
) -> Leaves:
    """Every leaf that has a gradient, in tree order, each checked by :func:`check_leaf`, and by ``check``.

    A missing key, an empty ``{}`` and a None are absent gradients. ``parameters`` may be a superset of ``gradients``.

    Raises:
        ValueError: For a gradient without a parameter, or a root parameter whose name the state needs, or as
            :func:`check_leaf` does.
        TypeError: For a leaf that is no array.
    """
    leaves = Leaves(gradients, parameters, state)
    if type(storage.accumulator) is Dense and storage.rounding != "compensated":
        leaves.inspect()
    if not leaves.complete:
        for leaf in leaves:
            check_leaf(storage, leaf)
    if check is not None:
        for leaf in leaves:
            check(leaf)
    return leaves


def _refuse(keys: tuple[Any, ...], parameter: Any) -> NoReturn:
    if parameter is None:
        raise ValueError(f"[Adagrad] there is a gradient for '{dotted(keys)}' but no parameter.")
    raise ValueError(f"[Adagrad] a parameter at the root may not be named '{keys[0]}': the state uses that key.")


def _getter(tree: Any, like: Any) -> Callable[[Any], Any]:
    """What :func:`child` does for the keys of ``like``, with the kinds of both asked once."""
    if isinstance(tree, dict):
        return tree.get
    if type(tree) is type(like) is list and len(tree) >= len(like):
        return tree.__getitem__
    return partial(child, tree)


def rebuild(gradients: Any, parameters: Any, updated: Iterable[mx.array]) -> Any:
    """:meth:`Leaves.rebuilt` without a state."""
    return Leaves(gradients, parameters, None).rebuilt(updated)


def check_leaf(storage: Storage, leaf: Leaf) -> None:
    """Raise TypeError or ValueError, naming the path, for a leaf that cannot be updated; reads no value."""
    g, w, state, keys = leaf
    path = dotted(keys)
    is_gradient = isinstance(g, mx.array | RowSparse)
    if not is_gradient or not isinstance(w, mx.array):
        what, got = ("parameter", w) if is_gradient else ("gradient", g)
        raise TypeError(f"[Adagrad] the {what} of '{path}' must be an array but got {type(got).__name__}.")
    if w.dtype not in COMPUTE_DTYPE:
        raise ValueError(f"[Adagrad] '{path}' is {w.dtype}: only floating and complex parameters can be updated.")
    if g.shape != w.shape:
        raise ValueError(f"[Adagrad] the gradient of '{path}' has shape {g.shape} but the parameter {w.shape}.")
    if g.dtype == mx.complex64 and w.dtype != mx.complex64:
        raise ValueError(f"[Adagrad] the gradient of '{path}' is complex64 but the parameter {w.dtype}.")
    if isinstance(g, RowSparse) and w.dtype == mx.complex64:
        raise ValueError(f"[Adagrad] the gradient of '{path}' is row-sparse but the parameter complex64.")
    if state is not None and not (isinstance(state, CONTAINERS) and not state):
        check_state(storage, w, state, path)


def check_state(storage: Storage, w: mx.array, state: Any, path: str) -> None:
    """Raise TypeError or ValueError for the state of the parameter at ``path`` that cannot be its; reads no value."""
    if not isinstance(state, dict):
        raise ValueError(f"[Adagrad] the state of '{path}' must be a dict but got {type(state).__name__}.")
    v, accumulator = state.get("v"), storage.accumulator.at(w)
    if v is not None and not isinstance(v, mx.array):
        raise TypeError(f"[Adagrad] the state 'v' of '{path}' must be an array but got {type(v).__name__}.")
    if v is not None and EXPONENTS not in state and v.shape == accumulator.shape(w):
        if v.dtype not in COMPUTE_DTYPE or (mx.complex64 in (v.dtype, w.dtype) and v.dtype != w.dtype):
            wanted = accumulator.storage_dtype(w)
            raise ValueError(f"[Adagrad] the state 'v' of '{path}' is {v.dtype} but must be {wanted}.")
    if problem := storage.problem(w, state):
        key, why = problem
        raise ValueError(f"[Adagrad] the state '{key}' of '{path}' {why}.")
    step = state.get("step")
    if step is not None and (not isinstance(step, mx.array) or step.shape or not mx.issubdtype(step.dtype, mx.integer)):
        raise ValueError(f"[Adagrad] the state 'step' of '{path}' must be one integer but got {step!r:.40}.")


def is_row_sparse(owner: str, keys: tuple[Any, ...], gradient: Any) -> bool:
    """Whether a gradient is a RowSparse and not an array; raises TypeError where it is neither."""
    if type(gradient) is mx.array:
        return False
    if isinstance(gradient, mx.array | RowSparse):
        return isinstance(gradient, RowSparse)
    raise TypeError(f"[{owner}] the gradient of '{dotted(keys)}' must be an array but got {type(gradient).__name__}.")
