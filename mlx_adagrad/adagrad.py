"""The optimizer: argument checks, state, and the choice between a kernel and operations for each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from . import checks, rates
from .configurable import Configurable
from .dispatch import Dispatch, Options
from .groups import Groups, Predicate
from .leaves import Leaf, Leaves, collect
from .rates import LearningRate
from .sparse.gradient import RowSparse
from .trees import Keys, dotted, fill, optimizable, slot
from .update import kernels
from .update.accumulators import Dense
from .update.modifiers import UNMODIFIED, Modifiers
from .update.rule import Rule
from .update.step import Step


class Adagrad(Configurable, Optimizer):
    r"""The Adagrad optimizer [1], a drop-in for :class:`mlx.optimizers.Adagrad` that stays right in half precision.

    At step :math:`t = 1, 2, \dots`, with :math:`g \leftarrow -g` first if ``maximize``:

    .. math::

        \lambda_t &= \lambda / (1 + (t - 1)\, \eta) \\
        g_t &\leftarrow g_t + \delta w_t \quad \text{(coupled decay)} \quad \text{or} \quad
        w_t \leftarrow w_t - \lambda_t \delta w_t \quad \text{(decoupled)} \\
        v_{t+1} &= v_t + g_t^2 \\
        w_{t+1} &= w_t - \lambda_t \frac{g_t}{\sqrt{v_{t+1}} + \epsilon} \quad \text{or} \quad
        w_t - \lambda_t \frac{g_t}{\sqrt{v_{t+1} + \epsilon}}

    The arithmetic and :math:`v` are fp32 for fp16 and bf16 parameters, fp64 for fp64 ones; complex64 parameters are two
    independent reals. The new parameter has the old one's dtype. Where :math:`\epsilon` and :math:`v` are both 0 the
    update is 0. Only parameters that have a gradient get state, at their first one.

    [1]: Duchi, J., Hazan, E. and Singer, Y., 2011. Adaptive subgradient methods for online learning and stochastic
    optimization. JMLR 2011.

    Args:
        learning_rate (float, array or callable): :math:`\lambda \ge 0`; a number, a one-element array, a schedule of
            the step (as in ``mlx.optimizers``), or a callable without arguments, called at every step (inside
            ``mx.compile`` it is called once, and its value is frozen into the trace).
        eps (float): :math:`\epsilon > 0`; 0 is allowed with a positive ``initial_accumulator_value``. Default:
            ``1e-8``.
        lr_decay (float): :math:`\eta \ge 0`. Default: ``0.0``.
        weight_decay (float): :math:`\delta \ge 0`. Default: ``0.0``.
        decoupled_weight_decay (bool): Shrink the weights (Keras, AdamW), not through the gradient (torch). Default:
            ``False``.
        initial_accumulator_value (float): What :math:`v` starts from, :math:`\ge 0`. Default: ``0.0``.
        maximize (bool): Ascend; weight decay still shrinks. Default: ``False``.
        eps_inside_sqrt (bool): Divide by :math:`\sqrt{v + \epsilon}` (Keras 3, optax). Default: ``False``.
        accumulator (Dense or RowWise, optional): How :math:`v` is stored. Default: :class:`~mlx_adagrad.Dense`.
        fused (bool, optional): ``None``: the Metal kernel when the default device is the GPU, asked at each call, else
            MLX operations; ``False``: always operations; ``True``: the kernel or a RuntimeError. The kernel takes no
            ``mx.vmap`` and no ``mx.compile(shapeless=True)``: use ``False`` there. Default: ``None``.
        differentiable (bool): Let gradients flow through a *fused* update too, second order included; such a step
            cannot be exported. Without the kernel an update always is differentiable, except for a row-sparse gradient.
            Default: ``False``.
        groups (list of dict, optional): Parameters that differ: dicts of ``params`` (a glob on the dotted path, a
            list of globs, or a predicate on (path, array)) and any of ``lr``, ``lr_decay``, ``eps``,
            ``weight_decay``, ``maximize``. The first match wins; what matches none takes the values above. Default:
            ``None``.
        weight_decay_mask (callable, optional): ``(path, array) -> bool``, whether a parameter is decayed. Default:
            ``None``.
        lazy (bool): A :class:`~mlx_adagrad.RowSparse` gradient changes, and decays, only the rows that it names.
            ``False``: it means the dense gradient, whose zeros let the other rows decay too. Default: ``True``.

    Raises:
        ValueError: For a negative, infinite or NaN hyperparameter, and for ``eps`` 0 where ``v`` starts from 0.
        TypeError: For what is no number (a bool is none), no bool or no accumulator.

    Differs from :class:`mlx.optimizers.Adagrad`: :math:`v` is fp32 for half-precision parameters and the result keeps
    the parameter's dtype whatever the gradient's; state is made from the parameters, and only where there is a
    gradient. From torch's: a gradient of 0 never gives NaN, and one step count serves all parameters.
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        eps: float = 1e-8,
        *,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        initial_accumulator_value: float = 0.0,
        maximize: bool = False,
        eps_inside_sqrt: bool = False,
        accumulator: Dense | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        groups: Iterable[dict[str, Any]] | None = None,
        weight_decay_mask: Predicate | None = None,
        lazy: bool = True,
    ):
        if checks.real("Adagrad", "eps", eps) <= 0 and (eps < 0 or not initial_accumulator_value):
            wanted = "should be >0 unless initial_accumulator_value is"
            raise ValueError(f"[Adagrad] 'eps' {wanted}, but got {float(eps)}.")
        rule = Rule(
            eps=eps,
            eps_inside_sqrt=eps_inside_sqrt,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            maximize=maximize,
        )
        parsed = Groups(rule, groups, weight_decay_mask, eps_must_be_positive=True)
        self._setup(learning_rate, parsed, accumulator, fused, differentiable, lazy)

    @classmethod
    def from_rule(
        cls,
        learning_rate: LearningRate,
        rule: Rule,
        *,
        accumulator: Dense | None = None,
        groups: Iterable[dict[str, Any]] | None = None,
        weight_decay_mask: Predicate | None = None,
        ignored_group_keys: tuple[str, ...] = (),
        lazy: bool = True,
    ) -> Adagrad:
        """An optimizer with exactly this rule, also one that the constructor would refuse (``eps`` and ``v`` both
        0).
        """
        optimizer = cls.__new__(cls)
        parsed = Groups(rule, groups, weight_decay_mask, ignored_group_keys)
        optimizer._setup(learning_rate, parsed, accumulator, None, False, lazy)
        return optimizer

    def _setup(
        self,
        learning_rate: LearningRate,
        groups: Groups,
        accumulator: Dense | None,
        fused: bool | None,
        differentiable: bool,
        lazy: bool,
    ) -> None:
        if accumulator is not None and not isinstance(accumulator, Dense):
            raise TypeError(f"[Adagrad] 'accumulator' must be Dense() or RowWise() but got {accumulator!r}.")
        if fused is not None:
            checks.boolean("Adagrad", "fused", fused)
        checks.boolean("Adagrad", "differentiable", differentiable)
        checks.boolean("Adagrad", "lazy", lazy)
        rate = rates.parse("Adagrad", "learning_rate", learning_rate)
        super().__init__()
        self.rule = groups.default
        self.groups = groups
        self.accumulator = accumulator or Dense()
        self.fused = fused
        self.differentiable = differentiable
        self.lazy = lazy
        self._in_progress: tuple[Keys, Dispatch] | None = None
        self._set_rate(rate)
        groups.states(self.state)

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
            fill(self._state, state)

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
        self._set_rate(rates.parse(self.rule.owner, "learning_rate", learning_rate))

    def _set_rate(self, rate: mx.array | rates.Schedule) -> None:
        self._schedulers.pop("learning_rate", None)
        if callable(rate):
            self._schedulers["learning_rate"] = rate
        self.state["learning_rate"] = rate(self.step) if callable(rate) else rate

    def add_group(self, group: dict[str, Any]) -> None:
        """Append a parameter group, also for parameters not seen before; an entry of the constructor's ``groups``."""
        self.groups.add(group)
        self.groups.states(self.state)

    def set_group(self, index: int, *, lr: LearningRate) -> None:
        """Set the learning rate of group ``index`` of a group that was given one; to whatever the constructor takes."""
        if not -len(self.groups.groups) <= index < len(self.groups.groups):
            raise ValueError(f"[Adagrad] there is no group {index}: there are {len(self.groups.groups)}.")
        self.groups.set_lr(index, rates.parse("Adagrad", "lr", lr))
        entry = self.groups.states(self.state)[index]
        rate = self.groups.groups[index].lr
        entry["learning_rate"] = rate(self.step) if callable(rate) else rate

    def init(self, parameters: dict) -> None:
        """Make the state of every parameter in the tree now, so that it can be captured, saved or loaded into.

        Integer and bool leaves are skipped, as are leaves that have state already.
        """
        for leaf in collect(optimizable(parameters), parameters, self.state, self.accumulator):
            self._state_of(leaf, parameters)
        self._initialized = True

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Give one parameter its state: ``v``, and its own step count where the rule counts per parameter."""
        state["v"] = self.accumulator.init(parameter, self.rule.initial_accumulator_value)
        if self.rule.step_per_parameter:
            state["step"] = mx.array(0, mx.uint64)

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Return the updated parameters, a tree in the shape of ``gradients``.

        Args:
            gradients: A tree of gradients; a missing key, an empty ``{}`` and a None are absent gradients.
            parameters: A tree of parameters, which may be a superset of the gradients (a whole model).

        Raises:
            ValueError: For a gradient without a parameter or of another shape, a parameter of integer or bool dtype
                that has a gradient, and state of another shape. Nothing has changed then.
            TypeError: For a gradient or parameter that is no array. Nothing has changed then.
            RuntimeError: With ``fused=True`` where no kernel can run. Nothing has changed then.
        """
        if self._is_idle(gradients):
            return {}
        return self.apply_modified(gradients, parameters, UNMODIFIED)

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        """:meth:`apply_gradients` with what wrappers derived for this step: it enters the update as scalars."""
        fused = self._use_kernel()
        self.groups.check_matches(parameters)
        check = self._check_fused if self.fused else None
        leaves = collect(gradients, parameters, self.state, self.accumulator, check)
        if modifiers.apply is False:
            return leaves.rebuilt(leaves.parameters)
        if self.groups:
            for _, w, _, keys in leaves:
                self.groups.resolve(dotted(keys), w)  # runs the user's predicates, which may raise
        rates = self._scheduled_rates(modifiers)
        states = self._states_of(leaves, gradients)
        self._initialized = True
        dispatch = Dispatch(self._options, self._advance(rates, modifiers), fused)
        if type(self).apply_single is not Adagrad.apply_single:
            return leaves.rebuilt(self._update_singly(leaves, states, dispatch))
        return leaves.rebuilt(dispatch.update_all(leaves, states))

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Update one parameter and its ``state``, with the learning rate and the step count as they stand."""
        if self._in_progress is not None:  # a subclass has overridden this and calls it for a leaf of a step
            keys, dispatch = self._in_progress
            return dispatch.update((gradient, parameter, state, keys), state)
        step = Step(self.accumulator, self._group_rate, mx.maximum(self.step, 1) - 1, UNMODIFIED)
        return Dispatch(self._options, step, self._use_kernel()).update((gradient, parameter, state, ()), state)

    def _update_singly(self, leaves: Leaves, states: Sequence[dict], dispatch: Dispatch) -> list[mx.array]:
        # apply_single is MLX's documented point of extension
        updated = []
        try:
            for (g, w, _, keys), state in zip(leaves, states, strict=True):
                self._in_progress = keys, dispatch
                updated.append(self.apply_single(g, w, state))
        finally:
            self._in_progress = None
        return updated

    def _scheduled_rates(self, modifiers: Modifiers) -> list[tuple[dict, str, mx.array]]:
        """Where in the state each schedule writes, and what; a schedule may raise, so nothing is written yet."""
        calls = self.step if modifiers.calls is None else modifiers.calls
        rates = [(self.state, name, schedule(calls)) for name, schedule in self._schedulers.items()]
        for group, entry in zip(self.groups.groups, self.groups.states(self.state), strict=True):
            if callable(group.lr):
                rates.append((entry, "learning_rate", group.lr(calls)))
        return rates

    def _advance(self, rates: list[tuple[dict, str, mx.array]], modifiers: Modifiers) -> Step:
        """Write the rates and count the step, both only where the step happens."""
        for entry, name, rate in rates:
            entry[name] = rate if isinstance(modifiers.apply, bool) else mx.where(modifiers.apply, rate, entry[name])
        step = Step(self.accumulator, self._group_rate, self.step, modifiers)
        self.state["step"] = self.step + step.counted
        return step

    @property
    def _options(self) -> Options:
        return Options(self.accumulator, self.groups, self.differentiable, self.lazy)

    def _group_rate(self, group: int | None) -> mx.array:
        return self.learning_rate if group is None else self.groups.states(self.state)[group]["learning_rate"]

    def _use_kernel(self) -> bool:
        if self.fused:
            kernels.require()
        return kernels.available() if self.fused is None else self.fused

    def _states_of(self, leaves: Leaves, gradients: dict) -> Sequence[dict]:
        if self.rule.step_per_parameter or not leaves.complete:
            return [self._state_of(leaf, gradients) for leaf in leaves]
        return leaves.states

    def _state_of(self, leaf: Leaf, gradients: dict) -> dict:
        _, w, state, keys = leaf
        state = state or slot(self.state, gradients, keys)
        if "v" not in state:
            self.init_single(w, state)
        if self.rule.step_per_parameter and "step" not in state:
            state["step"] = self.step  # state from elsewhere counted the steps of all
        return state

    def _check_fused(self, leaf: Leaf) -> None:
        g, w, _, keys = leaf
        if self._options.has_kernel(g, w):
            return
        sparse = " row-sparse" if isinstance(g, RowSparse) else ""
        raise RuntimeError(
            f"[Adagrad] 'fused=True' but no kernel takes '{dotted(keys)}': {w.dtype} parameters with "
            f"{g.dtype}{sparse} gradients in {self.accumulator}. Use fused=None to fall back by itself."
        )
