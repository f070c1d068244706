"""The walk over the trees of gradients, parameters and state: everything is checked before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx

from .accumulators import COMPUTE_DTYPE, Dense

# Root keys of an optimizer's state; a parameter of that name at the root of a model would overwrite them.
RESERVED = ("step", "learning_rate", "_mlx_adagrad")


class Leaf(NamedTuple):
    """One gradient with its parameter, the parameter's own state (None before its first step) and the keys to it."""

    gradient: Any
    parameter: mx.array
    state: dict[str, Any] | None
    keys: tuple[Any, ...]

    @property
    def path(self) -> str:
        """The dotted path, as ``mlx.utils.tree_flatten`` writes it."""
        return dotted(self.keys)


def dotted(keys: tuple[Any, ...]) -> str:
    """The dotted path of a tuple of keys."""
    return ".".join(map(str, keys))


def collect(gradients: Any, parameters: Any, state: Any, check: Callable[[Leaf], None]) -> list[Leaf]:
    """Every leaf that has a gradient, in tree order, each passed to ``check``.

    A missing key, an empty ``{}`` and a None are absent gradients. ``parameters`` may be a superset of ``gradients``.

    Raises:
        ValueError: For a gradient without a parameter, or a root parameter whose name the state needs.
        TypeError: For a leaf that is no array.
    """
    leaves: list[Leaf] = []
    _collect(gradients, parameters, state, (), check, leaves)
    return leaves


def _collect(gradients: Any, parameters: Any, state: Any, keys: tuple, check: Callable, leaves: list[Leaf]) -> None:
    # the hot loop of a step with many small tensors: plain locals, one tuple a leaf
    for key, gradient in children(gradients):
        here = (*keys, key)
        if type(gradient) is not mx.array and is_absent(gradient):
            continue
        parameter = _child(parameters, key)
        if parameter is None:
            raise ValueError(f"[Adagrad] there is a gradient for '{dotted(here)}' but no parameter.")
        if not keys and key in RESERVED:
            raise ValueError(f"[Adagrad] a parameter at the root may not be named '{key}': the state uses that key.")
        own_state = _child(state, key)
        if isinstance(gradient, dict | list | tuple):
            _collect(gradient, parameter, own_state, here, check, leaves)
        else:
            leaf = Leaf(gradient, parameter, own_state, here)
            check(leaf)
            leaves.append(leaf)


def is_absent(gradient: Any) -> bool:
    """Whether this place of a gradient tree holds no gradient (and never asks an array for its value)."""
    return gradient is None or (isinstance(gradient, dict | list | tuple) and not gradient)


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
    """A tree in the shape of ``gradients`` with the updated arrays; an absent gradient's parameter comes back as it
    is.
    """
    if isinstance(gradients, dict):
        new = {k: _rebuilt(g, _child(parameters, k), updated) for k, g in gradients.items()}
        return {k: w for k, w in new.items() if w is not None}
    return type(gradients)(_rebuilt(g, _child(parameters, i), updated) for i, g in enumerate(gradients))


def _rebuilt(gradient: Any, parameter: Any, updated: Iterator[mx.array]) -> Any:
    if is_absent(gradient):
        return parameter if isinstance(parameter, mx.array) or gradient is None else gradient
    if isinstance(gradient, dict | list | tuple):
        return rebuild(gradient, parameter, updated)
    return next(updated)


def check_leaf(leaf: Leaf, accumulator: Dense) -> None:
    """Raise TypeError or ValueError, naming the path, for a leaf that cannot be updated; reads no value."""
    g, w, state, _ = leaf
    if type(g) is type(w) is mx.array and g.shape == w.shape and g.dtype != mx.complex64 and w.dtype in COMPUTE_DTYPE:
        if not state or (type(state) is dict and "v" in state and state["v"].shape == accumulator.shape(w)):
            return  # what nearly every leaf is
    if not isinstance(g, mx.array) or not isinstance(w, mx.array):
        what, got = ("gradient", g) if not isinstance(g, mx.array) else ("parameter", w)
        raise TypeError(f"[Adagrad] the {what} of '{leaf.path}' must be an array but got {type(got).__name__}.")
    if w.dtype not in COMPUTE_DTYPE:
        raise ValueError(f"[Adagrad] '{leaf.path}' is {w.dtype}: only floating and complex parameters can be updated.")
    if g.shape != w.shape:
        raise ValueError(f"[Adagrad] the gradient of '{leaf.path}' has shape {g.shape} but the parameter {w.shape}.")
    if g.dtype == mx.complex64 and w.dtype != mx.complex64:
        raise ValueError(f"[Adagrad] the gradient of '{leaf.path}' is complex64 but the parameter {w.dtype}.")
    if not state:
        return
    if not isinstance(state, dict):
        raise ValueError(f"[Adagrad] the state of '{leaf.path}' must be a dict but got {type(state).__name__}.")
    v = state.get("v")
    if v is not None and v.shape != accumulator.shape(w):
        wanted = accumulator.shape(w)
        raise ValueError(f"[Adagrad] the state 'v' of '{leaf.path}' has shape {v.shape} but must have {wanted}.")


def optimizable(tree: Any) -> Any:
    """``tree`` with everything that cannot be optimised taken out (None in its place)."""
    if isinstance(tree, dict):
        return {k: optimizable(child) for k, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [optimizable(child) for child in tree]
    return tree if isinstance(tree, mx.array) and tree.dtype in COMPUTE_DTYPE else None
