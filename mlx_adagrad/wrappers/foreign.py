"""Modifiers for optimizers that know nothing of them: any of ``mlx.optimizers``, any subclass of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_map

from ..leaves import is_row_sparse, rebuild
from ..trees import Keys, copied, dotted, find, is_absent, mapped, present, pruned
from ..update.compiled import compiled
from ..update.modifiers import Modifiers, Scalar
from .flushing import accumulations


def init(optimizer: Optimizer, parameters: Any) -> None:
    """``optimizer.init`` in the dtypes that its gradients will have, so that its state keeps the dtype it starts in."""
    if hasattr(optimizer, "apply_modified"):
        optimizer.init(parameters)
    elif isinstance(optimizer, MultiOptimizer):
        for part, inner in zip(_split(optimizer, parameters), optimizer.optimizers, strict=True):
            init(inner, part)
    else:
        wide = tree_map(lambda w: w.astype(mx.float32) if _is_narrow(w) else w, parameters)
        optimizer.init(pruned(wide, named=False))


def _split(optimizer: MultiOptimizer, tree: Any) -> list[Any]:
    """What each optimizer inside takes of ``tree``: by MLX's rule, but a dict with keys like 0 stays a dict."""

    def chosen(keys: Keys, leaf: Any) -> int:
        return next(i for i, takes in enumerate(optimizer.filters) if takes(dotted(keys), leaf))

    choice = {keys: chosen(keys, leaf) for keys, leaf in present(tree)}

    def part(i: int) -> Any:
        return pruned(mapped(lambda keys, leaf: leaf if choice[keys] == i else None, tree))

    return [part(i) for i in range(len(optimizer.optimizers))]


def _is_narrow(w: Any) -> bool:
    """Whether gradients of ``w`` are handed on in fp32: fp16 has no room for what a loss scale or a clip leaves."""
    return isinstance(w, mx.array) and w.dtype == mx.float16


def apply_modified(optimizer: Optimizer, gradients: Any, parameters: Any, modifiers: Modifiers) -> Any:
    """``optimizer.apply_gradients`` under ``modifiers``: handed on where it takes them, else applied around it.

    Args:
        optimizer: Any optimizer.
        gradients: A tree of gradients; a missing key, an empty ``{}`` and a None are absent gradients.
        parameters: A tree of parameters, which may be a superset of the gradients.
        modifiers: What the wrappers ask for.

    Returns:
        The updated parameters, in the shape of ``gradients`` and in their own dtypes.
    """
    inner: Any = optimizer
    if hasattr(inner, "apply_modified"):
        return inner.apply_modified(gradients, parameters, modifiers)
    weights = {keys: _parameter(inner, keys, parameters) for keys, _ in present(gradients)}
    if isinstance(inner, MultiOptimizer):
        weights |= _apply_parts(inner, gradients, parameters, modifiers)
    elif modifiers.apply is False:
        for keys, g in present(gradients):
            _refuse_rows(inner, keys, g)
    else:
        weights |= _apply_around(inner, gradients, parameters, modifiers)
    return rebuild(gradients, parameters, iter(weights.values()))


def _parameter(optimizer: Optimizer, keys: Keys, parameters: Any) -> mx.array:
    w = find(parameters, keys)
    if not isinstance(w, mx.array):
        raise ValueError(f"[{type(optimizer).__name__}] there is a gradient for '{dotted(keys)}' but no parameter.")
    return w


def _kept(new: mx.array, old: mx.array, modifiers: Modifiers) -> mx.array:
    if new.dtype != old.dtype:
        new = new.astype(old.dtype)
    return selected(modifiers, new, old)


def selected(modifiers: Modifiers, new: mx.array, old: mx.array) -> mx.array:
    """``new``, or ``old`` where the step does not happen; in a guarded step also where ``new`` is not finite."""
    if isinstance(modifiers.apply, bool):
        return new
    guarded = modifiers.guarded and mx.issubdtype(new.dtype, mx.inexact) and new.shape == old.shape
    return _guarded(modifiers.apply, new, old) if guarded else mx.where(modifiers.apply, new, old)


@compiled
def _guarded(apply: mx.array, new: mx.array, old: mx.array) -> mx.array:
    return mx.where(mx.logical_and(apply, mx.abs(new) < float("inf")), new, old)  # False for a NaN


