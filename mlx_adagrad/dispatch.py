"""Which code updates each tensor of a call: a kernel or operations, dense or row-sparse, alone or in a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import mlx.core as mx

from .leaves import Leaf, Leaves
from .options import Options
from .sparse.gradient import RowSparse
from .update import kernels
from .update.batches import Batch
from .update.rounding import Keys
from .update.rule import Rule
from .update.step import Plan, Step


class Dispatch(NamedTuple):
    """The updates of one call.

    Args:
        options: What the optimizer was made with.
        step: The numbers of this call.
        fused: Whether kernels run, where there are some.
        keys: The keys of the random bits of each parameter.
    """

    options: Options
    step: Step
    fused: bool
    keys: Keys

    def update_all(self, leaves: Leaves, states: Sequence[dict]) -> Sequence[mx.array]:
        """Update every leaf and its state; returns the new parameters in the order of the leaves."""
        everywhere = self._have_kernels(leaves)
        if everywhere and not self.options.groups:
            return self._update_many(self._plan((), leaves.parameters[0]), leaves, states, None)
        updated: list[Any] = [None] * len(leaves)
        storage = self.options.storage
        if storage.draws:
            self.keys.prepare(keys for _, w, _, keys in leaves if not storage.is_plain(w))
        tables = self._update_rows(leaves, states)
        split = self._by_rule if everywhere else self._by_plan if self.fused else self._by_plan_and_shape
        for plan, places in split(leaves):
            if plan is None:
                new: Sequence[mx.array] = [
                    tables[i] if i in tables else self.update(leaves[i], states[i]) for i in places
                ]
            else:
                new = self._update_many(plan, leaves, states, places)
            for i, w in zip(places, new, strict=True):
                updated[i] = w
        return updated

    def _update_rows(self, leaves: Leaves, states: Sequence[dict]) -> dict[int, mx.array]:
        """Update the tables whose gradients are row-sparse; the host waits at most once, for what all of them read."""
        options = self.options
        places = [] if leaves.complete or not options.lazy else [*self._plain_rows(leaves)]
        if not places:
            return {}
        from .sparse import ops as row_ops

        begun = []
        for i in places:
            g, w, _, keys = leaves[i]
            plan = self._plan_of(keys, w, states[i])
            fused, accumulator = self._runs_kernel(plan, g, w), options.accumulator.at(w)
            begun.append(row_ops.begin(plan, accumulator, w, g, states[i]["v"], fused, options.differentiable))
        updated = {}
        for i, (w, v) in zip(places, row_ops.finish_all(begun), strict=True):
            updated[i], states[i]["v"] = w, v
            self._count(states[i])
        return updated

    def _plain_rows(self, leaves: Leaves) -> Iterable[int]:
        for i, (g, w) in enumerate(zip(leaves.gradients, leaves.parameters, strict=True)):
            if isinstance(g, RowSparse) and self.options.storage.is_plain(w):
                yield i

    def _have_kernels(self, leaves: Leaves) -> bool:
        """Whether kernels update all leaves: of one dtype, with gradients of one dtype, as in nearly all models."""
        if not self.fused or self.options.differentiable or not leaves.complete:
            return False
        one = len(leaves.dtypes[0]) == len(leaves.dtypes[1]) == 1
        w = leaves.parameters[0]
        return one and self.options.storage.is_plain(w) and self.options.has_kernel(leaves.gradients[0], w)

    def _by_rule(self, leaves: Leaves) -> Iterable[tuple[Plan | None, list[int]]]:
        """Leaves of one dtype by their rule and the group that has their learning rate."""
        rules: dict[Any, tuple[int | None, Rule]] = {}
        found: dict[Any, list[int]] = {}
        for i, resolved in enumerate(self.options.groups.resolve_all(leaves)):
            group, rule = resolved
            key = group, id(rule)
            if key not in found:
                rules[key], found[key] = resolved, []
            found[key].append(i)
        for key, places in found.items():
            group, rule = rules[key]
            yield self.step.plan(rule, group, leaves.parameters[0]), places

    def _by_plan(self, leaves: Leaves) -> Iterable[tuple[Plan | None, list[int]]]:
        """The leaves that kernels update, by their plan; without a plan those that are updated one by one."""
        options = self.options
        found: dict[Any, tuple[Plan | None, list[int]]] = {}
        for i, (g, w, keys) in enumerate(zip(leaves.gradients, leaves.parameters, leaves.keys, strict=True)):
            single = options.differentiable or isinstance(g, RowSparse) or not options.storage.is_plain(w)
            plan = None if single or not options.has_kernel(g, w) else self._plan(keys, w)
            found.setdefault(id(plan), (plan, []))[1].append(i)
        return found.values()

    def _by_plan_and_shape(self, leaves: Leaves) -> Iterable[tuple[Plan | None, list[int]]]:
        """The leaves that one call of operations updates; without a plan those that are updated one by one."""
        gs, ws = leaves.gradients, leaves.parameters
        for same_shape in leaves.by_shape_and_dtype():
            if len(same_shape) == 1 or not self.options.storage.is_plain(ws[same_shape[0]]):
                yield None, same_shape
                continue
            found: dict[Any, tuple[Plan, list[int]]] = {}
            if not self.options.groups and len({gs[i].dtype for i in same_shape}) == 1:
                found[None] = self._plan((), ws[same_shape[0]]), same_shape
            for i in same_shape if not found else ():
                plan = self._plan(leaves.keys[i], ws[i])
                found.setdefault((id(plan), gs[i].dtype), (plan, []))[1].append(i)
            for plan, places in found.values():
                yield plan if len(places) > 1 and plan.functions.batches(ws[places[0]]) else None, places

    def _update_many(
        self, plan: Plan, leaves: Leaves, states: Sequence[dict], places: Sequence[int] | None
    ) -> Sequence[mx.array]:
        """Update the leaves at these places (None: all) in one call."""
        ws, gs, vs, kinds = leaves.parameters, leaves.gradients, leaves.accumulators, leaves.shapes
        if places is not None:
            at: Any = itemgetter(*places) if len(places) > 1 else lambda column: (column[places[0]],)
            ws, gs, states = at(ws), at(gs), at(states)
            vs = at(vs) if leaves.complete else tuple([state["v"] for state in states])
            one = len(leaves.dtypes[0]) == 1
            kinds = at(kinds) if one else [(w.shape, g.dtype) for w, g in zip(ws, gs, strict=True)]
        scalars = plan.scalars
        if self.step.differ(plan):
            keys = leaves.keys if places is None else [leaves.keys[i] for i in places]
            scalars = self.step.scalars(plan, keys, states)
        batch = Batch(ws, gs, vs, scalars, kinds)
        ws, vs = plan.launches(batch) if self.fused else plan.functions.update_many(batch, self.step.streams)
        for state, v in zip(states, vs, strict=True):
            state["v"] = v
        if self.options.groups.default.step_per_parameter:
            for state in states:
                self._count(state)
        return ws

    def _runs_kernel(self, plan: Plan, gradient: Any, w: mx.array) -> bool:
        """Whether a kernel updates these arrays; those of rows and of narrow state know no guarded step."""
        if plan.form.guarded and (isinstance(gradient, RowSparse) or not self.options.storage.is_plain(w)):
            return False
        return self.fused and self.options.has_kernel(gradient, w)

    def update(self, leaf: Leaf, state: dict) -> mx.array:
        """Update one parameter and its state; returns the new parameter."""
        g, w, _, keys = leaf
        options = self.options
        plan = self._plan_of(keys, w, state)
        fused = self._runs_kernel(plan, g, w)
        if isinstance(g, RowSparse) and not options.lazy:
            g = g.coalesce().to_dense()  # in fp32
        if not options.storage.is_plain(w):
            w = self._update_narrow(plan, w, g, state, self.keys.of(keys), fused)
        else:
            w = self._update_plain(plan, w, g, state, fused)
        self._count(state)
        return w

    def _update_narrow(self, plan: Plan, w: mx.array, g: Any, state: dict, key: mx.array, fused: bool) -> mx.array:
        """Update a parameter whose weights or ``v`` are rounded with care."""
        from .update import narrow, narrow_kernels  # here and below for import time: few programs need them

        storage = self.options.storage
        functions = narrow.functions(plan.form, narrow.Kind.of(storage, w, self.options.differentiable))
        kept = storage.kept(state)
        if isinstance(g, RowSparse):
            from .sparse import narrow as row_narrow

            w, kept = row_narrow.update(functions, w, g, kept, plan.scalars, key, fused)
        elif fused:
            w, kept = narrow_kernels.Launch(functions, w, g, kept, plan.scalars, key).run()
        else:
            w, kept = functions.update(w, g, kept, plan.scalars, key, self.step.streams)
        state.update(kept)
        return w

    def _update_plain(self, plan: Plan, w: mx.array, g: Any, state: dict, fused: bool) -> mx.array:
        """Update a parameter whose weights and ``v`` are rounded to nearest."""
        step, options = self.step, self.options
        if isinstance(g, RowSparse):
            from .sparse import ops as row_ops

            new = row_ops.update(plan, options.accumulator.at(w), w, g, state["v"], fused, options.differentiable)
        elif not fused:
            new = plan.functions.update(w, g, state["v"], plan.scalars, step.streams)
        elif options.differentiable:
            new = kernels.differentiable_launch(plan.form, w, g, state["v"], plan.scalars, plan.functions)
        else:
            (w,), (v,) = plan.launches(Batch([w], [g], [state["v"]], plan.scalars, [()]))
            new = w, v
        w, state["v"] = new
        return w

    def _count(self, state: dict) -> None:
        if self.options.groups.default.step_per_parameter:
            state["step"] = state["step"] + self.step.counted

    def _plan_of(self, keys: tuple[Any, ...], w: mx.array, state: dict) -> Plan:
        """The plan for one tensor, with its own numbers."""
        plan = self._plan(keys, w)
        if not self.step.differ(plan):
            return plan
        return plan._replace(scalars=self.step.scalars(plan, [keys], [state]).at(0))

    def _plan(self, keys: tuple[Any, ...], w: mx.array) -> Plan:
        groups = self.options.groups
        group, rule = groups.resolve(keys, w) if groups else (None, groups.default)
        return self.step.plan(rule, group, w)
