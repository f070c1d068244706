"""Constraints on weights, imposed after each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, TypeAlias

import mlx.core as mx
from mlx.optimizers import Optimizer

from .. import checks
from ..checks import shown
from ..distributed.sharding import cuts_of
from ..groups import Predicate
from ..leaves import rebuild
from ..trees import FROZEN, Keys, dotted, existing, find, is_absent, present
from ..update.accumulators import COMPUTE_DTYPE
from ..update.modifiers import Modifiers
from . import reductions
from .base import Wrapper
from .foreign import selected

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
        TypeError: If ``axis`` is neither an integer nor a tuple of integers.
    """

    max_value: float = 2.0
    axis: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_value", checks.non_negative("MaxNorm", "max_value", self.max_value))
        _check_axis("MaxNorm", self.axis)

    def __call__(self, w: mx.array) -> mx.array:
        wide, norm = _with_norm("MaxNorm", w, self.axis)
        return (wide * (mx.minimum(norm, self.max_value) / (EPSILON + norm))).astype(w.dtype)


@dataclass(frozen=True)
class UnitNorm:
    r"""Norms along an axis of 1: :math:`w / (10^{-7} + \|w\|)`, Keras's ``UnitNorm``.

    Args:
        axis: As in :class:`MaxNorm`. Default: 0.

    Raises:
        TypeError: If ``axis`` is neither an integer nor a tuple of integers.
    """

    axis: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        _check_axis("UnitNorm", self.axis)

    def __call__(self, w: mx.array) -> mx.array:
        wide, norm = _with_norm("UnitNorm", w, self.axis)
        return (wide / (EPSILON + norm)).astype(w.dtype)


def _axes(axis: Any) -> tuple[Any, ...] | list[Any]:
    return axis if isinstance(axis, tuple | list) else (axis,)


def _check_axis(owner: str, axis: Any) -> None:
    if any(isinstance(a, bool) or not isinstance(a, Integral) for a in _axes(axis)):
        raise TypeError(f"[{owner}] 'axis' must be an integer or a tuple of integers but got {shown(axis)}.")