def _apply_parts(optimizer: MultiOptimizer, gradients: Any, parameters: Any, modifiers: Modifiers) -> dict[Keys, Any]:
    # part by part: one of them may take the modifiers
    new: dict[Keys, Any] = {}
    parts = _split(optimizer, pruned(gradients))
    for part, inner in zip(parts, optimizer.optimizers, strict=True):
        is_idle = getattr(inner, "_is_idle", None)  # ours have it
        if is_idle is not None and is_idle(part):
            continue
        if modifiers.flush and not accumulations(inner):
            continue
        leaves = [keys for keys, _ in present(part)]
        updated = apply_modified(inner, part, parameters, _only(modifiers, {*leaves}))
        new |= {keys: find(updated, keys) for keys in leaves}
    return new


def _only(modifiers: Modifiers, leaves: set[Keys]) -> Modifiers:
    """The modifiers of the parameters at ``leaves``: a norm inside a part knows no others."""

    def only(scalar: Scalar | None) -> Scalar | None:
        return {keys: x for keys, x in scalar.items() if keys in leaves} if isinstance(scalar, dict) else scalar

    return replace(modifiers, scale=only(modifiers.scale), low=only(modifiers.low), high=only(modifiers.high))


def _apply_around(optimizer: Optimizer, gradients: Any, parameters: Any, modifiers: Modifiers) -> dict[Keys, Any]:
    plain = pruned(gradients, named=False)
    seen = mapped(lambda keys, g: _seen(optimizer, keys, g, find(parameters, keys), modifiers), plain)
    if any(is_absent(find(optimizer.state, keys)) for keys, _ in present(seen)):
        optimizer.init(seen)  # the optimizer itself asks only once, and there must be an old state to fall back to
    with _schedules_at(optimizer, modifiers.calls):
        if isinstance(modifiers.apply, bool):
            new = optimizer.apply_gradients(seen, parameters)
        else:
            before = copied(optimizer.state)
            new = optimizer.apply_gradients(seen, parameters)
            _select(modifiers, optimizer.state, before)
    return {keys: _kept(find(new, keys), find(parameters, keys), modifiers) for keys, _ in present(seen)}


def _seen(optimizer: Optimizer, keys: Keys, g: Any, w: mx.array, modifiers: Modifiers) -> mx.array:
    """The gradient as the optimizer gets it: in the dtype of its parameter, as it would come from the model, or fp32.

    In fp32 also where nothing was scaled: the optimizer's state takes the dtype of what it sees.
    """
    _refuse_rows(optimizer, keys, g)
    dtype = mx.float32 if _is_narrow(w) else w.dtype
    if modifiers.scale is None and modifiers.low is None:
        return g if g.dtype == dtype else g.astype(dtype)
    return modifiers.modified(keys, g).astype(dtype)


def _refuse_rows(optimizer: Optimizer, keys: Keys, g: Any) -> None:
    owner = type(optimizer).__name__
    if is_row_sparse(owner, keys, g):
        only = "a RowSparse, which only mlx_adagrad.Adagrad takes; its to_dense() can be used"
        raise TypeError(f"[{owner}] the gradient of '{dotted(keys)}' is {only}.")


@contextmanager
def _schedules_at(optimizer: Optimizer, calls: mx.array | None) -> Iterator[None]:
    """The optimizer's schedules see the number of calls and not its own step count."""
    schedules = optimizer._schedulers
    try:
        try:
            if calls is not None:
                optimizer._schedulers = {k: (lambda _, schedule=s: schedule(calls)) for k, s in schedules.items()}
            yield
        finally:
            optimizer._schedulers = schedules
    finally:
        optimizer._schedulers = schedules  # where the first was interrupted


def _select(modifiers: Modifiers, state: Any, before: Any) -> None:
    """Put the old arrays back into ``state`` where the step does not happen."""
    for key, value in list(state.items() if isinstance(state, dict) else enumerate(state)):
        old = find(before, (key,))
        if isinstance(value, dict | list | tuple):
            _select(modifiers, value, old)
        elif isinstance(value, mx.array) and isinstance(old, mx.array) and value is not old:
            state[key] = selected(modifiers, value, old)
