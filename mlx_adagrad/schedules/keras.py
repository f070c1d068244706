"""The schedules of ``keras.optimizers.schedules``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from ..checks import shown
from .arguments import Duration, Flag, NonNegative, NonNegatives, Time
from .curves import cosine_restarts, periods, polynomial, warm_up
from .named import NamedSchedule, call_with, named


@named
def keras_exponential_decay(
    step: mx.array,
    initial_learning_rate: NonNegative,
    decay_steps: Duration,
    decay_rate: NonNegative,
    staircase: Flag = False,
) -> mx.array:
    """Keras's ExponentialDecay: ``initial_learning_rate * decay_rate ** (step / decay_steps)``.

    Args:
        initial_learning_rate: The rate at step 0, >= 0.
        decay_steps: Steps in which the rate decays by ``decay_rate``, > 0.
        decay_rate: Factor, >= 0, in fp32 as Keras has it.
        staircase: Decay at the end of ``decay_steps`` and not at every step. Default: ``False``.
    """
    return optim.exponential_decay(initial_learning_rate, decay_rate)(periods(step, decay_steps, staircase))


@named
def keras_inverse_time_decay(
    step: mx.array,
    initial_learning_rate: NonNegative,
    decay_steps: Duration,
    decay_rate: NonNegative,
    staircase: Flag = False,
) -> mx.array:
    """Keras's InverseTimeDecay: ``initial_learning_rate / (1 + decay_rate * step / decay_steps)``.

    Args:
        initial_learning_rate: The rate at step 0, >= 0.
        decay_steps: Steps in which the denominator grows by ``decay_rate``, > 0.
        decay_rate: Growth of the denominator, >= 0.
        staircase: Decay at the end of ``decay_steps`` and not at every step. Default: ``False``.
    """
    return initial_learning_rate / (1 + decay_rate * periods(step, decay_steps, staircase))


@named
def keras_polynomial_decay(
    step: mx.array,
    initial_learning_rate: NonNegative,
    decay_steps: Duration,
    end_learning_rate: NonNegative = 0.0001,
    power: NonNegative = 1.0,
    cycle: Flag = False,
) -> mx.array:
    """Keras's PolynomialDecay: ``(initial - end) * (1 - step / decay_steps) ** power + end``.

    Args:
        initial_learning_rate: The rate at step 0, >= 0.
        decay_steps: Steps until ``end_learning_rate`` is reached, > 0.
        end_learning_rate: The rate it ends at, >= 0. Default: ``0.0001``.
        power: Exponent, >= 0. Default: ``1.0``.
        cycle: Past the end decay anew, towards the next multiple of ``decay_steps``. Default: ``False``.
    """
    end: float | mx.array = decay_steps
    if cycle:
        end = decay_steps * mx.maximum(-(-step // decay_steps), 1)
    return polynomial(initial_learning_rate, end_learning_rate, power, step, end)


@named
def keras_cosine_decay(
    step: mx.array,
    initial_learning_rate: NonNegative,
    decay_steps: Duration,
    alpha: NonNegative = 0.0,
    warmup_target: NonNegative | None = None,
    warmup_steps: Time = 0,
) -> mx.array:
    """Keras's CosineDecay: a linear warm-up if any, then half a cosine down to ``alpha`` times the highest rate.

    Args:
        initial_learning_rate: The rate at step 0, >= 0.
        decay_steps: Steps of the decay, which follow those of the warm-up, >= 1.
        alpha: The last rate as a fraction of the highest, >= 0. Default: ``0.0``.
        warmup_target: The rate that the warm-up reaches, >= 0; ``None`` for no warm-up. Default: ``None``.
        warmup_steps: Steps of the warm-up, >= 0. Default: ``0``.
    """
    highest = initial_learning_rate if warmup_target is None else warmup_target
    decay = optim.cosine_decay(highest, decay_steps, alpha * highest)  # type: ignore[arg-type]  # fractions work too
    return warm_up(initial_learning_rate, highest, 0 if warmup_target is None else warmup_steps, decay)(step)


@named
def keras_cosine_decay_restarts(
    step: mx.array,
    initial_learning_rate: NonNegative,
    first_decay_steps: Duration,
    t_mul: NonNegative = 2.0,
    m_mul: NonNegative = 1.0,
    alpha: NonNegative = 0.0,
) -> mx.array:
    """Keras's CosineDecayRestarts: half cosines, each ``t_mul`` times as long and ``m_mul`` times as high as the last.

    Args:
        initial_learning_rate: The rate at step 0, >= 0.
        first_decay_steps: Steps until the first restart, > 0.
        t_mul: Length of a period over that of the one before, >= 1. Default: ``2.0``. Below 1, Keras's rate ends in
            NaN.
        m_mul: Height of a period over that of the one before, >= 0. Default: ``1.0``.
        alpha: The lowest rate as a fraction of the initial one, >= 0. Default: ``0.0``.
    """
    if t_mul < 1:
        raise ValueError(f"[keras_cosine_decay_restarts] 't_mul' must be at least 1 but got {t_mul}.")
    restarts, curve = cosine_restarts(step, first_decay_steps, t_mul)
    return initial_learning_rate * ((1 - alpha) * m_mul**restarts * curve + alpha)


@named
def keras_piecewise_constant_decay(step: mx.array, boundaries: NonNegatives, values: NonNegatives) -> mx.array:
    """Keras's PiecewiseConstantDecay: ``values[i]`` up to and including step ``boundaries[i]``, then the next.

    Args:
        boundaries: Steps, >= 0 and increasing.
        values: Rates, >= 0, one more of them than of boundaries.
    """
    if len(values) != len(boundaries) + 1:
        raise ValueError(
            "[keras_piecewise_constant_decay] 'values' must have one number more than 'boundaries' but got "
            f"{len(values)} and {len(boundaries)}."
        )
    if boundaries != sorted(set(boundaries)):
        raise ValueError(f"[keras_piecewise_constant_decay] 'boundaries' must increase but got {boundaries}.")
    passed = (mx.array([math.floor(boundary) for boundary in boundaries], mx.int64) < step).sum()
    return mx.array(values, mx.float32)[passed]


CLASSES = {
    "CosineDecay": keras_cosine_decay,
    "CosineDecayRestarts": keras_cosine_decay_restarts,
    "ExponentialDecay": keras_exponential_decay,
    "InverseTimeDecay": keras_inverse_time_decay,
    "PiecewiseConstantDecay": keras_piecewise_constant_decay,
    "PolynomialDecay": keras_polynomial_decay,
}


def from_keras(schedule: Any) -> NamedSchedule:
    """The schedule that a Keras or tf.keras schedule, or its serialised dict, describes; it is never called.

    Args:
        schedule: An object of a class of Keras's, or ``{"class_name": ..., "config": {...}}``.

    Raises:
        TypeError: If it is neither.
        ValueError: If its class or one of its options is not known here.
    """
    if isinstance(schedule, Mapping):
        # Keras registers classes of users only, and such a class may share a name with one of Keras's.
        name, config = schedule.get("registered_name") or schedule.get("class_name"), schedule.get("config")
    elif callable(getattr(schedule, "get_config", None)):
        name, config = type(schedule).__name__, schedule.get_config()
    else:
        raise TypeError(f"[from_keras] expected a Keras schedule or its config but got {shown(schedule)}.")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"[from_keras] there is no schedule {shown(name)} here, only {', '.join(CLASSES)}.")
    if isinstance(config, Mapping):
        config = {key: value for key, value in config.items() if key != "name"}  # a label for graphs
    return call_with("from_keras", CLASSES[name], config)
