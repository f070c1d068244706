"""What a user may give as a learning rate, made into a 0-d fp32 array or a schedule that returns one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias

import mlx.core as mx

from . import checks

Schedule: TypeAlias = Callable[[mx.array], mx.array]
LearningRate: TypeAlias = "float | mx.array | Callable[..., Any]"

REAL_DTYPES = (mx.floating, mx.integer)


def parse(owner: str, name: str, value: Any) -> mx.array | Schedule:
    """A 0-d fp32 array for a number or a one-element array, a schedule of the step for a callable.

    Raises:
        TypeError: For what is no number, array or callable; a bool is none of them.
        ValueError: For a negative, infinite or NaN number, and for an array of more than one element. The value
            inside an array is never read: it may belong to a trace.
    """
    if callable(value):
        return _schedule(owner, name, value)
    return as_array(owner, name, value)


def as_array(owner: str, name: str, value: Any) -> mx.array:
    """``value`` as a 0-d fp32 array, checked as :func:`parse` says."""
    if isinstance(value, Real) or not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return mx.array(checks.non_negative(owner, name, value), mx.float32)
    array = value if isinstance(value, mx.array) else mx.array(value)
    if array.size != 1:
        raise ValueError(f"[{owner}] '{name}' must have one element but got an array of shape {array.shape}.")
    if not any(mx.issubdtype(array.dtype, kind) for kind in REAL_DTYPES):
        raise TypeError(f"[{owner}] '{name}' must be a real number but got an array of {array.dtype}.")
    return array.astype(mx.float32).reshape(())


def _schedule(owner: str, name: str, function: Callable[..., Any]) -> Schedule:
    if takes_step(function):
        return lambda step: as_array(owner, name, function(step))
    return lambda step: as_array(owner, name, function())


def takes_step(function: Callable[..., Any]) -> bool:
    """Whether ``function`` can be called with one argument, the step; a Keras-style callable takes none."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # a builtin that tells no signature
        return True
    return True
