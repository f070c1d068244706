"""Which code updates each tensor of a call: a kernel or operations, dense or row-sparse, alone or in a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from . import checks
from .groups import Groups
from .leaves import Leaf, Leaves
from .sparse import kernels as row_kernels
from .sparse import narrow as row_narrow
from .sparse import ops as row_ops
from .sparse.gradient import RowSparse
from .trees import dotted
from .update import kernels, narrow
from .update.accumulators import Dense
from .update.rounding import Keys
from .update.step import Plan, Step
from .update.storage import Storage


@dataclass(frozen=True)
class Options:
    """What decides which code runs, fixed for the life of an optimizer.

    Args:
        accumulator: How ``v`` is stored.
        groups: The rule of each parameter.
        fused: Whether kernels run: where they can (None), never, or else an error.
        differentiable: Let gradients flow through kernels too.
        lazy: A row-sparse gradient changes only the rows that it names.
        rounding: How new weights in half precision are rounded.
    """

    accumulator: Dense
    groups: Groups
    fused: bool | None
    differentiable: bool
    lazy: bool
    rounding: str = "nearest"

    @classmethod
    def checked(
        cls, accumulator: Any, groups: Groups, fused: Any, differentiable: Any, lazy: Any, rounding: Any = "nearest"
    ) -> Options:
        """The options as a user gives them.

        Raises:
            TypeError: For what is no accumulator or no bool.
            ValueError: For an unknown way of rounding.
        """
        if accumulator is not None and not isinstance(accumulator, Dense):
            kinds = "Dense(), RowWise() or Quantized()"
            raise TypeError(f"[Adagrad] 'accumulator' must be {kinds} but got {accumulator!r}.")
        if fused is not None:
            checks.boolean("Adagrad", "fused", fused)
        checks.boolean("Adagrad", "differentiable", differentiable)
        checks.boolean("Adagrad", "lazy", lazy)
        accumulator = accumulator or Dense()
        return cls(accumulator, groups, fused, differentiable, lazy, Storage(accumulator, rounding).rounding)

    @cached_property
    def storage(self) -> Storage:
        """How weights and state are kept."""
        return Storage(self.accumulator, self.rounding)

    def use_kernels(self) -> bool:
        """Whether kernels run on the default device, asked at each call; raises RuntimeError where they have to."""
        if self.fused:
            kernels.require()
        return kernels.available() if self.fused is None else self.fused

    @property
    def leaf_check(self) -> Callable[[Leaf], None] | None:
        """What refuses a leaf that no kernel takes, where kernels have to run."""
        return self._require_kernel if self.fused else None

    def _require_kernel(self, leaf: Leaf) -> None:
        g, w, _, keys = leaf
        if self.has_kernel(g, w):
            return
        sparse = " row-sparse" if isinstance(g, RowSparse) else ""
        raise RuntimeError(
            f"[Adagrad] 'fused=True' but no kernel takes '{dotted(keys)}': {w.dtype} parameters with "
            f"{g.dtype}{sparse} gradients in {self.accumulator}. Use fused=None to fall back by itself."
        )

    def has_kernel(self, gradient: Any, parameter: mx.array) -> bool:
        """Whether there is a kernel for these arrays."""
        if not self.storage.is_plain(parameter):
            return False
        accumulator = self.accumulator.at(parameter)
        if isinstance(gradient, RowSparse) and self.lazy:
            return not self.differentiable and row_kernels.supports(accumulator, parameter, gradient.values)
        return kernels.supports(accumulator, parameter, gradient)  # of a RowSparse it asks for the dtype only


@dataclass(frozen=True)
class Dispatch:
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

    def update_all(self, leaves: Leaves, states: Sequence[dict]) -> list[mx.array]:
        """Update every leaf and its state; returns the new parameters in the order of the leaves."""
        updated: list[Any] = [None] * len(leaves)
        storage = self.options.storage
        if storage.draws:
            self.keys.prepare(keys for _, w, _, keys in leaves if not storage.is_plain(w))
        for same in leaves.by_shape_and_dtype():
            plan = None if self.fused or len(same) == 1 else self._shared_plan(leaves[same[0]], states[same[0]])
            if plan is None:
                for i in same:
                    updated[i] = self.update(leaves[i], states[i])
                continue
            ws, gs = [leaves.parameters[i] for i in same], [leaves.gradients[i] for i in same]
            vs = [states[i]["v"] for i in same]
            new = plan.functions.update_many(ws, gs, vs, plan.scalars, self.step.streams)
            for i, w, v in zip(same, *new, strict=True):
                updated[i], states[i]["v"] = w, v
        return updated

    def _shared_plan(self, leaf: Leaf, state: dict) -> Plan | None:
        """The plan of all tensors like this leaf, if one call can update them together; else None."""
        w = leaf[1]
        if not self.options.storage.is_plain(w):
            return None
        plan = self.step.shared.get(w.dtype) or self._plan(leaf, state)
        return plan if w.dtype in self.step.shared and plan.functions.batches(w) else None

    def update(self, leaf: Leaf, state: dict) -> mx.array:
        """Update one parameter and its state; returns the new parameter."""
        g, w, _, keys = leaf
        step, options = self.step, self.options
        plan = step.shared.get(w.dtype) or self._plan(leaf, state)
        fused = self.fused and options.has_kernel(g, w)
        if isinstance(g, RowSparse) and not options.lazy:
            g = g.coalesce().to_dense()  # in fp32
        if not options.storage.is_plain(w):
            w = self._update_narrow(plan, w, g, state, self.keys.of(keys))
        else:
            w = self._update_plain(plan, w, g, state, fused)
        if options.groups.default.step_per_parameter:
            state["step"] = state["step"] + step.counted
        return w

    def _update_narrow(self, plan: Plan, w: mx.array, g: Any, state: dict, key: mx.array) -> mx.array:
        """Update a parameter whose weights or ``v`` are rounded with care."""
        storage = self.options.storage
        functions = narrow.functions(plan.form, narrow.Kind.of(storage, w, self.options.differentiable))
        kept = storage.kept(state)
        if isinstance(g, RowSparse):
            w, kept = row_narrow.update(functions, w, g, kept, plan.scalars, key)
        else:
            w, kept = functions.update(w, g, kept, plan.scalars, key, self.step.streams)
        state.update(kept)
        return w

    def _update_plain(self, plan: Plan, w: mx.array, g: Any, state: dict, fused: bool) -> mx.array:
        """Update a parameter whose weights and ``v`` are rounded to nearest."""
        step, options = self.step, self.options
        if isinstance(g, RowSparse):
            new = row_ops.update(plan, options.accumulator.at(w), w, g, state["v"], fused, options.differentiable)
        elif not fused:
            new = plan.functions.update(w, g, state["v"], plan.scalars, step.streams)
        elif options.differentiable:
            new = kernels.differentiable_launch(plan, w, g, state["v"])
        else:
            new = kernels.launch(plan.form, w, g, state["v"], plan.scalars, plan.v_dtype)
        w, state["v"] = new
        return w

    def _plan(self, leaf: Leaf, state: dict) -> Plan:
        _, w, _, keys = leaf
        step, groups = self.step, self.options.groups
        group, rule = groups.resolve(keys, w) if groups else (None, groups.default)
        steps_before = state["step"] if rule.step_per_parameter and rule.lr_decay else None
        plan = step.plan(rule, group, w, keys if step.by_path else (), steps_before)
        if not (groups or step.by_path or rule.step_per_parameter):
            step.shared[w.dtype] = plan
        return plan
