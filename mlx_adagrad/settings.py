"""The options and the state of an optimizer as attributes: what a user may read and set between steps."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from . import rates
from .configurable import Configurable
from .groups import Groups
from .options import Options
from .rates import LearningRate
from .state import State
from .state_checks import restored
from .update.accumulators import Dense
from .update.rule import Rule


class Settings(Configurable, Optimizer):
    """Base of :class:`mlx_adagrad.Adagrad`, which documents the options."""

    rule: Rule
    accumulator: Dense
    groups: Groups
    fused: bool | None
    differentiable: bool
    lazy: bool
    rounding = "nearest"  # of optimizers pickled before there was a choice

    def _setup(self, learning_rate: LearningRate, options: Options, seed: int | None = None) -> None:
        rate = rates.parse("Adagrad", "learning_rate", learning_rate)
        super().__init__()
        self.rule = options.groups.default
        self.accumulator, self.groups = options.accumulator, options.groups
        self.fused, self.differentiable, self.lazy = options.fused, options.differentiable, options.lazy
        self.rounding = options.rounding
        self._bookkeeping.set_rate(rate)
        self._bookkeeping.set_seed(seed)
        self.groups.states(self.state)

    @property
    def _options(self) -> Options:
        return Options(self.accumulator, self.groups, self.fused, self.differentiable, self.lazy, self.rounding)

    @property
    def _bookkeeping(self) -> State:
        return State(self.state, self._schedulers, self.groups, self.init_single, self._options.storage)

    @property
    def state(self) -> dict[str, Any]:
        """The state: ``step``, ``learning_rate`` and a ``v`` for each parameter; always the same dict.

        Assigning a tree fills this dict in place, so that a compiled step that has captured it goes on from there.
        """
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            raise TypeError(f"[Adagrad] 'state' must be a dict but got {type(state).__name__}.")
        self._initialized = False
        if state is not self._state:
            self._bookkeeping.replace(restored(state, self._state))
        self._bookkeeping.restore_mark()

    @property
    def eps(self) -> float:
        """The term in the denominator, as :class:`mlx.optimizers.Adagrad` names it."""
        return self.rule.eps

    @property
    def learning_rate(self) -> mx.array:
        """The learning rate of the last step, 0-d fp32; settable to whatever the constructor takes, which then holds
        in place of a schedule too.
        """
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        self._bookkeeping.set_rate(rates.parse(self.rule.owner, "learning_rate", learning_rate))

    def add_group(self, group: dict[str, Any]) -> None:
        """Append a parameter group, also for parameters not seen before; an entry of the constructor's ``groups``."""
        self._bookkeeping.add_group(group)

    def set_group(self, index: int, **options: Any) -> None:
        """Change options of group ``index``, any that a group may have (``lr``, ``weight_decay``, ...): all or none.

        A compiled step takes them up too: a new number for ``lr`` as it is, anything else by being traced once more.
        """
        self._bookkeeping.set_group(index, options)
