"""Walks over trees of gradients and parameters, and over the state that wrappers keep beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx.nn import Module

from ..accumulators import COMPUTE_DTYPE
from ..leaves import children, dotted, is_absent, sequence
from ..rows import RowSparse

Keys = tuple[Any, ...]


def present(tree: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """The (keys, leaf) pairs of a tree in order; None and empty containers hold nothing."""
    for key, child in children(tree):
        if is_absent(child):
            continue
        if isinstance(child, dict | list | tuple):
            yield from present(child, (*keys, key))
        else:
            yield (*keys, key), child


def is_row_sparse(owner: str, keys: Keys, gradient: Any) -> bool:
    """Whether a gradient is a RowSparse and not an array; raises TypeError where it is neither."""
    if isinstance(gradient, mx.array | RowSparse):
        return isinstance(gradient, RowSparse)
    raise TypeError(f"[{owner}] the gradient of '{dotted(keys)}' must be an array but got {type(gradient).__name__}.")


def find(tree: Any, keys: Keys) -> Any:
    """What a tree holds at ``keys``; None where it ends before."""
    for key in keys:
        if isinstance(tree, dict):
            tree = tree.get(key)
        elif isinstance(tree, list | tuple) and isinstance(key, int) and key < len(tree):
            tree = tree[key]
        else:
            return None
    return tree


def mapped(function: Callable[[Keys, Any], Any], tree: Any, keys: Keys = ()) -> Any:
    """``tree`` with ``function(keys, leaf)`` in place of each leaf; what is absent stays so."""
    if is_absent(tree):
        return tree
    if isinstance(tree, dict):
        return {key: mapped(function, child, (*keys, key)) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return sequence(type(tree), (mapped(function, child, (*keys, i)) for i, child in enumerate(tree)))
    return function(keys, tree)


def pruned(tree: Any) -> Any:
    """``tree`` without what is absent: left out of dicts, an empty hole in lists, as stock optimizers want it."""
    if isinstance(tree, dict):
        kept = {key: pruned(child) for key, child in tree.items()}
        return {key: child for key, child in kept.items() if not is_absent(child)}
    if isinstance(tree, list | tuple):
        kept = [pruned(child) for child in tree]
        filled = ({} if is_absent(child) else child for child in kept)
        return {} if all(map(is_absent, kept)) else sequence(type(tree), filled)
    return tree


def trainable(parameters: Any) -> dict[str, tuple[Keys, mx.array]]:
    """The parameters that an optimizer may change, by their :func:`name`: of a module those that are not frozen."""
    tree = parameters.trainable_parameters() if isinstance(parameters, Module) else parameters
    return {name(keys): (keys, w) for keys, w in present(tree) if isinstance(w, mx.array) and w.dtype in COMPUTE_DTYPE}


def name(keys: Keys) -> str:
    """The key of a parameter in a wrapper's own state: flat, and without the dots and lone digits that
    ``mlx.utils.tree_unflatten`` would take apart, so that a checkpoint comes back as it was.
    """
    return "/".join(("", *map(str, keys)))


def wide_dtype(w: mx.array) -> mx.Dtype:
    """What sums and averages beside the parameter ``w`` are kept in: fp32, unless ``w`` is wider."""
    return w.dtype if w.dtype in (mx.float64, mx.complex64) else mx.float32
