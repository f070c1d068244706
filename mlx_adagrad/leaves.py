"""The walk over the trees of gradients, parameters and state: everything is checked before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeAlias

import mlx.core as mx

from .accumulators import COMPUTE_DTYPE, Dense
from .rows import RowSparse

# Root keys of an optimizer's state; a parameter of that name at the root of a model would overwrite them.
RESERVED = ("step", "learning_rate", "_mlx_adagrad")

_CONTAINERS = (dict, list, tuple)
_USUAL = frozenset(COMPUTE_DTYPE) - {mx.complex64}


# (gradient, parameter, the parameter's own state or None before its first step, the keys to it); a plain tuple, since a
# step with many small tensors spends its time here
Leaf: TypeAlias = tuple[Any, mx.array, Any, tuple[Any, ...]]


def dotted(keys: tuple[Any, ...]) -> str:
    """The dotted path of a tuple of keys."""
    return ".".join(map(str, keys))


def collect(
    gradients: Any, parameters: Any, state: Any, accumulator: Dense, check: Callable[[Leaf], None] | None = None
) -> list[Leaf]:
    """Every leaf that has a gradient, in tree order, each checked by :func:`check_leaf`, and by ``check``.

    A missing key, an empty ``{}`` and a None are absent gradients. ``parameters`` may be a superset of ``gradients``.

    Raises:
        ValueError: For a gradient without a parameter, or a root parameter whose name the state needs, or as
            :func:`check_leaf` does.
        TypeError: For a leaf that is no array.
    """
    leaves: list[Leaf] = []
    _collect(gradients, parameters, state, (), accumulator, leaves)
    if check is not None:
        for leaf in leaves:
            check(leaf)
    return leaves


def _collect(g_tree: Any, w_tree: Any, state: Any, keys: tuple, accumulator: Dense, leaves: list[Leaf]) -> None:
    # the hot loop of a step with many small tensors: done once a level where possible, and no call for a usual leaf
    w_at, state_at, array, plain = _getter(w_tree), _getter(state), mx.array, type(accumulator) is Dense
    for key, g in children(g_tree):
        kind = type(g)
        if kind is not array and is_absent(g):
            continue
        w: Any = w_at(key)
        own: Any = state_at(key)
        if w is None or (not keys and key in RESERVED):
            _refuse((*keys, key), w)
        if kind is not array and isinstance(g, _CONTAINERS):
            _collect(g, w, own, (*keys, key), accumulator, leaves)
            continue
        leaf = (g, w, own, (*keys, key))
        usual = plain and kind is type(w) and w.dtype in _USUAL and g.dtype in _USUAL
        if not (usual and type(own) is dict and "v" in own and w.shape == g.shape == own["v"].shape):
            check_leaf(accumulator, leaf)
        leaves.append(leaf)


def _refuse(keys: tuple[Any, ...], parameter: Any) -> NoReturn:
    if parameter is None:
        raise ValueError(f"[Adagrad] there is a gradient for '{dotted(keys)}' but no parameter.")
    raise ValueError(f"[Adagrad] a parameter at the root may not be named '{keys[0]}': the state uses that key.")


def _getter(tree: Any) -> Callable[[Any], Any]:
    """What :func:`_child` does, with the kind of ``tree`` asked once."""
    return tree.get if isinstance(tree, dict) else lambda key: _child(tree, key)


def is_absent(gradient: Any) -> bool:
    """Whether this place of a gradient tree holds no gradient (and never asks an array for its value)."""
    return gradient is None or (isinstance(gradient, _CONTAINERS) and not gradient)


def children(tree: Any) -> Iterator[tuple[Any, Any]] | Any:
    """The (key, child) pairs of a dict, a list or a tuple."""
    if isinstance(tree, dict):
        return tree.items()
    if isinstance(tree, list | tuple):
        return enumerate(tree)
    raise TypeError(f"[Adagrad] gradients must be a dict, list or tuple of arrays but got {type(tree).__name__}.")


def _child(tree: Any, key: Any) -> Any:
    if isinstance(tree, dict):
        return tree.get(key)
    if isinstance(tree, list | tuple):
        return tree[key] if isinstance(key, int) and key < len(tree) else None
    return None


def slot(state: dict[str, Any], gradients: Any, keys: tuple[Any, ...]) -> dict[str, Any]:
    """The dict for the state of the parameter at ``keys``, made in place where it is missing."""
    node: Any = state
    for key in keys:
        gradients = gradients[key]
        wanted = list if isinstance(gradients, list | tuple) else dict
        if isinstance(node, list):
            node.extend({} for _ in range(key + 1 - len(node)))
        child = _child(node, key)
        if not isinstance(child, wanted):
            child = wanted(child or ())  # a tuple cannot grow, an empty hole has no kind yet
            node[key] = child
        node = child
    return node


def rebuild(gradients: Any, parameters: Any, updated: Iterator[mx.array]) -> Any:
    """A tree in the shape of ``gradients`` with the updated arrays; for a None the parameter comes back as it is."""
    if isinstance(gradients, dict):
        array = mx.array
        new = {
            key: next(updated) if type(g) is array else _rebuilt(g, _child(parameters, key), updated)
            for key, g in gradients.items()
        }
        return {key: w for key, w in new.items() if w is not None}
    return type(gradients)(_rebuilt(g, _child(parameters, i), updated) for i, g in enumerate(gradients))


def _rebuilt(gradient: Any, parameter: Any, updated: Iterator[mx.array]) -> Any:
    if is_absent(gradient):
        # a hole stays one, as in MLX's own optimizers: MultiOptimizer merges trees by their holes
        return parameter if gradient is None else gradient
    if isinstance(gradient, _CONTAINERS):
        return rebuild(gradient, parameter, updated)
    return next(updated)


def check_leaf(accumulator: Dense, leaf: Leaf) -> None:
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
    if state is None or (isinstance(state, _CONTAINERS) and not state):
        return
    if not isinstance(state, dict):
        raise ValueError(f"[Adagrad] the state of '{path}' must be a dict but got {type(state).__name__}.")
    v = state.get("v")
    if v is not None and v.shape != accumulator.shape(w):
        wanted = accumulator.shape(w)
        raise ValueError(f"[Adagrad] the state 'v' of '{path}' has shape {v.shape} but must have {wanted}.")


def optimizable(tree: Any) -> Any:
    """``tree`` with everything that cannot be optimised taken out (None in its place)."""
    if isinstance(tree, dict):
        return {k: optimizable(child) for k, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [optimizable(child) for child in tree]
    return tree if isinstance(tree, mx.array) and tree.dtype in COMPUTE_DTYPE else None


def fill(target: dict | list, source: dict | list | tuple) -> None:
    """Make ``target`` equal to ``source`` and keep its dicts and lists themselves, since compiled steps hold them."""
    new = dict(children(source))
    if isinstance(target, dict):
        for key in [key for key in target if key not in new]:
            del target[key]
    else:
        del target[len(new) :]
        target.extend({} for _ in range(len(new) - len(target)))
    for key, value in new.items():
        old = target.get(key) if isinstance(target, dict) else target[key]
        if isinstance(value, dict) and isinstance(old, dict) or isinstance(value, list) and isinstance(old, list):
            fill(old, value)
        else:
            target[key] = copied(value)


def copied(tree: Any) -> Any:
    """The tree with the same arrays in containers of its own."""
    if isinstance(tree, dict):
        return {key: copied(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(copied(child) for child in tree)
    return tree
