"""What one call of an optimizer makes once for all tensors that share it: their numbers and their compiled code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from . import kernels, ops
from .accumulators import COMPUTE_DTYPE, Dense
from .kernels import Launches
from .modifiers import Keys, Modifiers
from .rule import Form, Rule, Scalars, effective_lr
from .streams import StreamScheduler


class Plan(NamedTuple):
    """How to update the tensors of one rule and dtype in this step; where a number differs from tensor to tensor,
    :meth:`Step.scalars` has it.
    """

    rule: Rule
    form: Form
    scalars: Scalars
    v_dtype: mx.Dtype
    functions: ops.Functions
    launches: Launches


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
        self._plans: dict[Any, Plan] = {}

    def plan(self, rule: Rule, group: int | None, w: mx.array) -> Plan:
        """The plan for parameters like ``w`` of ``rule``, with the learning rate of ``group``."""
        key = id(rule), group, w.dtype
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make(rule, group, w)
        return plan

    def differ(self, plan: Plan) -> bool:
        """Whether tensors of a plan have numbers that differ from tensor to tensor."""
        return self.by_path or counts_own_steps(plan.rule)

    def scalars(self, plan: Plan, keys: Sequence[Keys], states: Sequence[dict]) -> Scalars:
        """The numbers for some tensors of a plan, by their keys and states: an array where they share it, else a list
        with one for each.
        """
        scalars, m = plan.scalars, self.modifiers
        if counts_own_steps(plan.rule):
            rates = [effective_lr(plan.rule, scalars.lr, state["step"]) for state in states]
            scalars = scalars._replace(lr=rates)
        if not self.by_path:
            return scalars
        by_path = {name: s for name in ("scale", "low", "high") if isinstance(s := getattr(m, name), dict)}
        lists = {name: [s[path] for path in keys] for name, s in by_path.items()}
        if (dtype := scalars.eps.dtype) != mx.float32:
            lists = {name: [s.astype(dtype) for s in column] for name, column in lists.items()}
        return scalars._replace(**lists)

    @cached_property
    def streams(self) -> StreamScheduler:
        """The streams of the CPU for what is updated by operations."""
        return StreamScheduler()

    def _make(self, rule: Rule, group: int | None, w: mx.array) -> Plan:
        m, dtype = self.modifiers, COMPUTE_DTYPE[w.dtype]
        gated = not isinstance(m.apply, bool)
        modified = m.scale is not None, m.low is not None, gated, gated and m.guarded
        v_dtype = self.accumulator.storage_dtype(w)
        fixed = _fixed(rule, self.accumulator, dtype, v_dtype, modified)
        lr = self.learning_rate(group).astype(dtype)
        if rule.lr_decay and not rule.step_per_parameter:
            lr = effective_lr(rule, lr, self.before)
        scalars = Scalars(lr, fixed.eps, fixed.weight_decay)
        if fixed.form[-3:] != (False, False, False):
            shared = (s.astype(dtype) if isinstance(s, mx.array) else None for s in (m.scale, m.low, m.high))
            scale, low, high = shared
            scalars = scalars._replace(scale=scale, low=low, high=high, apply=m.apply if gated else None)
        return Plan(rule, fixed.form, scalars, v_dtype, fixed.functions, fixed.launches)


class _Fixed(NamedTuple):
    """What of a plan is the same in every step."""

    form: Form
    eps: mx.array
    weight_decay: mx.array
    functions: ops.Functions
    launches: Launches


@lru_cache(256)
def _fixed(
    rule: Rule, accumulator: Dense, dtype: mx.Dtype, v_dtype: mx.Dtype, modified: tuple[bool, bool, bool, bool]
) -> _Fixed:
    scaled, clipped, gated, guarded = modified
    form = rule.form(scaled=scaled, clipped=clipped, gated=gated, guarded=guarded)
    eps, weight_decay = mx.array(rule.eps, dtype), mx.array(rule.weight_decay, dtype)
    functions = ops.functions(form, accumulator, v_dtype)
    return _Fixed(form, eps, weight_decay, functions, kernels.launches(form, v_dtype))


def counts_own_steps(rule: Rule) -> bool:
    """Whether the learning rate depends on how many steps a parameter itself has made."""
    return rule.step_per_parameter and rule.lr_decay > 0
