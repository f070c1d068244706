"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import Optimizer

from .. import checks
from ..leaves import rebuild
from ..trees import Keys, find, mapped, name, present, pruned, trainable
from ..update.accumulators import wide_dtype
from ..update.compiled import compiled
from ..update.modifiers import Modifiers
from ..update.tracing import read
from .base import Wrapper
from .swap import has_averages, holds_averages, swapped, was_updated


class ExponentialMovingAverage(Wrapper):
    r"""Averages the weights after every call: :math:`a \leftarrow m\, a + (1 - m)\, w`, from the first weights on.

    Keras's rule, with averages in fp32 for half-precision weights (Keras: in the weight's dtype). All trainable weights
    are averaged at every call: those without a gradient too, and at calls that only accumulate gradients.

    Args:
        optimizer: The optimizer inside.
        momentum: :math:`0 \le m \le 1`. Default: ``0.99``.
        overwrite_frequency: After every so many updates the weights become their averages (around a
            :class:`GradientAccumulation` at each call of such an update, as in Keras); None: never. Default: ``None``.

    Raises:
        ValueError: If ``momentum`` is not in [0, 1], or ``overwrite_frequency`` is below 1.
        TypeError: If ``momentum`` is no number, or ``overwrite_frequency`` no integer.
    """

    whole_run = True

    def __init__(self, optimizer: Optimizer, momentum: float = 0.99, overwrite_frequency: int | None = None):
        self.momentum = checks.real(self._name, "momentum", momentum)
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"[{self._name}] 'momentum' must be in the range [0, 1] but got {self.momentum}.")
        if overwrite_frequency is not None:
            overwrite_frequency = checks.positive_integer(self._name, "overwrite_frequency", overwrite_frequency)
        self.overwrite_frequency = overwrite_frequency
        super().__init__(optimizer)

    def _fresh(self) -> dict[str, Any]:
        return {"calls": mx.array(0, mx.uint64), "averages": {}}

    def init(self, parameters: dict) -> None:
        super().init(parameters)
        for key, (_, w) in trainable(parameters).items():
            self._own["averages"].setdefault(key, w.astype(wide_dtype(w)))

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        if has_averages(parameters):  # not in a trace, where raising would leave tracers in the state
            what = "an update inside 'averaged' would be of the averages, and lost"
            raise ValueError(f"[{self._name}] {what}: leave the 'with' block before you train.")
        new = super().apply_modified(gradients, parameters, modifiers)
        if modifiers.apply is False:
            return new
        calls = self._own["calls"]
        updates = calls // self.calls_per_update  # while it is 0, the averages are the weights
        weights = self._average(updates == 0, gradients, parameters, new, modifiers)
        # a flush stands for all calls that its window lacked
        self._keep(modifiers, calls=(updates + 1) * self.calls_per_update if modifiers.flush else calls + 1)
        if self.overwrite_frequency is None:
            return new
        overwrites = (updates + 1) % self.overwrite_frequency == 0
        if isinstance(modifiers.apply, mx.array):
            overwrites = mx.logical_and(modifiers.apply, overwrites)
        return self._overwritten(overwrites, weights, parameters)

    def _average(
        self, first: mx.array, gradients: dict, parameters: dict, new: dict, modifiers: Modifiers
    ) -> dict[str, mx.array]:
        """Advance the averages of all trainable weights; returns those weights, by name."""
        averages, weights = self._own["averages"], {}
        apply = None if isinstance(modifiers.apply, bool) else modifiers.apply
        leaves = trainable(parameters)
        leaves |= {name(keys): (keys, find(parameters, keys)) for keys, _ in present(gradients)}
        for key, (keys, before) in leaves.items():
            updated = find(new, keys)
            w = weights[key] = updated if isinstance(updated, mx.array) else before
            average = averages[key] if key in averages else before.astype(wide_dtype(before))
            averages[key] = _advanced(average, w, first, self.momentum, apply)
        self._in_order("averages")
        return weights

    def _overwritten(self, overwrites: mx.array, weights: dict[str, mx.array], parameters: Any) -> Any:
        averages = self._own["averages"]

        def chosen(keys: Keys, w: Any) -> Any:
            key = name(keys)
            if key in weights:
                return _chosen(overwrites, averages[key], weights[key])
            return w if isinstance(keys[-1], int) and isinstance(w, mx.array) else None  # lists keep all arrays

        return pruned(mapped(chosen, parameters))

    def finalize_variable_values(self, model_or_tree: Any) -> Any:
        """Put the averages in place of the weights, as Keras does at the end of ``fit``.

        Args:
            model_or_tree: A module, which is updated in place, or a tree of parameters. Frozen parameters stay.

        Returns:
            The parameters, averaged.
        """
        if not isinstance(model_or_tree, Module):
            return self._averages_of(model_or_tree)
        if holds_averages(model_or_tree):
            what = "the model holds the averages already, until the end of 'averaged'"
            raise ValueError(f"[{self._name}] {what}: put them in place for good outside.")
        return model_or_tree.update(self._averages_of(model_or_tree.trainable_parameters())).parameters()

    def _averages_of(self, tree: Any) -> Any:
        averages = self._own["averages"]

        def final(keys: Keys, w: Any) -> Any:
            return averages[name(keys)].astype(w.dtype) if name(keys) in averages else w

        return rebuild(tree, tree, (final(keys, w) for keys, w in present(tree)))

    def averaged(self, model: Module) -> AbstractContextManager[Module]:
        """A context in which ``model`` holds the averages, for evaluation; its own weights come back afterwards.

        Meanwhile ``checkpoint.save`` still writes its own weights, ``model.save_weights`` the averages; an update,
        ``finalize_variable_values`` and ``checkpoint.load`` are refused.

        Raises:
            TypeError: If ``model`` is no module.
            RuntimeError: At the end, if a compiled step updated the model meanwhile; its own weights are back then.
        """
        if not isinstance(model, Module):
            hint = "finalize_variable_values takes trees"
            raise TypeError(f"[{self._name}] 'model' must be a module but got {type(model).__name__}; {hint}.")
        return self._swapped(model)

    @contextmanager
    def _swapped(self, model: Module) -> Iterator[Module]:
        counts = self._own["calls"], self.step
        with swapped(model, self._averages_of) as swap:
            yield model
            counted = [read(count) for count in counts] != [read(self._own["calls"]), read(self.step)]
            if counted and was_updated(swap):
                what = "a step inside 'averaged' advanced the optimizer, but its new weights are lost"
                raise RuntimeError(f"[{self._name}] {what}: leave the 'with' block before you train.")


# compiled: one pass; with one output, which takes the place of the old average in memory
@compiled
def _advanced(average: mx.array, w: mx.array, first: mx.array, momentum: float, apply: mx.array | None) -> mx.array:
    dtype = average.dtype
    keep = mx.where(first, mx.array(0.0, dtype), mx.array(momentum, dtype))
    take = mx.where(first, mx.array(1.0, dtype), mx.array(1.0 - momentum, dtype))
    new = keep * average + take * w.astype(dtype)
    return new if apply is None else mx.where(apply, new, average)


@compiled
def _chosen(overwrites: mx.array, average: mx.array, w: mx.array) -> mx.array:
    return mx.where(overwrites, average.astype(w.dtype), w)
