"""The Adagrad update in MLX operations: the one home of the formula outside Metal.

Everything here works on arrays of one compute dtype (fp32, or fp64 for fp64 parameters) and knows neither storage
dtypes nor devices. ``metal/rule.metal`` is its counterpart on scalars; the tests hold both against numpy float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from .. import checks

# A v below the smallest normal number counts as 0, on every device: GPUs flush it.
SMALLEST_NORMAL = {mx.float32: 2.0**-126, mx.float64: 2.0**-1022}
# What stands in for a v of 0 under the root. A v that holds the gradient's square is 0 only where the gradient is 0, or
# as small, and so is the update for any positive root. With this one the first derivatives are those of 0 next to any
# common eps, and the second do not overflow, as they would at the smallest normal number: 0 times infinity is NaN.
STAND_IN = {mx.float32: 2.0**-84, mx.float64: 2.0**-680}

LARGEST = {
    mx.float16: 65504.0,
    mx.bfloat16: (2 - 2.0**-7) * 2.0**127,
    mx.float32: (2 - 2.0**-23) * 2.0**127,
    mx.float64: (2 - 2.0**-52) * 2.0**1023,
}


@dataclass(frozen=True)
class Rule:
    """The hyperparameters that act on each element, fixed for the life of an optimizer (or of one parameter group).

    Args:
        eps: Term in the denominator, >= 0.
        eps_inside_sqrt: Divide by ``sqrt(v + eps)`` (Keras 3, optax) and not by ``sqrt(v) + eps`` (torch, MLX).
        lr_decay: Decay of the learning rate, ``lr / (1 + (t - 1) lr_decay)``, >= 0.
        weight_decay: Weight decay, >= 0; coupled (``g += weight_decay w``) unless ``decoupled_weight_decay``.
        decoupled_weight_decay: ``w -= lr weight_decay w`` before the update.
        initial_accumulator_value: What ``v`` starts from, >= 0.
        maximize: Follow the gradient uphill.
        update_accumulator: Let ``v`` grow (TensorFlow's and MindSpore's ``update_slots``).
        step_per_parameter: Count steps for each parameter on its own, as torch does; it matters to ``lr_decay``.
        owner: The name that error messages carry.
    """

    eps: float = 1e-8
    eps_inside_sqrt: bool = False
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    initial_accumulator_value: float = 0.0
    maximize: bool = False
    update_accumulator: bool = True
    step_per_parameter: bool = False
    owner: str = "Adagrad"

    def __post_init__(self) -> None:
        for name in ("eps", "lr_decay", "weight_decay", "initial_accumulator_value"):
            object.__setattr__(self, name, checks.non_negative(self.owner, name, getattr(self, name)))
        for name in (
            "eps_inside_sqrt",
            "decoupled_weight_decay",
            "maximize",
            "update_accumulator",
            "step_per_parameter",
        ):
            checks.boolean(self.owner, name, getattr(self, name))

    def form(
        self, *, scaled: bool = False, clipped: bool = False, gated: bool = False, guarded: bool = False
    ) -> Form:
        """What of this rule decides which code runs, with the numbers left out."""
        decays = self.weight_decay > 0
        return Form(
            maximize=self.maximize,
            coupled=decays and not self.decoupled_weight_decay,
            decoupled=decays and self.decoupled_weight_decay,
            eps_inside_sqrt=self.eps_inside_sqrt,
            eps_is_zero=self.eps == 0,
            update_accumulator=self.update_accumulator,
            guarded=guarded,
            scaled=scaled,
            clipped=clipped,
            gated=gated,
        )


class Form(NamedTuple):
    """The branches of the formula: constants of a compiled function, template constants of a Metal kernel."""

    maximize: bool
    coupled: bool
    decoupled: bool
    eps_inside_sqrt: bool
    eps_is_zero: bool
    update_accumulator: bool
    guarded: bool
    scaled: bool
    clipped: bool
    gated: bool


class Scalars(NamedTuple):
    """The numbers of one step, 0-d arrays: each enters the update as a scalar, never as a pass over memory.

    ``scale``, ``low``/``high`` and ``apply`` come from wrappers (loss scale, clipping, skipped steps); None where
    unused. ``smallest`` and ``stand_in`` are :data:`SMALLEST_NORMAL` and :data:`STAND_IN` as arrays, where constants
    will not do.
    """

    lr: mx.array
    eps: mx.array
    weight_decay: mx.array
    scale: Any = None
    low: Any = None
    high: Any = None
    apply: Any = None
    smallest: Any = None
    stand_in: Any = None

    def at(self, i: int) -> Scalars:
        """Those of tensor ``i``, where a list in place of an array holds one for each tensor."""
        return Scalars(*[s[i] if isinstance(s, list) else s for s in self])

    def inputs(self) -> list[mx.array]:
        """The numbers that a Metal kernel takes, each an input of its own: packed into one array they would cost a
        launch each, since MLX's concatenate is a copy kernel an input.
        """
        used = self[: len(KERNEL_SCALARS)]
        return [unused if s is None else s for s, unused in zip(used, _unused(), strict=True)]


KERNEL_SCALARS = Scalars._fields[:-2]  # a kernel has its own constants


@cache
def _unused() -> tuple[mx.array, ...]:
    zero, false = mx.array(0.0), mx.array(False)
    return (zero,) * (len(KERNEL_SCALARS) - 1) + (false,)


def effective_lr(rule: Rule, learning_rate: mx.array, step: mx.array) -> mx.array:
    """``learning_rate / (1 + step lr_decay)``, where ``step`` counts the steps made before this one."""
    if rule.lr_decay == 0:
        return learning_rate
    return learning_rate / (1.0 + step.astype(learning_rate.dtype) * rule.lr_decay)


def effective_gradient(form: Form, w: mx.array, g: mx.array, s: Scalars) -> mx.array:
    """The gradient that Adagrad squares: unscaled, clipped, turned round for maximize, then decayed (torch's order)."""
    if form.scaled:
        g = g * s.scale
    if form.clipped:
        g = mx.minimum(mx.maximum(g, s.low), s.high)
    if form.maximize:
        g = -g
    if form.coupled:
        g = g + s.weight_decay * w
    return g


def accumulate(
    form: Form,
    w: mx.array,
    g: mx.array,
    v: mx.array,
    s: Scalars,
    pool: Callable[[Any], Any],
    storage: mx.Dtype | None = None,
) -> mx.array:
    """``v + g²``; ``pool`` is what the accumulator keeps of g² (all of it, or a mean over each row).

    In a guarded step it stops at the largest number that ``storage`` holds, by default the dtype of ``v``.
    """
    if not form.update_accumulator:
        return v
    total = v + pool(mx.square(effective_gradient(form, w, g, s)))
    if form.guarded:
        total = mx.minimum(total, LARGEST[storage or total.dtype])
    return mx.where(s.apply, total, v) if form.gated else total


def divided(form: Form, g: mx.array, v: mx.array, s: Scalars) -> mx.array:
    """``g / (sqrt(v) + eps)`` or ``g / sqrt(v + eps)``; 0 where eps and v are both 0."""
    if form.eps_inside_sqrt:
        v = v + s.eps
    smallest = SMALLEST_NORMAL[v.dtype] if s.smallest is None else s.smallest
    none = v < smallest
    if form.eps_is_zero:
        return mx.where(none, g - g, g / mx.sqrt(mx.where(none, 1.0, v)))  # a NaN stays one
    stand_in = STAND_IN[v.dtype] if s.stand_in is None else s.stand_in
    root = mx.sqrt(mx.where(none, stand_in if form.update_accumulator else smallest, v))
    return g / (root if form.eps_inside_sqrt else root + s.eps)


def descend(
    form: Form, w: mx.array, g: mx.array, v: mx.array, s: Scalars, storage: mx.Dtype | None = None
) -> mx.array:
    """``w - lr g / (sqrt(v) + eps)``, or with eps inside, for the ``v`` that already holds this gradient.

    In a guarded step ``w`` where the new one does not fit into ``storage``, by default the dtype of ``w``.
    """
    decayed = w - s.lr * s.weight_decay * w if form.decoupled else w
    new = decayed - divided(form, s.lr * effective_gradient(form, w, g, s), v, s)
    if not form.gated:
        return new
    fits = mx.logical_and(s.apply, mx.abs(new) <= LARGEST[storage or new.dtype]) if form.guarded else s.apply
    return mx.where(fits, new, w)
