"""What a wrapper asks of the optimizers and of the states that it is given, before anything changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer


def refuse_inside(owner: str, optimizer: Optimizer, within: bool = False) -> None:
    """Raise ValueError for a wrapper of the whole run inside a MultiOptimizer, which hands none of its methods on."""
    inner: Any = optimizer
    if within and getattr(inner, "whole_run", False):
        name = type(inner).__name__
        why = "which would act on its part and not on the whole run"
        raise ValueError(f"[{owner}] {name} is inside a MultiOptimizer, {why}: put it around the MultiOptimizer.")
    if isinstance(inner, MultiOptimizer):
        for part in inner.optimizers:
            refuse_inside(owner, part, True)
    elif isinstance(getattr(inner, "optimizer", None), Optimizer):
        refuse_inside(owner, inner.optimizer, within)


def parts(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those inside it, the outermost first; a MultiOptimizer has no state of its own."""
    if isinstance(optimizer, MultiOptimizer):
        for inner in optimizer.optimizers:
            yield from parts(inner)
        return
    yield optimizer
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        yield from parts(optimizer.optimizer)


def expect_new_state(optimizer: Any) -> None:
    """Let the next step compare the state of an optimizer of ours, and of those inside, with its parameters."""
    for part in parts(optimizer) if hasattr(optimizer, "_compared") else ():
        part._initialized = False


def check_roots(owner: str, state: Any, current: dict[str, Any]) -> None:
    """Raise for a state without the counts and rates that an optimizer has from its constructor on."""
    if not isinstance(state, dict):
        raise TypeError(f"[{owner}] 'state' must be a dict but got {type(state).__name__}.")
    for key in ("step", "learning_rate"):
        if key in current and key not in state:
            raise ValueError(f"[{owner}] the state has no {key!r}.")
        if key in current:
            _check_array(owner, repr(key), state[key], None)


def check_own(owner: str, own: Any, fresh: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise for own entries that another wrapper has, or that are of another form than ``current``.

    Args:
        owner: The name of the wrapper.
        own: What is to become its own entries; it may lack some.
        fresh: What they are before the first step: arrays, and dicts of arrays by parameter.
        current: What they are now.
    """
    if not isinstance(own, dict):
        raise TypeError(f"[{owner}] '_mlx_adagrad' of the state must be a dict but got {type(own).__name__}.")
    for key, value in own.items():
        if key not in fresh:
            raise ValueError(f"[{owner}] the state has {key!r}, which belongs to another wrapper.")
        if not isinstance(fresh[key], dict):
            _check_array(owner, repr(key), value, fresh[key])
        elif not isinstance(value, dict):
            raise TypeError(f"[{owner}] {key!r} of the state must be a dict but got {type(value).__name__}.")
        else:
            for name, leaf in value.items():
                _check_leaf(owner, f"{key!r} {name!r}", leaf, current[key].get(name))


def _check_leaf(owner: str, what: str, value: Any, like: Any) -> None:
    """Raise for what is neither an array like the one that is there nor a sum of rows; see ``row_sums``."""
    if not isinstance(value, dict | list):
        return _check_array(owner, what, value, like if isinstance(like, mx.array) else None)
    for part in value if isinstance(value, list) else [value]:
        if not isinstance(part, dict) or part.keys() != {"indices", "values"}:
            raise TypeError(f"[{owner}] {what} of the state must be an array, or 'indices' and 'values' of rows.")
        for array in part.values():
            _check_array(owner, what, array, None)
        indices, values = part["indices"], part["values"]
        columns = like.shape[1:] if isinstance(like, mx.array) else values.shape[indices.ndim :]
        if indices.dtype != mx.int32 or values.shape != (*indices.shape, *columns):
            shapes = f"{indices.dtype} {indices.shape} and values {values.shape}, which do not fit"
            raise ValueError(f"[{owner}] {what} of the state has indices {shapes}.")


def _check_array(owner: str, what: str, value: Any, like: mx.array | None) -> None:
    if not isinstance(value, mx.array):
        raise TypeError(f"[{owner}] {what} of the state must be an array but got {type(value).__name__}.")
    if like is not None and value.shape != like.shape:
        raise ValueError(f"[{owner}] {what} of the state has shape {value.shape} but must have {like.shape}.")
    if like is not None and value.dtype != like.dtype:
        raise ValueError(f"[{owner}] {what} of the state is {value.dtype} but must be {like.dtype}.")