def _with_norm(owner: str, w: mx.array, axis: int | tuple[int, ...]) -> tuple[mx.array, mx.array]:
    for a in _axes(axis):
        if w.ndim and not -w.ndim <= a < w.ndim:
            raise ValueError(f"[{owner}] there is no axis {a} in shape {w.shape}.")
    wide = w if w.dtype in (mx.float64, mx.complex64) else w.astype(mx.float32)
    size, along = mx.abs(wide), axis if w.ndim else None
    if w.size == 0:
        return wide, mx.sum(size, axis=along, keepdims=True)
    unit = reductions.unit_of(mx.max(size, axis=along, keepdims=True)).astype(size.dtype)
    norm = unit * reductions.root(mx.sum(mx.square(size / unit), axis=along, keepdims=True))
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
        ValueError: For an unknown name; before a step for a pattern that matches no parameter, frozen ones included,
            and for a constraint that refuses its weight or changes its shape.
        TypeError: For what is neither a name nor a callable, and for a pattern that is neither; before a step for a
            constraint that makes no array, or one of a dtype that the weight cannot take.
    """

    def __init__(self, optimizer: Optimizer, constraints: Mapping[Any, str | Function]):
        if not isinstance(constraints, Mapping):
            wanted = "map patterns to constraints"
            raise TypeError(f"[{self._name}] 'constraints' must {wanted} but got {shown(constraints)}.")
        self.constraints = {self._pattern(p): self._function(c) for p, c in constraints.items()}
        self._unmatched = set(self.constraints)
        self._tried: dict[Keys, tuple] = {}
        super().__init__(optimizer)

    def _pattern(self, pattern: str | Predicate) -> str | Predicate:
        if isinstance(pattern, str) or callable(pattern):
            return pattern
        raise TypeError(f"[{self._name}] a pattern must be a glob or a predicate but got {shown(pattern)}.")

    def _function(self, constraint: str | Function) -> Function:
        if isinstance(constraint, str):
            if constraint in NAMED:
                return NAMED[constraint]()
            raise ValueError(f"[{self._name}] there is no constraint {shown(constraint)}, only {', '.join(NAMED)}.")
        if callable(constraint):
            return constraint
        raise TypeError(f"[{self._name}] a constraint must be a name or a callable but got {shown(constraint)}.")

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        self._check_matches(parameters)
        self._check_shards(parameters)
        self._try(gradients, parameters)
        new = super().apply_modified(gradients, parameters, modifiers)
        if modifiers.apply is False:
            return new
        return rebuild(new, parameters, (self._constrained(keys, w, gradients, modifiers) for keys, w in present(new)))

    def _constrained(self, keys: tuple, w: mx.array, gradients: dict, modifiers: Modifiers) -> mx.array:
        if is_absent(find(gradients, keys)):
            return w
        new = self._imposed(keys, w)
        return selected(modifiers, new, w)

    def _check_shards(self, parameters: Any) -> None:
        """Raise ValueError where a constraint would need all of a parameter of which this process has a part."""
        for keys, cut in cuts_of(parameters).items():
            w = find(parameters, keys)
            pattern = next((p for p in self.constraints if _matches(p, dotted(keys), w)), None)
            if pattern is not None and not _acts_on_parts(self.constraints[pattern], cut.axis, w.ndim):
                what = f"[{self._name}] '{dotted(keys)}' is sharded along axis {cut.axis}"
                raise ValueError(f"{what}: {self.constraints[pattern]!r:.80} cannot be right on a part of it.")

    def _imposed(self, keys: Keys, w: mx.array) -> mx.array:
        """The weight under the first constraint that matches, checked; lazy."""
        path = dotted(keys)
        pattern = next((p for p in self.constraints if _matches(p, path, w)), None)
        if pattern is None:
            return w
        what, by = f"[{self._name}] the constraint of '{path}'", f"by the pattern {shown(pattern)}"
        try:
            new: Any = self.constraints[pattern](w)
        except ValueError as error:
            raise ValueError(f"{what}, {by}: {error}") from error
        if not isinstance(new, mx.array):
            raise TypeError(f"{what} must return an array but got {type(new).__name__}, {by}.")
        if new.shape != w.shape:
            raise ValueError(f"{what} made shape {new.shape} of {w.shape}, {by}.")
        if new.dtype not in COMPUTE_DTYPE or (new.dtype == mx.complex64 and w.dtype != mx.complex64):
            raise TypeError(f"{what} made {new.dtype} of {w.dtype}, {by}.")
        return new.astype(w.dtype)

    def _try(self, gradients: Any, parameters: Any) -> None:
        """Impose each constraint on the weight before the step, once for each: an error must not come after it."""
        for keys, _ in present(gradients):
            w = find(parameters, keys)
            kind = (w.shape, str(w.dtype)) if isinstance(w, mx.array) else None  # a copy cannot take a Dtype
            if kind is not None and self._tried.get(keys) != kind:
                self._imposed(keys, w)
                self._tried[keys] = kind

    def _check_matches(self, parameters: Any) -> None:
        """A pattern that matches no parameter, frozen ones included, is a mistake; asked until it has matched once."""
        if not self._unmatched:
            return
        leaves = list(existing(parameters))
        for pattern in list(self._unmatched) if leaves else ():
            if not any(_matches(pattern, dotted(keys), w) for keys, w in leaves):
                raise ValueError(f"[{self._name}] the pattern {shown(pattern)} matches no parameter; {FROZEN}.")
            self._unmatched.discard(pattern)


def _acts_on_parts(constraint: Function, cut: int, ndim: int) -> bool:
    """Whether a constraint on a part along the axis ``cut`` is that of the whole, as far as can be told."""
    if isinstance(constraint, MaxNorm | UnitNorm):
        return all(a % ndim != cut for a in _axes(constraint.axis))
    return isinstance(constraint, NonNeg)


def _matches(pattern: str | Predicate, path: str, w: mx.array) -> bool:
    if not isinstance(pattern, str):
        return pattern(path, w)
    return path == pattern or fnmatchcase(path, pattern)  # a path may hold brackets
