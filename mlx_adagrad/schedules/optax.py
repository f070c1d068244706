"""The schedules of ``optax.schedules``; those made of several parts are in ``optax_joined.py``.

``transition_steps=0`` makes ``init_value`` constant, as in optax.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim

from .arguments import Count, Flag, NonNegative, Period, Scales
from .curves import half_cosine, periods, polynomial
from .named import named


@named
def optax_constant_schedule(step: mx.array, value: NonNegative) -> float:
    """optax's constant_schedule: always ``value``.

    Args:
        value: The rate, >= 0.
    """
    return value


@named
def optax_exponential_decay(
    step: mx.array,
    init_value: NonNegative,
    transition_steps: Count,
    decay_rate: NonNegative,
    transition_begin: Count = 0,
    staircase: Flag = False,
    end_value: NonNegative | None = None,
) -> mx.array | float:
    """optax's exponential_decay: ``init * decay_rate ** ((step - transition_begin) / transition_steps)``.

    Args:
        init_value: The rate until ``transition_begin``, >= 0.
        transition_steps: Steps in which the rate decays by ``decay_rate``, >= 0.
        decay_rate: Factor, >= 0; 0 means a constant ``init_value``, as in optax.
        transition_begin: Steps before the decay, >= 0. Default: ``0``.
        staircase: Decay at the end of ``transition_steps`` and not at every step. Default: ``False``.
        end_value: The rate where the decay, or growth, stops, >= 0; ``None`` for nowhere. Default: ``None``.
    """
    if transition_steps == 0 or decay_rate == 0:
        return init_value
    done = mx.maximum(step - transition_begin, 0)
    rate = optim.exponential_decay(init_value, decay_rate)(periods(done, transition_steps, staircase))
    if end_value is None:
        return rate
    return mx.maximum(rate, end_value) if decay_rate < 1 else mx.minimum(rate, end_value)


@named
def optax_polynomial_schedule(
    step: mx.array,
    init_value: NonNegative,
    end_value: NonNegative,
    power: NonNegative,
    transition_steps: Count,
    transition_begin: Count = 0,
) -> mx.array | float:
    """optax's polynomial_schedule: ``(init - end) * (1 - (step - begin) / transition_steps) ** power + end``.

    Args:
        init_value: The rate until ``transition_begin``, >= 0.
        end_value: The rate it ends at, >= 0.
        power: Exponent, >= 0.
        transition_steps: Steps from one to the other, >= 0.
        transition_begin: Steps before them, >= 0. Default: ``0``.
    """
    if transition_steps == 0:
        return init_value
    return polynomial(init_value, end_value, power, step - transition_begin, transition_steps)


@named
def optax_linear_schedule(
    step: mx.array,
    init_value: NonNegative,
    end_value: NonNegative,
    transition_steps: Count,
    transition_begin: Count = 0,
) -> mx.array | float:
    """optax's linear_schedule: along a line from ``init_value`` to ``end_value``, where it stays.

    Args:
        init_value: The rate until ``transition_begin``, >= 0.
        end_value: The rate it ends at, >= 0.
        transition_steps: Steps from one to the other, >= 0.
        transition_begin: Steps before them, >= 0. Default: ``0``.
    """
    if transition_steps == 0:
        return init_value
    done = mx.maximum(step - transition_begin, 0)
    return optim.linear_schedule(init_value, end_value, transition_steps)(done)


@named
def optax_cosine_decay_schedule(
    step: mx.array,
    init_value: NonNegative,
    decay_steps: Period,
    alpha: NonNegative = 0.0,
    exponent: NonNegative = 1.0,
) -> mx.array:
    """optax's cosine_decay_schedule: half a cosine to a power, from ``init_value`` to ``alpha`` times it.

    Args:
        init_value: The rate at step 0, >= 0.
        decay_steps: Steps of the decay, >= 1.
        alpha: The last rate as a fraction of the first, >= 0. Default: ``0.0``.
        exponent: Exponent of the half cosine, >= 0. Default: ``1.0``.
    """
    curve = half_cosine(mx.minimum(step, decay_steps), decay_steps) ** exponent
    return init_value * ((1 - alpha) * curve + alpha)


@named
def optax_piecewise_constant_schedule(
    step: mx.array, init_value: NonNegative, boundaries_and_scales: Scales | None = None
) -> mx.array | float:
    """optax's piecewise_constant_schedule: ``init_value`` times the scale of each boundary reached.

    Args:
        init_value: The rate before the first boundary, >= 0.
        boundaries_and_scales: Factor, >= 0, for each step named. Default: ``None``.
    """
    rate: mx.array | float = init_value
    for boundary, scale in (boundaries_and_scales or {}).items():
        rate = rate * mx.where(step < int(boundary), 1.0, scale)
    return rate
