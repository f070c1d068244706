"""The numbers of one call of an optimizer, made once for all tensors that share them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .modifiers import Modifiers, at
from .rule import Form, Rule, Scalars, effective_lr


class StepScalars:
    """Gives each tensor its :class:`Form` and its :class:`Scalars`; lives for one call, so that no tracer outlives it.

    Args:
        learning_rate: The learning rate of a parameter group (None: of what is in no group), 0-d fp32.
        step: Steps made before this one, uint64.
        modifiers: What the wrappers around the optimizer ask for.
    """

    def __init__(self, learning_rate: Callable[[int | None], mx.array], step: mx.array, modifiers: Modifiers):
        self.learning_rate = learning_rate
        self.step = step
        self.modifiers = modifiers
        # what a step adds to the step counts: 1, or 0 where it does not happen
        self.counted = 1 if isinstance(modifiers.apply, bool) else modifiers.apply.astype(mx.uint64)
        self.needs_path = any(isinstance(m, dict) for m in (modifiers.scale, modifiers.low, modifiers.high))
        self._shared: dict[Any, tuple[Form, Scalars]] = {}
        self._rows: dict[int, mx.array] = {}

    def of(
        self, rule: Rule, group: int | None, dtype: mx.Dtype, path: str = "", own_step: mx.array | None = None
    ) -> tuple[Form, Scalars]:
        """The form and the numbers for a tensor of ``rule`` that computes in ``dtype``."""
        if own_step is not None:
            return self._make(rule, group, dtype, path, own_step)
        key = (id(rule), group, dtype, path if self.needs_path else "")
        if key not in self._shared:
            self._shared[key] = self._make(rule, group, dtype, path, self.step)
        return self._shared[key]

    def row(self, scalars: Scalars) -> mx.array:
        """``scalars`` as the kernels take them, made once for all tensors that share them."""
        if id(scalars) not in self._rows:
            self._rows[id(scalars)] = scalars.row()
        return self._rows[id(scalars)]

    def _make(self, rule: Rule, group: int | None, dtype: mx.Dtype, path: str, step: mx.array) -> tuple[Form, Scalars]:
        m = self.modifiers
        scale, low, high = (at(scalar, path) for scalar in (m.scale, m.low, m.high))
        apply = None if isinstance(m.apply, bool) else m.apply
        form = rule.form(scaled=scale is not None, clipped=low is not None, gated=apply is not None)
        lr = effective_lr(rule, self.learning_rate(group).astype(dtype), step)
        eps, weight_decay = mx.array(rule.eps, dtype), mx.array(rule.weight_decay, dtype)
        scale, low, high = (None if s is None else s.astype(dtype) for s in (scale, low, high))
        return form, Scalars(lr, eps, weight_decay, scale, low, high, apply)
