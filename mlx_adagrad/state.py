"""The state of an optimizer: what it holds, how a parameter's part of it is made, and what each step writes to it.

::

    {
        "step": uint64, "learning_rate": float32,                 # as in mlx.optimizers; the rate of the last step
        "_mlx_adagrad": {
            "groups": [{"learning_rate": float32}, {}],           # the rates of groups that have one
            "changes": bool (n,),                                 # only after a change that MLX has to trace again
            "rounding_seed": uint64,                              # only where something is rounded with random bits
        },
        "layers": [{"weight": {
            "v": array,
            "exponents": array,                                   # only for a v of Quantized
            "compensation": array,                                # only with rounding="compensated"
            "step": uint64,                                       # only where the rule counts per parameter
        }}],
    }

The dict itself stays the same object for the life of the optimizer, and everything that changes from step to step is an
array in it, so that a compiled step can capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from . import checks
from .groups import Group, Groups
from .leaves import OWN, RESERVED, Leaf, Leaves
from .rates import Schedule, starting
from .trees import fill, slot
from .update.modifiers import Modifiers
from .update.rounding import LARGEST_SEED, Keys
from .update.step import Step
from .update.storage import Storage

SEED = "rounding_seed"

# Where a learning rate stands: a dict of the state, the key in it, and the rate to write there.
Entry = tuple[dict[str, Any], str, mx.array]


class State(NamedTuple):
    """Reads and writes the state of an optimizer; made for each call, it stores nothing itself.

    Args:
        tree: The state.
        schedules: Schedules of the optimizer's hyperparameters, by their key in the state.
        groups: The parameter groups, which may have schedules too.
        init_single: Fills the empty state of one parameter.
        storage: How weights and state are kept.
    """

    tree: dict[str, Any]
    schedules: dict[str, Callable[[mx.array], Any]]
    groups: Groups
    init_single: Callable[[mx.array, dict[str, Any]], None]
    storage: Storage

    @property
    def step(self) -> mx.array:
        """The number of updates made, 0-d uint64."""
        return self.tree["step"]

    def rate(self, group: int | None) -> mx.array:
        """The learning rate of a group, or of the parameters in no group (None)."""
        return (self.tree if group is None else self.groups.states(self.tree)[group])["learning_rate"]

    def set_rate(self, rate: mx.array | Schedule) -> None:
        """Make ``rate`` the learning rate of the parameters in no group, in place of any schedule."""
        number = starting(rate, self.step)
        old = self.schedules.pop("learning_rate", None)
        if callable(rate):
            self.schedules["learning_rate"] = rate
        self.tree["learning_rate"] = number
        if old != self.schedules.get("learning_rate"):
            self.mark_changed()

    def add_group(self, entry: dict[str, Any]) -> None:
        """Append a group, or raise and change nothing."""
        group = self.groups.parsed(entry)
        rate = self._rate_entry(group)
        self.groups.append(group)
        self.groups.states(self.tree)[-1].update(rate)
        self.mark_changed()

    def set_group(self, index: int, options: dict[str, Any]) -> None:
        """Give a group other options, or raise and change nothing."""
        index, group = self.groups.with_options(index, options)
        rate = self._rate_entry(group)
        entry = self.groups.states(self.tree)[index]
        entry.pop("learning_rate", None)
        entry.update(rate)
        if self.groups.put(index, group):
            self.mark_changed()

    def _rate_entry(self, group: Group) -> dict[str, mx.array]:
        """What a group has in the state: its learning rate, if it has one, as a schedule has it at this step."""
        return {} if group.lr is None else {"learning_rate": starting(group.lr, self.step)}

    def mark_changed(self) -> None:
        """Have steps that were compiled with this state traced again, since a trace holds rules and schedules fixed.

        MLX traces again where an array that a step has captured is new or has another shape: here one, whose length
        counts the changes, so that no earlier trace ever fits again. It is no part of checkpoints.
        """
        if self.tree.keys() - set(RESERVED):  # without the state of a parameter nothing can have been traced yet
            self.groups.changes += 1
            self.restore_mark()

    def restore_mark(self) -> None:
        """Put the array of :meth:`mark_changed` back after other state has been filled in."""
        count = self.groups.changes
        own = self.tree.setdefault(OWN, {}) if count else self.tree.get(OWN)
        if not isinstance(own, dict):
            return  # none, or state of a wrong kind, which the next step refuses
        own.pop("changes", None)
        if count:
            own["changes"] = mx.array([True] * count)

    def scheduled_rates(self, modifiers: Modifiers) -> list[Entry]:
        """Where each schedule writes, and what; a schedule may raise, so nothing is written yet."""
        calls = self.step if modifiers.calls is None else modifiers.calls
        rates: list[Entry] = [(self.tree, name, schedule(calls)) for name, schedule in self.schedules.items()]
        for group, entry in zip(self.groups.groups, self.groups.states(self.tree), strict=True):
            if callable(group.lr):
                rates.append((entry, "learning_rate", group.lr(calls)))
        return rates

    def replace(self, tree: dict[str, Any]) -> None:
        """Make the state equal to ``tree``, in place; where that has no seed, the old one stays."""
        seed = self.tree.get(OWN, {}).get(SEED)
        fill(self.tree, tree, places=True)
        if seed is not None:
            self.tree.setdefault(OWN, {}).setdefault(SEED, seed)

    def set_seed(self, seed: Any) -> None:
        """Make ``seed`` the seed of the random bits; None: one drawn from ``mx.random``.

        Raises:
            TypeError: If it is no integer.
            ValueError: If it is negative, or has more than 64 bits.
        """
        if seed is not None:
            seed = checks.integer_between("Adagrad", "rounding_seed", seed, 0, LARGEST_SEED)
        if self.storage.draws:
            given = None if seed is None else mx.array(divmod(seed, 2**32), mx.int64)  # MLX takes none above 2^63
            words = (mx.random.randint(0, 2**32, (2,), mx.int64) if given is None else given).astype(mx.uint64)
            self.tree.setdefault(OWN, {})[SEED] = (words[0] << 32) | words[1]

    def keys(self, step: mx.array) -> Keys:
        """What makes random bits, after so many steps."""
        seed = self.tree.get(OWN, {}).get(SEED)
        return Keys(mx.array(0, mx.uint64) if seed is None else seed, step)

    def advance(self, rates: list[Entry], modifiers: Modifiers) -> Step:
        """Write the rates and count the step, both only where the step happens."""
        for entry, name, rate in rates:
            entry[name] = rate if isinstance(modifiers.apply, bool) else mx.where(modifiers.apply, rate, entry[name])
        step = Step(self.storage.accumulator.plain, self.rate, self.step, modifiers)
        self.tree["step"] = self.step + step.counted
        return step

    def of_leaves(self, leaves: Leaves, gradients: Any) -> Sequence[dict[str, Any]]:
        """The state of each leaf, made where it is missing."""
        if self.groups.default.step_per_parameter or not leaves.complete or self.storage.rounding == "compensated":
            return [self.of_leaf(leaf, gradients) for leaf in leaves]
        return leaves.states

    def of_leaf(self, leaf: Leaf, gradients: Any) -> dict[str, Any]:
        """The state of one parameter, made where it is missing."""
        _, w, state, keys = leaf
        state = state or slot(self.tree, gradients, keys)
        if "v" not in state:
            self.init_single(w, state)
        else:
            self.storage.adopt(w, state)
        if self.groups.default.step_per_parameter and "step" not in state:
            state["step"] = self.step  # state from elsewhere counted the steps of all
        return state
