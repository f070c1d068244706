"""The Adagrad of ``torch.optim``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import checks, rates
from ..adagrad import Adagrad
from ..groups import Groups
from ..rates import LearningRate
from ..update.accumulators import Dense
from ..update.rule import Rule
from .recipe import preset


@preset
def torch(
    lr: LearningRate = 1e-2,
    lr_decay: float = 0,
    weight_decay: float = 0,
    initial_accumulator_value: float = 0,
    eps: float = 1e-10,
    *,
    maximize: bool = False,
    groups: Iterable[dict[str, Any]] | None = None,
    state_dtype: str = "parameter",
) -> Adagrad:
    r"""``torch.optim.Adagrad``: coupled weight decay, :math:`w - \lambda_t g / (\sqrt{v} + \epsilon)`.

    Steps are counted for each parameter on its own, which matters to ``lr_decay`` where a gradient is absent or a
    group comes late.

    Args:
        lr: Learning rate, >= 0. Default: ``1e-2``.
        lr_decay: The rate of step t = 1, 2, ... is ``lr / (1 + (t - 1) lr_decay)``, >= 0. Default: ``0``.
        weight_decay: Added to the gradient, ``weight_decay * w``, >= 0. Default: ``0``.
        initial_accumulator_value: What ``v`` starts from, >= 0. Default: ``0``.
        eps: Added to the root, >= 0. Default: ``1e-10``.
        maximize: Ascend; weight decay still shrinks. Default: ``False``.
        groups: As in :class:`~mlx_adagrad.Adagrad`; a group's ``initial_accumulator_value`` is checked and ignored,
            as torch ignores it. Default: ``None``.
        state_dtype: What ``v`` is stored in: ``"parameter"`` for the parameter's dtype, as in torch, ``"float32"`` for
            fp32 beside half precision. Default: ``"parameter"``.

    Raises:
        ValueError: For a negative, infinite or NaN hyperparameter, or another ``state_dtype``.
        TypeError: For what is no number or no bool.
    """
    checks.one_of("torch", "state_dtype", state_dtype, ("parameter", "float32"))
    rate = rates.parse("torch", "lr", lr)
    rule = Rule(
        eps=eps,
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        initial_accumulator_value=initial_accumulator_value,
        maximize=maximize,
        step_per_parameter=True,
        owner="torch",
    )
    parsed = Groups(rule, groups, ignored_keys=("initial_accumulator_value",))
    return Adagrad.from_rule(rate, parsed, accumulator=Dense(state_dtype))
