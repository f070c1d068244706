"""The schedules of ``keras.optimizers.schedules``."""

from __future__ import annotations

import functools
import math

import mlx.core as mx
import mlx.optimizers as optim

from .arguments import Duration, Flag, NonNegative, NonNegatives, Time
from .curves import half_cosine, periods, warm_up
from .named import named

LONGEST_RUN = 2**40  # steps for which restarts are laid out


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
    end = decay_steps
    if cycle:
        end = decay_steps * mx.maximum(-(-step // decay_steps), 1)
    left = mx.maximum(end - step, 0) / end
    return (initial_learning_rate - end_learning_rate) * left**power + end_learning_rate


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
    if t_mul == 1:
        restarts, done, length = step // first_decay_steps, step % first_decay_steps, first_decay_steps
    else:
        starts, lengths = _periods_between_restarts(first_decay_steps, t_mul)
        # Keras takes logarithms, whose rounding may delay a restart by a step; integers compare exactly.
        restarts = (mx.array([math.ceil(start) for start in starts], mx.int64) <= step).sum() - 1
        done, length = step - mx.array(starts)[restarts], mx.array(lengths)[restarts]
    height = m_mul**restarts * half_cosine(done, length)
    return initial_learning_rate * ((1 - alpha) * height + alpha)


@functools.lru_cache(maxsize=8)
def _periods_between_restarts(first: float, factor: float) -> tuple[list[float], list[float]]:
    """Where each period starts and how long it is, as far as any run goes."""
    starts, lengths = [0.0], [float(first)]
    while starts[-1] + lengths[-1] < LONGEST_RUN:
        starts.append(round(starts[-1] + lengths[-1], 6))  # a rounding error would add a step to the ceiling
        lengths.append(lengths[-1] * factor)
    return starts, lengths


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
