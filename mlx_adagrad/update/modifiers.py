"""What a wrapper tells the optimizer inside it: scalars that enter the update, instead of passes over the gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import mlx.core as mx

from . import ops

Keys: TypeAlias = tuple[Any, ...]  # the path to a parameter

# One 0-d fp32 array for the whole tree, or one for each parameter.
Scalar: TypeAlias = "mx.array | dict[Keys, mx.array]"


def combine(a: Scalar | None, b: Scalar | None, function: Callable[[mx.array, mx.array], mx.array]) -> Scalar | None:
    """``function(a, b)``, parameter by parameter; where one of them is absent, the other."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, dict):
        return {keys: function(x, b[keys] if isinstance(b, dict) else b) for keys, x in a.items()}
    if isinstance(b, dict):
        return {keys: function(a, x) for keys, x in b.items()}
    return function(a, b)


def at(scalar: Scalar | None, keys: Keys) -> mx.array | None:
    """The scalar that holds for the parameter at ``keys``."""
    return scalar[keys] if isinstance(scalar, dict) else scalar


@dataclass(frozen=True)
class Modifiers:
    """The update sees ``clip(scale * gradient, low, high)``, and happens only where ``apply`` says so.

    Args:
        scale: Factor on the gradients: 1 / loss scale, a clip factor, 1 / accumulated steps.
        low: Lower bound of the scaled gradient's elements; given together with ``high``.
        high: Upper bound of the scaled gradient's elements.
        apply: Where False, weights, state and step counts stay as they are. A Python ``False`` costs nothing; an array
            is selected on, never read.
        guarded: Whether an element whose new value would not be finite is held back too.
        calls: Calls made so far, for learning-rate schedules; None: the optimizer's own step count.
        flush: Whether this call brings no gradients, only zeros in their place, and is to complete the window of a
            gradient accumulation inside; see wrappers/flushing.py.
        findings: What several processes have found out together about the gradients; see wrappers/agreement.py.
    """

    scale: Scalar | None = None
    low: Scalar | None = None
    high: Scalar | None = None
    apply: mx.array | bool = True
    calls: mx.array | None = None
    findings: Any = None
    flush: bool = False
    guarded: bool = False

    def scaled(self, factor: Scalar) -> Modifiers:
        """These modifiers, then a factor: it scales what was clipped before, hence the bounds too."""
        bounds = (b if b is None else combine(b, factor, mx.multiply) for b in (self.low, self.high))
        low, high = bounds
        return replace(self, scale=combine(self.scale, factor, mx.multiply), low=low, high=high)

    def clipped(self, low: Scalar, high: Scalar) -> Modifiers:
        """These modifiers, then a clip of every element to [low, high]."""
        if self.low is None:
            return replace(self, low=low, high=high)

        def clip(bound: Scalar | None) -> Scalar | None:
            return combine(combine(bound, low, mx.maximum), high, mx.minimum)

        return replace(self, low=clip(self.low), high=clip(self.high))

    def gated(self, flag: mx.array | bool) -> Modifiers:
        """These modifiers, with the update held back where ``flag`` is False too."""
        if isinstance(flag, bool) or isinstance(self.apply, bool):
            apply = flag if self.apply is True else (self.apply if flag is True else False)
        else:
            apply = mx.logical_and(self.apply, flag)
        return replace(self, apply=apply)

    def guarding(self, finite: mx.array | bool) -> Modifiers:
        """These modifiers, with the update held back where ``finite`` is False, and no element made infinite by it."""
        return replace(self.gated(finite), guarded=True)

    def flushing(self, apply: mx.array | bool) -> Modifiers:
        """These modifiers for a call that brings no gradients, where ``apply`` says so."""
        return replace(self.gated(apply), flush=True)

    def modified(self, keys: Keys, gradient: mx.array) -> mx.array:
        """``gradient`` as the update will see it, fp32 or wider: for norms, and for optimizers that take no
        modifiers.
        """
        if gradient.dtype != mx.complex64:
            gradient = gradient.astype(mx.float64 if gradient.dtype == mx.float64 else mx.float32)
        scale, low, high = at(self.scale, keys), at(self.low, keys), at(self.high, keys)
        if scale is not None:
            gradient = gradient * scale.astype(gradient.dtype)
        if low is None or high is None:
            return gradient
        if gradient.dtype == mx.complex64:  # two independent reals, as in the update
            return ops.join(_clip(mx.real(gradient), low, high), _clip(mx.imag(gradient), low, high))
        return _clip(gradient, low, high)


UNMODIFIED = Modifiers()


def _clip(gradient: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return mx.minimum(mx.maximum(gradient, low), high)
