"""The Adagrads of Keras 3 (and R's keras3) and of tf.keras 2.9."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import mlx.core as mx

from .. import checks, rates
from ..adagrad import Adagrad
from ..checks import shown
from ..groups import Groups
from ..rates import LearningRate
from ..update.rule import Rule
from ..wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Constraint,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    Wrapper,
)
from .recipe import preset

keras_preset = partial(preset, needs_gradient=True)
TF_KERAS_EPSILON = 1e-7  # what tf.keras puts in place of 0


@keras_preset
def keras(
    learning_rate: LearningRate = 0.001,
    initial_accumulator_value: float = 0.1,
    epsilon: float = 1e-7,
    weight_decay: float | None = None,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite_frequency: int | None = None,
    name: str | None = "adagrad",
    loss_scale_factor: float | None = None,
    gradient_accumulation_steps: int | None = None,
    *,
    exclude_from_weight_decay: list[str] | None = None,
    constraints: Mapping[Any, str | Callable[[mx.array], mx.array]] | None = None,
) -> Adagrad | Wrapper:
    r"""``keras.optimizers.Adagrad``: decoupled weight decay, :math:`w - \lambda g / \sqrt{v + \epsilon}`.

    At each call gradients are divided by the loss scale, accumulated, clipped; weights decay and are updated, averaged,
    constrained. Schedules see the number of calls; ``iterations`` counts updates.

    Args:
        learning_rate: Learning rate, a float >= 0, a schedule or a callable. Default: ``0.001``.
        initial_accumulator_value: What ``v`` starts from, >= 0. Default: ``0.1``.
        epsilon: Added under the root, >= 0. Default: ``1e-7``.
        weight_decay: Weights shrink by ``learning_rate * weight_decay`` of themselves, >= 0. Default: ``None``.
        clipnorm: Largest norm of each gradient, >= 0; one clip at most, 0 and None are none. Default: ``None``.
        clipvalue: Largest absolute value of an element, >= 0. Default: ``None``.
        global_clipnorm: Largest norm of all gradients together, >= 0. Default: ``None``.
        use_ema: Average the weights (see :class:`~mlx_adagrad.wrappers.ExponentialMovingAverage`). Default: ``False``.
        ema_momentum: Momentum of the average, in [0, 1]. Default: ``0.99``.
        ema_overwrite_frequency: Updates after which the average replaces the weights, >= 1. Default: ``None``.
        name: A label, kept for the config. Default: ``"adagrad"``.
        loss_scale_factor: What ``scale_loss`` multiplies the loss by, > 0. Default: ``None``.
        gradient_accumulation_steps: Calls for one update, >= 2; 0 and None are none. Default: ``None``.
        exclude_from_weight_decay: Regular expressions; a parameter whose dotted path one of them is found in
            (``re.search``) is not decayed. Default: ``None``.
        constraints: As in :class:`~mlx_adagrad.wrappers.Constraint`. Default: ``None``.

    Raises:
        ValueError: For a negative, infinite or NaN hyperparameter, two clips, an integer ``learning_rate``, or
            ``gradient_accumulation_steps`` of 1.
        TypeError: For what is no number, no bool or no integer.
    """
    _check_label("keras", name)
    _check_clips(clipnorm=clipnorm, clipvalue=clipvalue, global_clipnorm=global_clipnorm)
    if isinstance(learning_rate, Integral) and not isinstance(learning_rate, bool):
        raise ValueError(f"[keras] 'learning_rate' must be a float, a schedule or a callable but got {learning_rate}.")
    rule = Rule(
        eps=checks.non_negative("keras", "epsilon", epsilon),
        eps_inside_sqrt=True,
        weight_decay=_or_zero("keras", "weight_decay", weight_decay),
        decoupled_weight_decay=True,
        initial_accumulator_value=initial_accumulator_value,
        owner="keras",
    )
    rate = rates.parse("keras", "learning_rate", learning_rate)
    optimizer: Adagrad | Wrapper = Adagrad.from_rule(
        rate,
        Groups(rule, decays=_decays(exclude_from_weight_decay)),
        lazy=rule.weight_decay == 0,  # Keras decays every row of a table, whichever rows the gradient names
    )
    optimizer = _clipped(optimizer, "keras", clipnorm, clipvalue, global_clipnorm)
    optimizer = _accumulated(optimizer, gradient_accumulation_steps)
    optimizer = _averaged(optimizer, use_ema, ema_momentum, ema_overwrite_frequency)
    if constraints:
        optimizer = Constraint(optimizer, constraints)
    if loss_scale_factor is None:
        return optimizer
    return LossScale(optimizer, checks.positive("keras", "loss_scale_factor", loss_scale_factor))


@keras_preset
def tf_keras(
    learning_rate: LearningRate = 0.001,
    initial_accumulator_value: float = 0.1,
    epsilon: float | None = 1e-7,
    name: str | None = "Adagrad",
    *,
    clipvalue: float | None = None,
    clipnorm: float | None = None,
    global_clipnorm: float | None = None,
    decay: float = 0.0,
) -> Adagrad | Wrapper:
    r"""``tf.keras.optimizers.Adagrad`` of TensorFlow 2.9: :math:`w - \lambda_t g / (\sqrt{v} + \epsilon)`.

    It is also ``tf_keras.optimizers.legacy.Adagrad``. For the one of TensorFlow 2.11 and later use :func:`keras`.

    Args:
        learning_rate: Learning rate, >= 0. Default: ``0.001``.
        initial_accumulator_value: What ``v`` starts from, >= 0. Default: ``0.1``.
        epsilon: Added to the root, >= 0; 0 and None stand for ``1e-7``, as in tf.keras. Default: ``1e-7``.
        name: A label, kept for the config. Default: ``"Adagrad"``.
        clipvalue: Largest absolute value of an element, >= 0; it comes before a norm. Default: ``None``.
        clipnorm: Largest norm of each gradient, >= 0. Default: ``None``.
        global_clipnorm: Largest norm of all gradients together, >= 0; not with ``clipnorm``. Default: ``None``.
        decay: The rate of call t = 0, 1, ... is ``learning_rate / (1 + decay t)``, >= 0. Default: ``0.0``.

    Raises:
        ValueError: For a negative, infinite or NaN hyperparameter, or both norms.
        TypeError: For what is no number.
    """
    _check_label("tf_keras", name)
    if clipnorm is not None and global_clipnorm is not None:
        raise ValueError(f"[tf_keras] give 'clipnorm' ({clipnorm}) or 'global_clipnorm' ({global_clipnorm}), not both.")
    rule = Rule(
        eps=_or_zero("tf_keras", "epsilon", epsilon) or TF_KERAS_EPSILON,
        lr_decay=checks.non_negative("tf_keras", "decay", decay),
        initial_accumulator_value=initial_accumulator_value,
        owner="tf_keras",
    )
    adagrad = Adagrad.from_rule(rates.parse("tf_keras", "learning_rate", learning_rate), rule)
    return _clipped(adagrad, "tf_keras", clipnorm, clipvalue, global_clipnorm)


def _or_zero(owner: str, name: str, value: float | None) -> float:
    return 0.0 if value is None else checks.non_negative(owner, name, value)


def _check_label(owner: str, name: Any) -> None:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"[{owner}] 'name' must be a string but got {shown(name)}.")


def _check_clips(**clips: float | None) -> None:
    given = [f"{name}={value}" for name, value in clips.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"[keras] give one of 'clipnorm', 'clipvalue', 'global_clipnorm' but got {', '.join(given)}.")


@dataclass(frozen=True)
class FoundNowhere:
    """Whether none of the regular expressions is found in a parameter's path; a class, so that it can be pickled."""

    patterns: tuple[str, ...]

    def __call__(self, path: str, parameter: mx.array) -> bool:
        return not any(re.search(pattern, path) for pattern in self.patterns)


