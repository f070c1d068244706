"""Constraints on weights, imposed after each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import mlx.core as mx
from mlx.optimizers import Optimizer

from .. import checks
from ..groups import Predicate
from ..leaves import dotted, is_absent, rebuild
from ..modifiers import Modifiers
from .base import Wrapper
from .trees import find, present, trainable

Function: TypeAlias = Callable[[mx.array], mx.array]

EPSILON = 1e-7  # Keras's, against division by 0


@dataclass(frozen=True)
class NonNeg:
    r"""No weight below 0: :math:`\max(w, 0)`."""

    def __call__(self, w: mx.array) -> mx.array:
        return mx.maximum(w, 0)


@dataclass(frozen=True)
class MaxNorm:
    r"""No norm along an axis above a limit: :math:`w \min(\|w\|, c) / (10^{-7} + \|w\|)`, Keras's ``MaxNorm``.

    Args:
        max_value: :math:`c \ge 0`. Default: ``2.0``.
        axis: Axis, or axes, along which to take norms. Default: 0, the inputs of a Keras kernel; for the (outputs,
            inputs) weights of ``mlx.nn.Linear`` that is -1.

    Raises:
        ValueError: If ``max_value`` is negative, infinite or NaN.
    """

    max_value: float = 2.0
    axis: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        checks.non_negative("MaxNorm", "max_value", self.max_value)

    def __call__(self, w: mx.array) -> mx.array:
        wide, norm = _with_norm(w, self.axis)
        return (wide * (mx.minimum(norm, self.max_value) / (EPSILON + norm))).astype(w.dtype)


@dataclass(frozen=True)
class UnitNorm:
    r"""Norms along an axis of 1: :math:`w / (10^{-7} + \|w\|)`, Keras's ``UnitNorm``.

    Args:
        axis: As in :class:`MaxNorm`. Default: 0.
    """

    axis: int | tuple[int, ...] = 0

    def __call__(self, w: mx.array) -> mx.array:
        wide, norm = _with_norm(w, self.axis)
        return (wide / (EPSILON + norm)).astype(w.dtype)


def _with_norm(w: mx.array, axis: int | tuple[int, ...]) -> tuple[mx.array, mx.array]:
    wide = w if w.dtype in (mx.float64, mx.complex64) else w.astype(mx.float32)
    norm = mx.sqrt(mx.sum(mx.square(mx.abs(wide)), axis=axis if w.ndim else None, keepdims=True))
    return wide, norm


NAMED: dict[str, Callable[[], Function]] = {"non_neg": NonNeg, "max_norm": MaxNorm, "unit_norm": UnitNorm}


class Constraint(Wrapper):
    """Imposes constraints on the weights that have a gradient, after the update and after an average inside.

    Args:
        optimizer: The optimizer inside; an :class:`ExponentialMovingAverage` belongs there too, as in Keras.
        constraints: ``{pattern: constraint}``, the first match wins. A pattern is a glob on the dotted path or a
            predicate on (path, array); a constraint is a name (``"non_neg"``, ``"max_norm"``, ``"unit_norm"``) or a
            callable from weights to weights.

    Raises:
        ValueError: For an unknown name; at the first step for a pattern that matches no parameter.
        TypeError: For what is neither a name nor a callable, and for a pattern that is neither.
    """

    def __init__(self, optimizer: Optimizer, constraints: Mapping[Any, str | Function]):
        if not isinstance(constraints, Mapping):
            raise TypeError(f"[{self._name}] 'constraints' must map patterns to constraints but got {constraints!r}.")
        self.constraints = {self._pattern(p): self._function(c) for p, c in constraints.items()}
        self._unmatched = set(self.constraints)
        super().__init__(optimizer)

    def _pattern(self, pattern: str | Predicate) -> str | Predicate:
        if isinstance(pattern, str) or callable(pattern):
            return pattern
        raise TypeError(f"[{self._name}] a pattern must be a glob or a predicate but got {pattern!r}.")

    def _function(self, constraint: str | Function) -> Function:
        if isinstance(constraint, str):
            if constraint in NAMED:
                return NAMED[constraint]()
            raise ValueError(f"[{self._name}] there is no constraint {constraint!r}, only {', '.join(NAMED)}.")
        if callable(constraint):
            return constraint
        raise TypeError(f"[{self._name}] a constraint must be a name or a callable but got {constraint!r}.")

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        self._check_matches(parameters)
        new = super().apply_modified(gradients, parameters, modifiers)
        if modifiers.apply is False:
            return new
        return rebuild(new, parameters, (self._constrained(keys, w, gradients, modifiers) for keys, w in present(new)))

    def _constrained(self, keys: tuple, w: mx.array, gradients: dict, modifiers: Modifiers) -> mx.array:
        path = dotted(keys)
        function = next((f for p, f in self.constraints.items() if _matches(p, path, w)), None)
        if function is None or is_absent(find(gradients, keys)):
            return w
        new = function(w).astype(w.dtype)
        if new.shape != w.shape:
            raise ValueError(f"[{self._name}] the constraint of '{path}' made shape {new.shape} of {w.shape}.")
        return new if isinstance(modifiers.apply, bool) else mx.where(modifiers.apply, new, w)

    def _check_matches(self, parameters: Any) -> None:
        """A pattern that matches nothing is a mistake; asked until it has matched once."""
        if not self._unmatched:
            return
        leaves: Iterable[tuple[tuple, mx.array]] = list(trainable(parameters).values())
        for pattern in list(self._unmatched) if leaves else ():
            if not any(_matches(pattern, dotted(keys), w) for keys, w in leaves):
                raise ValueError(f"[{self._name}] the pattern {pattern!r} matches no parameter.")
            self._unmatched.discard(pattern)


def _matches(pattern: str | Predicate, path: str, w: mx.array) -> bool:
    return fnmatchcase(path, pattern) if isinstance(pattern, str) else pattern(path, w)
