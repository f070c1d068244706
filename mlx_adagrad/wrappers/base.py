"""What all wrappers are: optimizers around an optimizer, with one state dict that holds the inner one's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import MultiOptimizer, Optimizer

from .. import checks
from ..checks import shown
from ..configurable import Configurable
from ..leaves import OWN
from ..matching import Known
from ..rates import LearningRate
from ..state_checks import Comparison, compare_entries, flat_entries, restored, settle, with_names
from ..trees import existing, fill
from ..update.modifiers import UNMODIFIED, Modifiers
from ..update.tracing import evaluate
from . import flushing, foreign
from .states import check_own, check_roots, parts, refuse_inside


class Wrapper(Configurable, Optimizer):
    """An optimizer that passes everything on to the one inside it. Subclasses override :meth:`apply_modified`.

    Args:
        optimizer: The optimizer inside: any ``mlx.optimizers.Optimizer``, also another wrapper.

    Raises:
        TypeError: If ``optimizer`` is no optimizer.
        ValueError: If a :class:`~mlx.optimizers.MultiOptimizer` inside holds a wrapper of the whole run.
    """

    # whether it is about the whole run, or called from outside too: it is refused where that cannot reach it
    whole_run = False
    # whether it asks for the norms of gradients
    needs_norms = False

    _order: dict[str, dict[str, None]] = {}  # the order that own entries had, until all of them are there again

    def __init__(self, optimizer: Optimizer):
        if not isinstance(optimizer, Optimizer):
            wanted = "an mlx.optimizers.Optimizer"
            raise TypeError(f"[{self._name}] 'optimizer' must be {wanted} but got {shown(optimizer)}.")
        refuse_inside(self._name, optimizer)
        super().__init__()
        self.optimizer = optimizer
        self._state = {"inner": optimizer.state, OWN: self._fresh()}
        # MLX's own leave a scheduled rate lazy, and a step that is held back on another thread would read it
        evaluate([number for _, number in existing(optimizer.state) if number.ndim == 0], wait=False)

    def _fresh(self) -> dict[str, Any]:
        """The wrapper's own entries of the state before the first step."""
        return {}

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _own(self) -> dict[str, Any]:
        return self._state[OWN]

    @property
    def state(self) -> dict[str, Any]:
        """``{"inner": the inner optimizer's state, "_mlx_adagrad": the wrapper's own}``: always the same dict.

        Assigning a tree of that form fills this dict and the inner one in place; entries that it lacks start afresh.
        """
        inner = self.optimizer.state
        if self._state["inner"] is not inner:
            self._state["inner"] = inner
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._check_state(state)
        _assign(self.optimizer, state["inner"])
        self._order = {key: dict.fromkeys(entries) for key, entries in self._own.items() if isinstance(entries, dict)}
        fill(self._own, {**self._fresh(), **self._own_of(state)})
        self._state["inner"] = self.optimizer.state
        self._initialized = False

    def _own_of(self, state: dict[str, Any]) -> Any:
        """The wrapper's own entries in a state, with the names of the parameters as they are here."""
        own = state.get(OWN) or {}
        by_parameter = {key for key, entries in self._fresh().items() if isinstance(entries, dict)}
        if not isinstance(own, dict):
            return own
        flat = {key: dict(flat_entries(own[key])) for key in by_parameter if isinstance(own.get(key), dict)}
        return {**own, **{key: with_names(entries, self._own[key]) for key, entries in flat.items()}}

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, dict) or not isinstance(state.get("inner"), dict):
            raise ValueError(f"[{self._name}] 'state' must be a dict with 'inner', the inner optimizer's state.")
        _check(self.optimizer, state["inner"])
        check_own(self._name, self._own_of(state), self._fresh(), self._own)

    def _compared(self, known: Known) -> Comparison:
        return compare_entries(self._own, self._fresh(), known)

    @property
    def step(self) -> mx.array:
        """The inner optimizer's step count: updates made, not calls."""
        return _first(self.optimizer).step

    @property
    def learning_rate(self) -> mx.array:
        """The inner optimizer's learning rate; settable to what that takes."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        inner: Any = self.optimizer
        inner.learning_rate = learning_rate

    def add_group(self, group: dict[str, Any]) -> None:
        """Append a parameter group to the inner optimizer; see :meth:`mlx_adagrad.Adagrad.add_group`."""
        self._grouped().add_group(group)

    def set_group(self, index: int, **options: Any) -> None:
        """Change options of a parameter group of the inner optimizer; see :meth:`mlx_adagrad.Adagrad.set_group`."""
        self._grouped().set_group(index, **options)

    def _grouped(self) -> Any:
        if not hasattr(self.optimizer, "add_group"):
            inner = type(self.optimizer).__name__
            raise TypeError(f"[{self._name}] {inner} has no parameter groups; use mlx_adagrad.Adagrad.")
        return self.optimizer

    @property
    def calls_per_update(self) -> int:
        """How many calls make one update: the steps of a gradient accumulation inside, else 1."""
        return self.optimizer.calls_per_update if isinstance(self.optimizer, Wrapper) else 1

    def get_config(self) -> dict[str, Any]:
        """The wrapper, its arguments, and the config of the preset inside; see :mod:`mlx_adagrad.presets`.

        Raises:
            TypeError: If there is no preset inside, or something depends on a function, which JSON cannot hold.
        """
        if self._recipe is not None:  # a preset with this wrapper in it
            return super().get_config()
        from .config import config_of  # it knows all wrappers

        return config_of(self)

    def init(self, parameters: dict) -> None:
        """Make the state of every parameter in the tree now, the inner optimizer's and the wrapper's own."""
        self._settle(parameters)
        foreign.init(self.optimizer, parameters)

    def _settle(self, parameters: Any, gradients: Any = None) -> None:
        """Compare new state with the parameters, all that is inside included, before anything advances."""
        new = [part for part in parts(self) if not part._initialized]
        if new:
            settle(new, parameters, gradients)

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Return the updated parameters, a tree in the shape of ``gradients``.

        Args:
            gradients: A tree of gradients; a missing key, an empty ``{}`` and a None are absent gradients.
            parameters: A tree of parameters, which may be a superset of the gradients (a whole model).
        """
        checks.tree(self._name, gradients, parameters)
        if self._is_idle(gradients):
            return {}
        self._settle(parameters, gradients)
        self._updated_on = get_ident()
        return self.apply_modified(gradients, parameters, UNMODIFIED)

    def flush(self, model_or_tree: Any) -> Any:
        """Update by the last, incomplete window of a :class:`GradientAccumulation`, as at the end of an epoch.

        The update is by the mean of the gradients that the window has, whose number may be less than its ``steps``; the
        calls that it lacks count as made, for schedules and averages too, and the next window begins with the next
        call. Where no gradient waits nothing changes: no step is made. Keras has no counterpart; optax's running mean
        is the same; a torch loop that divides each loss by ``steps`` makes a smaller update here.

        Args:
            model_or_tree: A module, which is updated in place, or a tree of parameters.

        Returns:
            The parameters, updated.

        Raises:
            TypeError: If ``model_or_tree`` is neither.
            ValueError: If one accumulation is inside another: how much of its mean a part of it weighs is not defined.
        """
        checks.tree(self._name, [None], model_or_tree)
        self._settle(model_or_tree)
        return flushing.flush(self, model_or_tree)

    def _is_idle(self, gradients: Any) -> bool:
        # a preset inside has the same rule as without this wrapper
        return (super() if self._recipe is not None else self._nearest)._is_idle(gradients)

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        """:meth:`apply_gradients` with what the wrappers outside this one ask for."""
        return foreign.apply_modified(self.optimizer, gradients, parameters, modifiers)

    def _in_order(self, key: str) -> None:
        """Put entries that were made again to where they were before others were assigned; see ``fill``."""
        order, entries = self._order.get(key), self._own[key]
        if order is None:
            return
        there = [name for name in order if name in entries]
        ordered = {name: entries[name] for name in [*there, *(name for name in entries if name not in order)]}
        entries.clear()
        entries.update(ordered)
        if len(there) == len(order):
            self._order = {other: names for other, names in self._order.items() if other != key}

    def _keep(self, modifiers: Modifiers, **values: mx.array) -> None:
        """Set own entries of the state, where the step happens; called after the inner optimizer, which may raise."""
        for key, value in values.items():
            held = isinstance(modifiers.apply, mx.array)
            self._own[key] = mx.where(modifiers.apply, value, self._own[key]) if held else value

    def scale_loss(self, loss: mx.array) -> mx.array:
        """The loss to differentiate: scaled by each loss scale among the wrappers, ``loss`` itself without one."""
        return self._nearest.scale_loss(loss)

    def finalize_variable_values(self, model_or_tree: Any) -> Any:
        """Put the averages of an :class:`ExponentialMovingAverage` among the wrappers in place of the parameters.

        Args:
            model_or_tree: A module, which is updated in place, or a tree of parameters.

        Returns:
            The parameters, averaged; without an average as they are.
        """
        return self._nearest.finalize_variable_values(model_or_tree)

    def averaged(self, model: Module) -> AbstractContextManager[Module]:
        """A context in which ``model`` holds the averages of an :class:`ExponentialMovingAverage` among the wrappers,
        for evaluation; without one it is as it is.
        """
        return self._nearest.averaged(model)

    @property
    def _norms_inside(self) -> bool:
        """Whether a wrapper inside asks for norms of these gradients."""
        inner = self.optimizer
        return isinstance(inner, Wrapper) and (inner.needs_norms or inner._norms_inside)

    @property
    def _nearest(self) -> Configurable:
        """The optimizer inside, or what stands for one that knows nothing of whole-run features."""
        return self.optimizer if isinstance(self.optimizer, Configurable) else Configurable()


