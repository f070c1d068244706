"""The optimizer: its arguments, and one call from the gradients to the updated parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import get_ident
from typing import Any

import mlx.core as mx

from . import checks
from .dispatch import Dispatch
from .distributed.sharding import check_rows
from .groups import Groups, Predicate
from .leaves import Leaf, Leaves, collect
from .matching import Known
from .options import Options
from .rates import LearningRate
from .settings import Settings
from .state_checks import Comparison, compare, settle
from .trees import Keys, optimizable
from .update.accumulators import Dense, RowWise
from .update.modifiers import UNMODIFIED, Modifiers
from .update.rule import Rule
from .update.step import Step


class Adagrad(Settings):
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
        eps (float): :math:`\epsilon > 0`; or 0 with a positive ``initial_accumulator_value``. Default: ``1e-8``.
        lr_decay (float): :math:`\eta \ge 0`. Default: ``0.0``.
        weight_decay (float): :math:`\delta \ge 0`. Default: ``0.0``.
        decoupled_weight_decay (bool): Shrink the weights themselves, as Keras and AdamW do. Default: ``False``.
        initial_accumulator_value (float): What :math:`v` starts from, :math:`\ge 0`. Default: ``0.0``.
        maximize (bool): Ascend; weight decay still shrinks. Default: ``False``.
        eps_inside_sqrt (bool): Divide by :math:`\sqrt{v + \epsilon}` (Keras 3, optax). Default: ``False``.
        accumulator (Dense, RowWise or Quantized, optional): How :math:`v` is stored. Default:
            :class:`~mlx_adagrad.Dense`.
        fused (bool, optional): ``None``: the Metal kernel when the default device is the GPU, asked at each call, else
            MLX operations; ``False``: always operations; ``True``: the kernel or a RuntimeError. The kernel takes no
            ``mx.vmap`` and no ``mx.compile(shapeless=True)``: use ``False`` there. Default: ``None``.
        differentiable (bool): Let gradients flow through a *fused* update too, second order included; such a step
            cannot be exported. Without the kernel an update always is differentiable, except for a row-sparse gradient.
            Default: ``False``.
        groups (list of dict, optional): Parameters that differ: dicts of ``params`` (a glob on the dotted path, a
            list of globs, or a predicate on (path, array)) and any of ``lr``, ``lr_decay``, ``eps``,
            ``weight_decay``, ``maximize``. The first match wins; the others take the values above. Default: ``None``.
        weight_decay_mask (callable, optional): ``(path, array) -> bool``: whether to decay it. Default: ``None``.
        lazy (bool): A :class:`~mlx_adagrad.RowSparse` gradient changes, and decays, only the rows that it names.
            ``False``: it means the dense gradient, whose zeros let the other rows decay too. Default: ``True``.
        rounding (str): How new fp16 and bf16 weights are rounded (others are not). ``"nearest"`` loses every update
            below half a unit in the last place; ``"stochastic"`` rounds up or down at random such that the mean is
            exact; ``"compensated"`` keeps what was lost in one more array of the weight's dtype. Default:
            ``"nearest"``.
        rounding_seed (int, optional): The seed of the random bits of ``rounding`` and ``accumulator``, 0 to 2^64 - 1;
            it is part of the state. Default: drawn from ``mx.random`` if there are any.

    Raises:
        ValueError: For a negative, infinite or NaN hyperparameter, an unknown ``rounding``, and for ``eps`` 0 where
            ``v`` starts from 0.
        TypeError: For what is no number (a bool is none), no bool or no accumulator.

    A number may also be one of numpy or an array of one element.

    Differs from :class:`mlx.optimizers.Adagrad`: :math:`v` is fp32 for half-precision parameters and the result keeps
    the parameter's dtype whatever the gradient's; state is made from the parameters, and only where there is a
    gradient. From torch's: a gradient of 0 never gives NaN, and one step count serves all parameters.
    """

    _in_progress: tuple[Keys, Dispatch] | None = None  # of the step that calls a subclass's apply_single, else None

    @checks.hinted
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
        rounding: str = "nearest",
        rounding_seed: int | None = None,
    ):
        if checks.real("Adagrad", "eps", eps) <= 0 and (eps < 0 or not initial_accumulator_value):
            raise ValueError(f"[Adagrad] 'eps' should be >0 unless initial_accumulator_value is, but got {float(eps)}.")
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
        options = Options.checked(accumulator, parsed, fused, differentiable, lazy, rounding)
        self._setup(learning_rate, options, rounding_seed)

    @classmethod
    def from_rule(
        cls, learning_rate: LearningRate, rule: Rule | Groups, *, accumulator: Dense | None = None, lazy: bool = True
    ) -> Adagrad:
        """An optimizer with exactly this rule, also one that the constructor refuses (``eps`` and ``v`` both 0)."""
        optimizer = cls.__new__(cls)
        groups = rule if isinstance(rule, Groups) else Groups(rule)
        optimizer._setup(learning_rate, Options.checked(accumulator, groups, None, False, lazy))
        return optimizer

    def _compared(self, known: Known) -> Comparison:
        extra = type(self).init_single is not Adagrad.init_single
        found = compare(self.state, known, self._options.storage, self._schedulers, extra)
        return found._replace(problems=[*found.problems, *self.groups.problems(self.state)])

    def init(self, parameters: dict) -> None:
        """Make the state of every parameter in the tree now, so that it can be captured, saved or loaded into.

        Integer and bool leaves are skipped, as are leaves that have state already.
        """
        settle([self], parameters)
        state = self._bookkeeping
        for leaf in collect(optimizable(parameters), parameters, state.tree, state.storage):
            state.of_leaf(leaf, parameters)

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Give one parameter its state: ``v``, and a step count where the rule counts for each parameter."""
        state.update(self._options.storage.initial(parameter, self.rule.initial_accumulator_value))
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
        checks.tree("Adagrad", gradients, parameters)
        if self._is_idle(gradients):
            return {}
        return self.apply_modified(gradients, parameters, UNMODIFIED)

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        """:meth:`apply_gradients` with what wrappers derived for this step: it enters the update as scalars."""
        options, state = self._options, self._bookkeeping
        use_kernels = options.use_kernels()
        self._updated_on = get_ident()
        self.groups.check_matches(parameters)
        if isinstance(self.accumulator, RowWise):
            check_rows(parameters)
        if not self._initialized:  # or there is new state
            settle([self], parameters, gradients)
        leaves = collect(gradients, parameters, state.tree, state.storage, options.leaf_check)
        if modifiers.apply is False:
            return leaves.rebuilt(leaves.parameters)
        self.groups.resolve_all(leaves)
        rates = state.scheduled_rates(modifiers)
        states = state.of_leaves(leaves, gradients)
        step = state.advance(rates, modifiers)
        dispatch = Dispatch(options, step, use_kernels, state.keys(step.before))
        if type(self).apply_single is not Adagrad.apply_single:  # MLX's documented point of extension
            return leaves.rebuilt(self._update_singly(leaves, states, dispatch))
        return leaves.rebuilt(dispatch.update_all(leaves, states))

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Update one parameter and its ``state``, with the learning rate and the step count as they stand."""
        if self._in_progress is not None:  # a subclass has overridden this and calls it for a leaf of a step
            keys, dispatch = self._in_progress
            return dispatch.update((gradient, parameter, state, keys), state)
        options, bookkeeping = self._options, self._bookkeeping
        step = Step(self.accumulator.plain, bookkeeping.rate, mx.maximum(self.step, 1) - 1, UNMODIFIED)
        dispatch = Dispatch(options, step, options.use_kernels(), bookkeeping.keys(step.before))
        return dispatch.update((gradient, parameter, state, ()), state)

    def _update_singly(self, leaves: Leaves, states: Sequence[dict], dispatch: Dispatch) -> list[mx.array]:
        def update(leaf: Leaf, state: dict) -> mx.array:
            self._in_progress = leaf[-1], dispatch
            return self.apply_single(*leaf[:2], state)

        try:
            try:
                return [update(leaf, state) for leaf, state in zip(leaves, states, strict=True)]
            finally:
                self._in_progress = None
        finally:
            self._in_progress = None  # where the first was interrupted
