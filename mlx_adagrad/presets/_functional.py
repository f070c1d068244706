"""The Adagrads of ``mlx.optimizers`` and optax, and the one of the paper."""

from __future__ import annotations

from .. import checks, rates
from ..adagrad import Adagrad
from ..rates import LearningRate
from ..update.rule import Rule
from .recipe import preset


@preset
def mlx(learning_rate: LearningRate, eps: float = 1e-8) -> Adagrad:
    r"""``mlx.optimizers.Adagrad``: :math:`w - \lambda g / (\sqrt{v} + \epsilon)`, with ``v`` in fp32.

    Args:
        learning_rate: Learning rate, >= 0.
        eps: Added to the root, > 0. Default: ``1e-8``.

    Raises:
        ValueError: For a negative, infinite or NaN hyperparameter, or an ``eps`` of 0.
        TypeError: For what is no number.
    """
    if checks.real("mlx", "eps", eps) <= 0:
        raise ValueError(f"[mlx] 'eps' should be >0 but got {float(eps)}.")
    return Adagrad.from_rule(rates.parse("mlx", "learning_rate", learning_rate), Rule(eps=eps, owner="mlx"))


@preset
def optax(learning_rate: LearningRate, initial_accumulator_value: float = 0.1, eps: float = 1e-7) -> Adagrad:
    r"""``optax.adagrad``: :math:`w - \lambda g / \sqrt{v + \epsilon}`, and no update where ``v`` is 0.

    Args:
        learning_rate: Learning rate, >= 0.
        initial_accumulator_value: What ``v`` starts from, >= 0. Default: ``0.1``.
        eps: Added under the root, >= 0. Default: ``1e-7``.

    Raises:
        ValueError: For a negative, infinite or NaN hyperparameter.
        TypeError: For what is no number.
    """
    rule = Rule(eps=eps, eps_inside_sqrt=True, initial_accumulator_value=initial_accumulator_value, owner="optax")
    return Adagrad.from_rule(rates.parse("optax", "learning_rate", learning_rate), rule)


@preset
def paper(learning_rate: LearningRate = 1.0) -> Adagrad:
    r"""Adagrad as Duchi, Hazan and Singer (2011) have it, diagonal form: :math:`w - \lambda g / \sqrt{v}`.

    There is no epsilon: where ``v`` is 0, so is the gradient, and the update is 0.

    Args:
        learning_rate: Learning rate, >= 0. Default: ``1.0``.

    Raises:
        ValueError: For a negative, infinite or NaN learning rate.
        TypeError: For what is no number.
    """
    return Adagrad.from_rule(rates.parse("paper", "learning_rate", learning_rate), Rule(eps=0.0, owner="paper"))