def _first(optimizer: Optimizer) -> Optimizer:
    # a MultiOptimizer has no step count; it also takes its first optimizer's learning rate for its own
    return _first(optimizer.optimizers[0]) if isinstance(optimizer, MultiOptimizer) else optimizer


def _check(optimizer: Optimizer, state: Any) -> None:
    """Raise for a state that ``optimizer`` cannot have."""
    if isinstance(optimizer, Wrapper):
        optimizer._check_state(state)
    elif isinstance(optimizer, MultiOptimizer):
        states = state.get("states") if isinstance(state, dict) else None
        if not isinstance(states, list) or len(states) != len(optimizer.optimizers):
            raise ValueError(f"[MultiOptimizer] 'state' must have 'states', {len(optimizer.optimizers)} of them.")
        for inner, part in zip(optimizer.optimizers, states, strict=True):
            _check(inner, part)
    else:
        check_roots(type(optimizer).__name__, state, optimizer.state)


def _assign(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.state = state``, but into the dicts that it has."""
    if isinstance(optimizer, Wrapper):
        optimizer.state = state
    elif isinstance(optimizer, MultiOptimizer):
        for inner, part in zip(optimizer.optimizers, state["states"], strict=True):
            _assign(inner, part)
    else:
        own = optimizer.state
        fill(own, restored(state, own), places=True)
        optimizer.state = own  # its setter may note that there is something new