def _decays(excluded: list[str] | None) -> Callable[[str, mx.array], bool] | None:
    """Whether a parameter is decayed: none of the regular expressions is found in its path."""
    if excluded is None:
        return None
    if not isinstance(excluded, list | tuple) or not all(isinstance(pattern, str) for pattern in excluded):
        wanted = "a list of regular expressions"
        raise TypeError(f"[keras] 'exclude_from_weight_decay' must be {wanted} but got {shown(excluded)}.")
    try:
        for pattern in excluded:
            re.compile(pattern)
    except re.error as error:
        raise ValueError(f"[keras] 'exclude_from_weight_decay' is no regular expression: {error}.") from error
    return FoundNowhere(tuple(excluded))


def _clipped(
    optimizer: Adagrad, owner: str, norm: float | None, value: float | None, global_norm: float | None
) -> Adagrad | Wrapper:
    """``optimizer`` inside the clips, by value outermost since it comes first; 0 and None are none."""
    clips = (("clipnorm", norm, ClipByNorm), ("global_clipnorm", global_norm, ClipByGlobalNorm))
    clipped: Adagrad | Wrapper = optimizer
    for name, limit, clip in (*clips, ("clipvalue", value, ClipByValue)):
        if _or_zero(owner, name, limit):
            clipped = clip(clipped, limit)
    return clipped


def _count(name: str, value: int | None) -> int | None:
    """An integer above 0; Keras takes 0 for None."""
    if value is None or (value == 0 and isinstance(value, Integral) and not isinstance(value, bool)):
        return None
    return checks.positive_integer("keras", name, value)


def _accumulated(optimizer: Adagrad | Wrapper, steps: int | None) -> Adagrad | Wrapper:
    steps = _count("gradient_accumulation_steps", steps)
    if steps == 1:
        raise ValueError("[keras] 'gradient_accumulation_steps' must be at least 2 but got 1; leave it None.")
    return GradientAccumulation(optimizer, steps, schedule_counts="calls") if steps else optimizer


def _averaged(optimizer: Adagrad | Wrapper, use: bool, momentum: float, frequency: int | None) -> Adagrad | Wrapper:
    momentum = checks.non_negative("keras", "ema_momentum", momentum)
    frequency = _count("ema_overwrite_frequency", frequency)
    if not checks.boolean("keras", "use_ema", use):
        return optimizer
    if momentum > 1:
        raise ValueError(f"[keras] 'ema_momentum' must be in the range [0, 1] but got {momentum}.")
    return ExponentialMovingAverage(optimizer, momentum, frequency)
