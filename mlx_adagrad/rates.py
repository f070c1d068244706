"""What a user may give as a learning rate, made into a 0-d fp32 array or a schedule that returns one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import mlx.core as mx

from . import checks
from .update.tracing import evaluate

Schedule: TypeAlias = Callable[[mx.array], mx.array]
LearningRate: TypeAlias = "float | mx.array | Callable[..., Any] | Mapping[str, Any]"

REAL_DTYPES = (mx.floating, mx.integer)


def parse(owner: str, name: str, value: Any) -> mx.array | Schedule:
    """A 0-d fp32 array for a number or a one-element array, a schedule of the step for a callable or one of Keras's.

    Raises:
        TypeError: For what is no number, array or callable; a bool is none of them.
        ValueError: For a negative, infinite or NaN number, for an array of more than one element, and for a schedule
            of Keras's that is not known. The value inside an array is never read: it may belong to a trace.
    """
    if isinstance(value, CheckedSchedule):
        return value
    hint = "" if is_keras_schedule(value) else checks.parameters_hint(value)
    if hint:
        raise TypeError(f"[{owner}] '{name}' must be a number, array or schedule but got {checks.shown(value)}{hint}.")
    if is_keras_schedule(value):
        from . import schedules

        value = schedules.from_keras(value)
    if callable(value):
        return _schedule(owner, name, value)
    array = as_array(owner, name, value)
    evaluate(array, wait=False)  # a lazy array could be used on this thread only
    return array


def starting(rate: mx.array | Schedule, step: mx.array) -> mx.array:
    """The learning rate that an optimizer shows before its next step, which may be made on another thread."""
    array = rate(step) if callable(rate) else rate
    evaluate(array, wait=False)
    return array


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
    return CheckedSchedule(owner, name, function, takes_step(function))


@dataclass(frozen=True)
class CheckedSchedule:
    """A schedule whose result is checked; ``given`` is the user's callable, of the step or without arguments."""

    owner: str
    name: str
    given: Callable[..., Any]
    takes_step: bool

    def __call__(self, step: mx.array) -> mx.array:
        return as_array(self.owner, self.name, self.given(step) if self.takes_step else self.given())


def is_keras_schedule(value: Any) -> bool:
    """Whether ``value`` is a schedule of Keras's, or its config; called, it would return its backend's arrays."""
    if isinstance(value, Mapping):
        return "class_name" in value
    ours = type(value).__module__.partition(".")[0] == __package__
    return callable(getattr(value, "get_config", None)) and not ours


def takes_step(function: Callable[..., Any]) -> bool:
    """Whether ``function`` takes the step: Keras's callables have no argument, or only some with a default."""
    try:
        signature = inspect.signature(function)
        signature.bind(None)
    except TypeError:
        return False
    except ValueError:  # a builtin that tells no signature
        return True
    return any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in signature.parameters.values())
