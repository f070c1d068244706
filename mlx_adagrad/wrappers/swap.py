"""Modules that hold averages for a while, and what their own weights are meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.nn import Module

from ..trees import CONTAINERS, child, children, is_absent, mapped, present


class Swap(NamedTuple):
    """A module that holds averages, its own weights, and the averages, both as trees of what is trainable."""

    module: Module
    own: dict[str, Any]
    averages: dict[str, Any]


_active: list[Swap] = []  # of all models and threads, in the order in which they began


@contextmanager
def swapped(module: Module, average: Callable[[Any], Any]) -> Iterator[Swap]:
    """A context in which ``module`` holds ``average(weights)``; its own weights come back whatever happens."""
    own = module.trainable_parameters()
    swap = Swap(module, own, average(own))
    try:
        try:
            _active.append(swap)
            module.update(swap.averages)
            yield swap
        finally:
            _end(swap)
    finally:
        _end(swap)  # where the first was interrupted


def _end(swap: Swap) -> None:
    if any(other is swap for other in _active):
        swap.module.update(swap.own)
        _active[:] = [other for other in _active if other is not swap]


def own_parameters(model: Any) -> Any:
    """The parameters of a module, or of a tree, with its own weights in the place of averages that are swapped in."""
    if not isinstance(model, Module):
        own = _own_arrays()
        return mapped(lambda _, leaf: own.get(id(leaf), leaf), model) if own else model
    tree = model.parameters()
    for swap in reversed(list(_active)):  # the first one has the weights, later ones within it averages
        _put(swap, model, tree)
    return tree


def holds_averages(model: Any) -> bool:
    """Whether averages are swapped into a module, a part of it, a module around it, or are in a tree."""
    if isinstance(model, Module):
        return any(_within(swap.module, model) or _within(model, swap.module) for swap in _active)
    return has_averages(model)


def has_averages(tree: Any) -> bool:
    """Whether any leaf is an average that was put into a module; inside a trace, where all are tracers, none is."""
    own = _own_arrays()
    return bool(own) and any(id(leaf) in own for _, leaf in present(tree))


def was_updated(swap: Swap) -> bool:
    """Whether anything has put other arrays into the module since its averages were swapped in."""
    now, put = present(swap.module.trainable_parameters()), present(swap.averages)
    return [id(leaf) for _, leaf in now] != [id(leaf) for _, leaf in put]


def _own_arrays() -> dict[int, mx.array]:
    """The own weight for the id of each average."""
    own: dict[int, mx.array] = {}
    for swap in list(_active):
        for (_, average), (_, weight) in zip(present(swap.averages), present(swap.own), strict=True):
            own[id(average)] = own[id(weight)] if id(weight) in own else weight
    return own


def _put(swap: Swap, model: Any, tree: Any) -> None:
    """Write the own weights of a swapped module into ``tree``, the parameters of ``model``, where they belong."""
    for node, part in _pairs(swap.module, swap.own):
        if node is model:
            return _fill(tree, part)
    for node, part in _pairs(model, tree):
        if node is swap.module:
            _fill(part, swap.own)


def _pairs(node: Any, tree: Any) -> Iterator[tuple[Module, Any]]:
    """Each module in ``node`` with its part of a tree of parameters."""
    if isinstance(node, Module):
        yield node, tree
    if isinstance(node, CONTAINERS):
        for key, below in children(node):
            if isinstance(below, CONTAINERS) and (part := child(tree, key)) is not None:
                yield from _pairs(below, part)


def _within(inner: Module, outer: Module) -> bool:
    return any(node is inner for node, _ in _pairs(outer, outer))


def _fill(tree: Any, own: Any) -> None:
    for key, value in children(own):
        if isinstance(value, mx.array):
            tree[key] = value
        elif not is_absent(value):
            _fill(tree[key], value)
