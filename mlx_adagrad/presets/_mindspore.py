"""The two Adagrads of MindSpore: ``mindspore.experimental.optim`` and ``mindspore.nn``."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import mlx.core as mx

from .. import checks, rates
from ..adagrad import Adagrad
from ..checks import shown
from ..groups import Groups
from ..rates import LearningRate
from ..update.rule import Rule
from ..wrappers import LossScale
from .recipe import preset


@preset
def mindspore(
    lr: LearningRate = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    *,
    maximize: bool = False,
    groups: Iterable[dict[str, Any]] | None = None,
) -> Adagrad:
    r"""``mindspore.experimental.optim.Adagrad``: torch's formula, with one step count for all parameters.

    Args:
        lr: Learning rate, > 0; it can be set to 0 later. Default: ``1e-2``.
        lr_decay: The rate of step t = 1, 2, ... is ``lr / (1 + (t - 1) lr_decay)``, >= 0. Default: ``0.0``.
        weight_decay: Added to the gradient, ``weight_decay * w``, >= 0. Default: ``0.0``.
        initial_accumulator_value: What ``v`` starts from, >= 0. Default: ``0.0``.
        eps: Added to the root, > 0. Default: ``1e-10``.
        maximize: Ascend; weight decay still shrinks. Default: ``False``.
        groups: As in :class:`~mlx_adagrad.Adagrad`; a group's ``initial_accumulator_value`` is checked and ignored,
            as MindSpore ignores it. Default: ``None``.

    Raises:
        ValueError: For a negative, infinite or NaN hyperparameter, and for an ``lr`` or ``eps`` of 0.
        TypeError: For what is no number or no bool.
    """
    if isinstance(lr, Real):
        checks.positive("mindspore", "lr", lr)
    rule = Rule(
        eps=checks.positive("mindspore", "eps", eps),
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        initial_accumulator_value=initial_accumulator_value,
        maximize=maximize,
        owner="mindspore",
    )
    rate = rates.parse("mindspore", "lr", lr)
    return Adagrad.from_rule(rate, Groups(rule, groups, ignored_keys=("initial_accumulator_value",)))


@preset
def mindspore_nn(
    accum: float = 0.1,
    learning_rate: LearningRate = 0.001,
    update_slots: bool = True,
    loss_scale: float = 1.0,
    weight_decay: float = 0.0,
) -> Adagrad | LossScale:
    r"""``mindspore.nn.Adagrad``: coupled weight decay, :math:`w - \lambda g / \sqrt{v}`, no epsilon.

    A parameter whose path contains ``beta`` or ``gamma`` is not decayed, unless it is in a group.

    Args:
        accum: What ``v`` starts from, a float >= 0. Default: ``0.1``.
        learning_rate: Learning rate, >= 0. Default: ``0.001``.
        update_slots: Let ``v`` grow. Default: ``True``.
        loss_scale: What the loss was multiplied by, > 0; gradients are divided by it. Default: ``1.0``.
        weight_decay: Added to the unscaled gradient, ``weight_decay * w``, >= 0. Default: ``0.0``.

    Raises:
        ValueError: For a negative, infinite or NaN hyperparameter, or a ``loss_scale`` of 0.
        TypeError: For what is no number or no bool, or an ``accum`` that is no float.
    """
    if isinstance(accum, Integral):
        raise TypeError(f"[mindspore_nn] 'accum' must be a float but got {shown(accum)}.")
    scale = checks.positive("mindspore_nn", "loss_scale", loss_scale)
    rule = Rule(
        eps=0.0,
        weight_decay=weight_decay,
        initial_accumulator_value=checks.non_negative("mindspore_nn", "accum", accum),
        update_accumulator=checks.boolean("mindspore_nn", "update_slots", update_slots),
        owner="mindspore_nn",
    )
    rate = rates.parse("mindspore_nn", "learning_rate", learning_rate)
    adagrad = Adagrad.from_rule(rate, Groups(rule, decays=_is_decayed))
    adagrad.groups.mask_spares_groups = True
    return adagrad if scale == 1 else LossScale(adagrad, scale)


def _is_decayed(path: str, parameter: mx.array) -> bool:
    """MindSpore goes by the name."""
    return "beta" not in path and "gamma" not in path
