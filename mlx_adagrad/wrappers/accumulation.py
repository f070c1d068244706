"""Gradients summed over several calls, for one update by their mean."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from .. import checks
from ..leaves import is_row_sparse
from ..sparse.gradient import RowSparse, canonical
from ..trees import Keys, dotted, find, mapped, name, present, trainable
from ..update.accumulators import wide_dtype
from ..update.compiled import compiled
from ..update.modifiers import Modifiers, at
from ..update.tracing import read
from . import row_sums
from .base import Wrapper
from .row_sums import RowSum


class GradientAccumulation(Wrapper):
    r"""Updates at every K-th call, by the mean of the gradients of the last K calls.

    Keras's rule, with the sums in fp32 (Keras: in the parameter's dtype). The step count is that of updates. A gradient
    that is absent adds nothing; one that is absent at the K-th call discards its parameter's sum without an update.

    Args:
        optimizer: The optimizer inside.
        steps: :math:`K \ge 1`.
        schedule_counts: What learning-rate schedules inside are called with, at 0 first: ``"calls"``, the number of
            calls so far, as in Keras; ``"updates"``, the number of updates so far, as in optax's ``MultiSteps`` and in
            a torch loop that steps its scheduler with the optimizer. Default: ``"calls"``.

    Raises:
        ValueError: If ``steps`` is below 1, or ``schedule_counts`` neither word.
        TypeError: If ``steps`` is no integer.

    Row-sparse gradients are added up as rows, so that memory grows with the rows named and not with the table.

    :meth:`flush` updates by an incomplete window, by the mean of the gradients that it has.

    A call that only accumulates costs one pass over the gradients. In a compiled step, and inside a wrapper that skips
    steps, each call computes an update and selects: whether it is due cannot be asked there.
    """

    # kept on the class and not on each object: version 0.1 has files and pickles without it
    schedule_counts = "calls"

    def __init__(self, optimizer: Optimizer, steps: int, schedule_counts: str = "calls"):
        self.steps = checks.positive_integer(self._name, "steps", steps)
        if checks.one_of(self._name, "schedule_counts", schedule_counts, ("calls", "updates")) != self.schedule_counts:
            self.schedule_counts = schedule_counts
        super().__init__(optimizer)

    def _fresh(self) -> dict[str, Any]:
        return {"calls": mx.array(0, mx.uint64), "gradients": {}}

    @property
    def calls_per_update(self) -> int:
        return self.steps * super().calls_per_update

    def init(self, parameters: dict) -> None:
        super().init(parameters)
        for key, (_, w) in trainable(parameters).items():
            self._own["gradients"].setdefault(key, mx.zeros(w.shape, wide_dtype(w)))

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        if modifiers.apply is False:
            return super().apply_modified(gradients, parameters, modifiers)
        if modifiers.flush:
            return self._flushed(gradients, parameters, modifiers)
        calls = self._own["calls"]
        known = read(calls) if modifiers.apply is True else None
        due = (calls + 1) % self.steps == 0 if known is None else (known + 1) % self.steps == 0
        counted = calls if modifiers.calls is None else modifiers.calls
        begins = known is not None and known % self.steps == 0
        leaves = [(keys, g, self._parameter(keys, g, parameters)) for keys, g in present(gradients)]
        before = {name(keys): self._before(keys, g, w, known is None, begins) for keys, g, w in leaves}
        totals = {name(keys): self._total(before[name(keys)], keys, g, w, modifiers) for keys, g, w in leaves}
        mean = Modifiers(
            scale=mx.array(1.0 / self.steps),
            apply=modifiers.apply,
            guarded=modifiers.guarded,
            calls=counted if self.schedule_counts == "calls" else None,  # None: the count of updates
        )
        weights = {name(keys): w for keys, _, w in leaves}
        sums = mapped(lambda keys, _: row_sums.as_gradient(totals[name(keys)], weights[name(keys)]), gradients)
        new = super().apply_modified(sums, parameters, mean.gated(due))
        self._restart(before, totals, due, modifiers)
        # where it is known, a constant: reading it at the next call waits for nothing
        self._keep(modifiers, calls=calls + 1 if known is None else mx.array(known + 1, mx.uint64))
        return new

    @property
    def waiting(self) -> mx.array:
        """The number of calls whose gradients wait for the window to be complete, 0-d uint64."""
        return self._own["calls"] % self.steps

    def _flushed(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        """Update by the mean of what the window has so far, and count the calls that it still lacks as made."""
        calls, waiting = self._own["calls"], self.waiting
        end = calls - waiting + self.steps
        known = read(waiting) if modifiers.apply is True else None
        some = waiting > 0 if known is None else known > 0
        tree = mapped(lambda keys, _: self._sum(keys, find(parameters, keys)), gradients)
        mean = Modifiers(
            scale=1.0 / mx.maximum(waiting, 1).astype(mx.float32),
            apply=modifiers.apply,
            guarded=modifiers.guarded,
            calls=end - 1 if self.schedule_counts == "calls" else None,
        )
        new = super().apply_modified(tree, parameters, mean.gated(some))
        self._restart({}, {}, some, modifiers)
        self._keep(modifiers, calls=mx.where(some, end, calls))
        return new

    def _sum(self, keys: Keys, w: mx.array) -> mx.array | RowSparse | None:
        total = self._own["gradients"].get(name(keys))
        return None if total is None else row_sums.as_gradient(total, w)

    def _parameter(self, keys: Keys, g: Any, parameters: Any) -> mx.array:
        is_row_sparse(self._name, keys, g)  # refuses what is no gradient
        w = find(parameters, keys)
        if not isinstance(w, mx.array) or w.shape != g.shape:
            shape, path = getattr(w, "shape", None), dotted(keys)
            raise ValueError(f"[{self._name}] the gradient of '{path}' has shape {g.shape} but the parameter {shape}.")
        problem = row_sums.mismatch(self._own["gradients"].get(name(keys)), w)
        if problem:
            raise ValueError(f"[{self._name}] the sum of the gradients of '{dotted(keys)}' has {problem}.")
        return w

    def _before(self, keys: Keys, g: Any, w: mx.array, traced: bool, begins: bool) -> mx.array | RowSum:
        """The sum of the calls before this one, in the form that it has after this one."""
        total = self._own["gradients"].get(name(keys))
        if isinstance(g, RowSparse):
            total = [] if total is None or begins else total
            return row_sums.with_room(total, g, w, self.steps) if traced else total
        if total is None or (begins and row_sums.is_row_sum(total)):
            return mx.zeros(w.shape, wide_dtype(w))
        return row_sums.gradient(total, w).to_dense() if row_sums.is_row_sum(total) else total

    def _total(self, before: Any, keys: Keys, g: Any, w: mx.array, modifiers: Modifiers) -> mx.array | RowSum:
        scale, low, high = at(modifiers.scale, keys), at(modifiers.low, keys), at(modifiers.high, keys)
        if not isinstance(g, RowSparse):
            return _add(before, g, scale, low, high)
        if low is not None:
            g = g.coalesce()  # what is clipped are the sums of duplicates
        values = Modifiers(scale, low, high).modified(keys, g.values).astype(wide_dtype(w))
        rows = RowSparse(canonical(g.indices, g.num_rows), values, g.num_rows)
        if isinstance(before, mx.array):
            return before + rows.to_dense()
        return row_sums.added(before, rows, w) if isinstance(before, dict) else row_sums.extended(before, rows, w)

    def _restart(self, before: dict, totals: dict, due: mx.array | bool, modifiers: Modifiers) -> None:
        """Keep the sums, or zeros after an update; also for a parameter without a gradient in this call."""
        sums = self._own["gradients"]
        for key, total in {**sums, **totals}.items():
            kept = row_sums.emptied(total, due)
            if isinstance(modifiers.apply, mx.array):
                kept = row_sums.selected(modifiers.apply, kept, before.get(key, total))
            sums[key] = kept
        self._in_order("gradients")


@compiled
def _add(total: mx.array, g: mx.array, scale: Any, low: Any, high: Any) -> mx.array:
    g = Modifiers(scale, low, high).modified((), g)
    # a complex gradient of a real parameter is for the optimizer inside to refuse
    return total + (g if g.dtype == mx.complex64 else g.astype(total.dtype))
