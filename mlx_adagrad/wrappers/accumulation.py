"""Gradients summed over several calls, for one update by their mean."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from .. import checks
from ..leaves import is_row_sparse
from ..trees import Keys, dotted, find, mapped, name, present, trainable
from ..update.accumulators import wide_dtype
from ..update.compiled import compiled
from ..update.modifiers import Modifiers, at
from .base import Wrapper, read


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
        calls = self._own["calls"]
        known = read(calls) if modifiers.apply is True else None
        due = (calls + 1) % self.steps == 0 if known is None else (known + 1) % self.steps == 0
        totals = {name(keys): self._total(keys, g, parameters, modifiers) for keys, g in present(gradients)}
        counted = calls if modifiers.calls is None else modifiers.calls
        mean = Modifiers(
            scale=mx.array(1.0 / self.steps),
            apply=modifiers.apply,
            calls=counted if self.schedule_counts == "calls" else None,  # None: the count of updates
        )
        sums = mapped(lambda keys, _: totals[name(keys)], gradients)
        new = super().apply_modified(sums, parameters, mean.gated(due))
        self._restart(totals, due, modifiers)
        # where it is known, a constant: reading it at the next call waits for nothing
        self._keep(modifiers, calls=calls + 1 if known is None else mx.array(known + 1, mx.uint64))
        return new

    def _total(self, keys: Keys, g: Any, parameters: Any, modifiers: Modifiers) -> mx.array:
        path, w = dotted(keys), find(parameters, keys)
        if is_row_sparse(self._name, keys, g):
            what = "RowSparse, which cannot be accumulated; its to_dense() can"
            raise TypeError(f"[{self._name}] the gradient of '{path}' is a {what}.")
        if not isinstance(w, mx.array) or w.shape != g.shape:
            shape = getattr(w, "shape", None)
            raise ValueError(f"[{self._name}] the gradient of '{path}' has shape {g.shape} but the parameter {shape}.")
        total = self._own["gradients"].get(name(keys))
        if total is None:
            total = mx.zeros(w.shape, wide_dtype(w))
        return _add(total, g, at(modifiers.scale, keys), at(modifiers.low, keys), at(modifiers.high, keys))

    def _restart(self, totals: dict[str, mx.array], due: mx.array | bool, modifiers: Modifiers) -> None:
        """Keep the sums, or zeros after an update; also for a parameter without a gradient in this call."""
        sums = self._own["gradients"]
        for key, total in {**sums, **totals}.items():
            zeros = mx.zeros_like(total)
            kept = mx.where(due, zeros, total) if isinstance(due, mx.array) else zeros if due else total
            held = isinstance(modifiers.apply, mx.array)
            sums[key] = mx.where(modifiers.apply, kept, sums.get(key, zeros)) if held else kept


@compiled
def _add(total: mx.array, g: mx.array, scale: Any, low: Any, high: Any) -> mx.array:
    g = Modifiers(scale, low, high).modified((), g)
    # a complex gradient of a real parameter is for the optimizer inside to refuse
    return total + (g if g.dtype == mx.complex64 else g.astype(total.dtype))
