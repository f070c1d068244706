"""What one call of an optimizer makes once for all tensors that share it: their numbers and their compiled code."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from . import ops
from .accumulators import COMPUTE_DTYPE, Dense
from .modifiers import Keys, Modifiers, at
from .rule import Form, Rule, Scalars, effective_lr
from .streams import StreamScheduler


@cache
def _constant(value: float, dtype: mx.Dtype) -> mx.array:
    return mx.array(value, dtype)


class Plan(NamedTuple):
    """How to update a tensor in this step."""

    form: Form
    scalars: Scalars
    v_dtype: mx.Dtype
    functions: ops.Functions


class Step:
    """One step of an optimizer; lives for one call, so that no tracer outlives it.

    Args:
        accumulator: How ``v`` is stored.
        learning_rate: The learning rate of a parameter group (None: of what is in no group), 0-d fp32.
        before: Steps made before this one, uint64.
        modifiers: What the wrappers around the optimizer ask for.
    """

    def __init__(
        self,
        accumulator: Dense,
        learning_rate: Callable[[int | None], mx.array],
        before: mx.array,
        modifiers: Modifiers,
    ):
        self.accumulator = accumulator
        self.learning_rate = learning_rate
        self.before = before
        self.modifiers = modifiers
        # what the step adds to step counts: 1, or 0 where it does not happen
        self.counted = 1 if isinstance(modifiers.apply, bool) else modifiers.apply.astype(mx.uint64)
        self.by_path = any(isinstance(m, dict) for m in (modifiers.scale, modifiers.low, modifiers.high))
        self.streams = StreamScheduler()
        # plans that hold for every parameter of a dtype, where there is nothing else to tell them apart
        self.shared: dict[mx.Dtype, Plan] = {}
        self._plans: dict[Any, Plan] = {}

    def plan(self, rule: Rule, group: int | None, w: mx.array, keys: Keys = (), own_step: Any = None) -> Plan:
        """The plan for the parameter ``w`` of ``rule``; ``own_step``: its own count of the steps before."""
        if own_step is not None:
            return self._make(rule, group, w, keys, own_step)
        key = (id(rule), group, w.dtype, keys)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make(rule, group, w, keys, self.before)
        return plan

    def _make(self, rule: Rule, group: int | None, w: mx.array, keys: Keys, before: mx.array) -> Plan:
        m, dtype = self.modifiers, COMPUTE_DTYPE[w.dtype]
        scale, low, high = (at(scalar, keys) for scalar in (m.scale, m.low, m.high))
        apply = None if isinstance(m.apply, bool) else m.apply
        form = rule.form(scaled=scale is not None, clipped=low is not None, gated=apply is not None)
        lr = effective_lr(rule, self.learning_rate(group).astype(dtype), before)
        eps, weight_decay = _constant(rule.eps, dtype), _constant(rule.weight_decay, dtype)
        scale, low, high = (None if s is None else s.astype(dtype) for s in (scale, low, high))
        v_dtype = self.accumulator.storage_dtype(w)
        functions = ops.functions(form, self.accumulator, v_dtype)
        return Plan(form, Scalars(lr, eps, weight_decay, scale, low, high, apply), v_dtype, functions)
